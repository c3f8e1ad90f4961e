"""Reading models: diffusers folders, single-file checkpoints, hub ids; what is incomplete or brings code is refused."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.memory import OutOfMemory, ran_out, too_large
from ...demo.bundled import FOLDER as BUNDLED
from ...kept.foreign import Unreadable, json_of, one_line
from ...quiet import quiet
from . import ModelError
from .adapter import DiffusersModel
from .families import Family, Shapes, family_of_checkpoint, family_of_pipeline, takes_images
from .lora import merge

_LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # where a folder's parts may come from
_INDEX = "model_index.json"
_NOISE_LEVELS = 100_000  # of a scheduler, which makes lists of all of them before anything can be refused
_LAYERS = 4  # of 'state_dict' that weights may lie in
_UNUSED = ("safety_checker",)  # of a folder's parts
_CONFIGURATIONS = ("*.json", "*/*.json", "*.txt", "*/*.txt", "*.py", "*/*.py")  # what --config needs of a hub id
_FILES = Path(__file__).parent / "families" / "files"  # what single files lack
_PADDING = {"quick_gelu": "<|endoftext|>", "gelu": "!"}  # by the text encoder's activation: OpenAI's CLIP, OpenCLIP's
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    model: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    config: str | None = None,
    prompt_weights: bool = False,
    lora: str | None = None,
    lora_strength: float = 1.0,
) -> DiffusersModel:
    """The bundled model (None), a diffusers folder, a single-file checkpoint, or a hub id named by the user.

    ``config`` names a diffusers folder (or hub id) with the configuration files and tokenizer of a single-file
    checkpoint that is none of the sizes this package describes. ``prompt_weights`` reads '(word:1.3)' in prompts. ``lora`` is a .safetensors file
    of any kind (:mod:`sd_dejavu.training.lora_files`), merged into the weights at ``lora_strength``; keys of it that fit
    nothing are told to the log. Only a hub id given here reaches the network. Raises ModelError with a sentence when the model or the LoRA cannot be found or used.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: use one of {', '.join(_DTYPES)}")
    place = _device(device)
    path = BUNDLED if model is None else Path(model)
    name = "bundled model" if model is None else str(model)
    try:
        with quiet():
            pipeline = _load_pipeline(path, name, _DTYPES[dtype], config)
            _refuse_incomplete(pipeline, name)
            if lora is not None:
                family = family_of_pipeline(type(pipeline).__name__, name)
                encoders = [part for part, _ in family.text_encoders]
                merge(pipeline, family.network, encoders, Path(lora), lora_strength, name)
            return DiffusersModel(pipeline.to(place), name, prompt_weights)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{name} is broken, or holds Python objects beside its weights, which could run code and are not loaded: "
            "use a .safetensors file"
        ) from error
    except Exception as error:  # the loaders raise dozens of types; all mean that this is not a usable model
        if ran_out(error):
            raise OutOfMemory(f"{name} does not fit: {too_large(error)}") from error
        raise ModelError(f"{name} cannot be loaded: {one_line(error)}") from error


def _device(name: str) -> torch.device:
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown: use cpu, cuda, cuda:1 or mps") from error
    if place.type not in counts:
        raise ModelError(f"device {name!r} cannot be used here: use cpu, cuda, cuda:1 or mps")
    if (place.index or 0) >= counts[place.type]:
        raise ModelError(f"device {name!r} was asked for, but this PyTorch sees no such device: use --device cpu")
    return place


