"""LoRAs of every kind, merged into the weights of a pipeline of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...kept.foreign import Unreadable, one_line
from ...training.lora_files import Contents, Module, Places, changed, changed_bias, fits, modules_of, read, told_keys
from . import ModelError

log = logging.getLogger("dejavu")
LEAST_USED = 0.5  # share of a file's keys, below which it is taken for another model's
_RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")


def merge(pipeline: Any, network: str, encoders: Sequence[str], file: Path, strength: float, name: str) -> None:
    """Changes the weights of the pipeline's ``network`` and text ``encoders``, which keep their names and shapes.

    Keys of the file that fit nothing are told to the log. Raises ModelError with a sentence where the file cannot be
    read, or where most of it fits nothing.
    """
    if file.suffix != ".safetensors":
        raise ModelError(f"the LoRA {file} is no .safetensors file, the only kind that is read: convert it first")
    if not file.is_file():
        raise ModelError(f"there is no LoRA {file}: check the path")
    try:
        contents = read(file)
    except Unreadable as error:
        raise ModelError(f"the LoRA {file} cannot be merged into {name}: {one_line(error)}") from error
    contents, places = placed(pipeline, network, encoders, contents)
    used = sum(len(module.keys) for module in contents.modules if module.name in places)
    unused = [key for module in contents.modules if module.name not in places for key in module.keys]
    told = told_keys(used, len(contents.tensors), [*unused, *contents.unknown])
    if not used:
        raise ModelError(f"the LoRA {file} holds nothing for {name}: it was made for another kind of model")
    if used < LEAST_USED * len(contents.tensors):
        raise ModelError(f"the LoRA {file} does not fit {name} ({told}): it was made for another kind of model")
    if used < len(contents.tensors):
        _tell(f"the LoRA {file.name}: {told}")
    with torch.no_grad():
        for module in contents.modules:
            if module.name in places:
                _change(places[module.name], module, strength)


def placed(
    pipeline: Any, network: str, encoders: Sequence[str], contents: Contents
) -> tuple[Contents, Mapping[str, torch.nn.Module]]:
    """The contents of a file, and which module of the pipeline each of its modules is for, by name; those that fit none
    are left out.

    Other trainers' names for the blocks of a network go through diffusers' own converters, which may give other
    contents.
    """
    parts = {part: dict(_modules(getattr(pipeline, part))) for part in (network, *encoders)}
    also = _ldm_names(getattr(pipeline, network)) if "unet" in network else {}
    places = Places(network, parts, also)

    def fitted(contents: Contents) -> dict[str, torch.nn.Module]:
        found = {}
        for module in contents.modules:
            if (place := places.of(module.name)) is not None:
                own = parts[place[0]][place[1]]
                if fits(own.weight, module, getattr(own, "bias", None)):
                    found[module.name] = own
        return found

    found = fitted(contents)
    if len(found) < len(contents.modules) and network == "transformer":
        converted = _converted(pipeline, contents)
        if converted is not None and len(more := fitted(converted)) > len(found):
            return converted, more
    return contents, found


def _modules(part: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in part.named_modules() if getattr(module, "weight", None) is not None)


def _change(own: Any, module: Module, strength: float) -> None:
    own.weight.copy_(changed(own.weight, module, strength))
    if "bias" in module.parts:
        own.bias.copy_(changed_bias(own.bias, module, strength))


def _converted(pipeline: Any, contents: Contents) -> Contents | None:
    """The contents as diffusers names and parts them for this pipeline; None where it does not know the names."""
    try:
        found = type(pipeline).lora_state_dict(dict(contents.tensors))
    except Exception:  # its converters raise many types for names that they do not know, which are then told
        return None
    return modules_of(found, contents.metadata)


def _ldm_names(unet: Any) -> dict[str, str]:
    """What a UNet's modules are called in Stable Diffusion's own layout -> in diffusers', by diffusers' converter.

    It is given every name that may be, with the name as its value.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    modules = dict(_modules(unet))
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    if not isinstance(layers, int):
        return {}
    within = {name.split(".attentions.", 1)[1].split(".", 1)[1] for name in modules if ".attentions." in name}
    known = [f"time_embed.{n}" for n in (0, 2)] + [f"label_emb.0.{n}" for n in (0, 2)] + ["out.0", "out.2"]
    known += ["input_blocks.0.0", *(f"middle_block.{n}.{name}" for n in (0, 2) for name in _RESNET)]
    known += [f"middle_block.1.{name}" for name in within]
    for block in range(levels * (layers + 1)):
        up = block // (layers + 1)
        upsampler = 2 if any(name.startswith(f"up_blocks.{up}.attentions.") for name in modules) else 1
        known += [f"{side}_blocks.{block}.0.{name}" for side in ("input", "output") for name in _RESNET]
        known += [f"{side}_blocks.{block}.1.{name}" for side in ("input", "output") for name in within]
        known += [f"input_blocks.{block}.0.op", f"output_blocks.{block}.{upsampler}.conv"]
    names = {f"model.diffusion_model.{name}.{of}": name for name in known for of in ("weight", "bias")}
    found = convert_ldm_unet_checkpoint(names, unet.config)
    return {
        str(ldm): key.removesuffix(".weight") for key, ldm in found.items() if key.removesuffix(".weight") in modules
    }


@lru_cache
def _tell(text: str) -> None:
    """Once for all variants of a model that one process loads."""
    log.warning("[Déjà Vu] %s", text)