def _refuse_incomplete(pipeline: Any, name: str) -> None:
    """diffusers leaves tensors that a file lacks without values."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            lacking = [key for key, parameter in module.named_parameters() if parameter.is_meta]
            if lacking:
                raise ModelError(_incomplete(name, part, lacking))


def _incomplete(name: str, part: str, lacking: Sequence[str]) -> str:
    return f"{name} is incomplete: it lacks {len(lacking)} of the tensors of its {part}, such as {lacking[0]}"


def _dtype_argument() -> str:
    """diffusers 0.42 renamed 'torch_dtype'."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def _load_pipeline(path: Path, name: str, dtype: torch.dtype, config: str | None) -> Any:
    if path.is_dir():
        return _load_folder(path, name, dtype)
    if path.is_file():
        return _load_single_file(path, name, dtype, config)
    if not _is_hub_id(name) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelError(
            f"the model {name} does not exist: give a diffusers folder, a checkpoint file or a hub id (owner/name)"
        )
    return _load_folder(_from_hub(name), name, dtype)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _from_hub(name: str) -> Path:
    """A model's files. diffusers sees them only where their index names nothing that would make it run code."""
    import diffusers
    from huggingface_hub import hf_hub_download

    try:
        index = Path(hf_hub_download(name, _INDEX))
        _family_of(index.parent)
        return Path(diffusers.DiffusionPipeline.download(name, revision=index.parent.name))
    except ModelError:
        raise
    except Exception as error:  # the hub's own types, the network's and the operating system's
        raise ModelError(
            f"the model {name} is neither a folder nor a file here, and it could not be fetched from the hub: "
            "check its name and the network"
        ) from error


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    import diffusers

    family = _family_of(folder)
    _refuse_missing(folder, name)
    options: dict[str, Any] = {_dtype_argument(): dtype, "safety_checker": None, "requires_safety_checker": False}
    options |= _text_encoders(family, folder, name, dtype)
    return getattr(diffusers, family.pipeline).from_pretrained(folder, **options, local_files_only=True)


def _text_encoders(family: Family, folder: Path, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loaded one by one: within a pipeline, transformers fills tensors that a file lacks with random numbers."""
    import transformers

    loaded = {}
    for part, class_name in family.text_encoders:
        encoder, report = getattr(transformers, class_name).from_pretrained(
            folder / part, local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ModelError(_incomplete(name, part, sorted(report["missing_keys"])))
        loaded[part] = encoder.to(dtype)
    return loaded


def _family_of(folder: Path) -> Family:
    """The family of a diffusers folder, whole or of configurations alone. Every folder goes through here.

    diffusers imports what lies beside a model: a custom pipeline, a part's own class, and before 0.38 even a
    ``None.py`` that nothing names. So a folder with any code in it is refused.
    """
    parts = _read_json(folder / _INDEX, f"{folder} is no diffusers folder: it holds no {_INDEX}")
    family = family_of_pipeline(parts.get("_class_name"), str(folder))
    for part, origin in parts.items():
        foreign = isinstance(origin, list) and (not origin or origin[0] not in _LIBRARIES)
        if foreign or not part.isidentifier():
            raise ModelError(
                f"{folder} brings its own code for its {part}, which is not run: this model cannot be read"
            )
    for file in (*folder.glob("*"), *folder.glob("*/*")):
        calls_code = file.suffix.lower() == ".py" or (
            file.match("*config*.json") and "auto_map" in _read_json(file, f"{file} is no file")
        )
        if calls_code:
            raise ModelError(
                f"{folder} brings its own code ({file.relative_to(folder)}), which is not run: this model cannot be read"
            )
    schedule = folder / "scheduler" / "scheduler_config.json"
    levels = _read_json(schedule, "").get("num_train_timesteps", 1) if schedule.is_file() else 1
    if not isinstance(levels, int) or not 1 <= levels <= _NOISE_LEVELS:
        raise ModelError(f"{schedule} is broken: {levels!r:.40} noise levels, and from 1 to {_NOISE_LEVELS:,} are read")
    return family


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(missing)
    try:
        found = json_of(file)
    except Unreadable as error:
        raise ModelError(f"{file} is broken: {error}") from error
    return found if isinstance(found, dict) else {}


def _refuse_missing(folder: Path, name: str) -> None:
    """A part that the index names must be there: the libraries make up some of those that are not."""
    for part, origin in _read_json(folder / _INDEX, f"{folder} holds no {_INDEX}").items():
        if isinstance(origin, list) and origin[0] is not None and part not in _UNUSED:
            place = folder / part
            if not place.is_dir() or not any(place.iterdir()):
                raise ModelError(f"{name} is incomplete: it has no {part}; get the model again, whole")


def _load_single_file(path: Path, name: str, dtype: torch.dtype, config: str | None) -> Any:
    import diffusers

    shapes = _shapes(path)
    family = family_of_checkpoint(shapes, name)
    if family.takes_images(shapes):
        raise takes_images(name)
    tokenizers: dict[str, Any] = {}
    if config is None:
        folder, tokenizers = _packaged(family, shapes, name)
    elif Path(config).is_dir():
        folder = Path(config)
    elif _is_hub_id(config):
        folder = _configuration_from_hub(config, name)
    else:
        raise ModelError(f"the configuration {config} does not exist: give a diffusers folder or a hub id (owner/name)")
    # Without local_files_only diffusers asks the hub for a configuration it does not find.
    try:
        pipeline = getattr(diffusers, _family_of(folder).pipeline).from_single_file(
            path,
            config=str(folder),
            local_files_only=True,
            safety_checker=None,
            **tokenizers,
            **{_dtype_argument(): dtype},
        )
    except NotImplementedError as error:  # a tensor that was given no value cannot be cast
        raise ModelError(f"{name} is incomplete: it lacks tensors that its configuration asks for") from error
    if config is None:
        for part, changes in _told(family, shapes, path, name).items():
            pipeline.components[part].register_to_config(**changes)
    elif "v_pred" in shapes and pipeline.scheduler.config.get("prediction_type") != "v_prediction":
        raise ModelError(
            f"{name} predicts v, but its configuration says otherwise: name one for v-prediction with --config"
        )
    return pipeline


def _packaged(family: Family, shapes: Shapes, name: str) -> tuple[Path, dict[str, Any]]:
    """The configuration of a checkpoint's kind as this package brings it, and its tokenizers: CLIP's, whose empty rows
    are filled with the end token, or with '!' where the text encoder is OpenCLIP's."""
    from transformers import CLIPTokenizer

    if (kind := family.files(shapes)) is None:
        raise ModelError(
            f"{name} is of the family {family.name}, but of other sizes than those that this package describes: name a diffusers folder "
            "or hub id of the same sizes with --config"
        )
    return _FILES / kind, {
        part.replace("text_encoder", "tokenizer"): CLIPTokenizer.from_pretrained(
            _FILES / "clip",
            pad_token=_PADDING[_read_json(_FILES / kind / part / "config.json", part)["hidden_act"]],
            model_max_length=77,
        )
        for part, _ in family.text_encoders
    }


def _told(family: Family, shapes: Shapes, path: Path, name: str) -> dict[str, dict[str, Any]]:
    try:
        return family.tells(shapes, lambda key: _tensor(path, key))
    except ModelError as error:
        raise ModelError(f"{name} cannot be read: {error}") from error


def _configuration_from_hub(config: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config, allow_patterns=list(_CONFIGURATIONS)))
    except Exception as error:  # the hub's own types, the network's and the operating system's
        raise ModelError(
            f"the configuration {config} for {name} could not be fetched from the hub: check its name and the network"
        ) from error


def _shapes(path: Path) -> Shapes:
    """Names and shapes of a checkpoint's tensors, without their values. Pickles are read as weights only."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return {key: tuple(value.shape) for key, value in _unpickled(path, "meta").items() if isinstance(value, Tensor)}


def _tensor(path: Path, key: str) -> Tensor:
    """The values of one tensor of a checkpoint."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    return _unpickled(path, "cpu")[key]


def _unpickled(path: Path, place: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=place, weights_only=True)
    except Exception as error:  # a broken file makes the reader fail in many ways
        raise pickle.UnpicklingError(str(error)) from error
    for _ in range(_LAYERS):
        if "state_dict" in state:
            state = state["state_dict"]
    if "state_dict" in state:
        raise ModelError(f"{path} holds a 'state_dict' within a 'state_dict' without an end: the file is broken")
    return dict(state)
