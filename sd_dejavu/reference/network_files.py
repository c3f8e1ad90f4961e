"""Feature networks in one file: safetensors, TorchScript or ONNX, whichever its ending says.

Safetensors hold numbers alone. A TorchScript file can hold code, which its interpreter runs. ONNX is computed by
onnxruntime, where that is installed, and gives no gradients.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kept import digest_of, file_digest
from ..kept.foreign import Unreadable, check_size, contents, one_line, opened

ENDINGS = (".safetensors", ".onnx", ".pt", ".pth", ".torchscript")
_ROWS = (
    "pooler_output",
    "x_norm_clstoken",
    "image_embeds",
    "last_hidden_state",
)  # of outputs with names, in this order
_LOCATION = re.compile(rb"\n\x08location\x12([\x80-\xff]?[\x00-\x7f])", re.DOTALL)  # then a text of so many bytes
_MOST_TENSORS, _MOST_BYTES = 10_000, 16 << 30  # of a file


class FeatureError(ValueError):
    """Features that cannot be used; the text says why and what to do."""


class NetworkFile(Protocol):
    """Images as the network wants them, [B, 3, H, W], -> rows [B, D]."""

    side: int | None  # of the only images that it takes, where its file says so

    def __call__(self, images: Tensor) -> Tensor: ...


class TorchScript:
    """A traced or scripted network; rows are its only or named output, or the first token of it."""

    side: int | None = None

    def __init__(self, path: Path, device: str) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an old format, but the one in which SSCD is published
                module = torch.jit.load(str(path), map_location=device)
        except (RuntimeError, ValueError) as error:
            raise FeatureError(
                f"{path} cannot be loaded as TorchScript: {one_line(error)}. A file of weights alone (.pt, .pth) is a "
                "pickle and is not read: save its tensors as .safetensors, or name the TorchScript or ONNX file"
            ) from error
        self._module: Any = module.eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        found = self._module(images)
        if isinstance(found, Mapping):
            found = next((found[name] for name in _ROWS if name in found), None)
        elif isinstance(found, (tuple, list)):
            found = found[0]
        if not isinstance(found, Tensor):
            raise ValueError(f"it gives no tensor, but {type(found).__name__}")
        return _first_token(found)


class Onnx:
    """A network in onnxruntime, on the CPU, or the GPU where its build can. Raises FeatureError where it cannot be read."""

    def __init__(self, path: Path, device: str) -> None:
        runtime = _onnxruntime(path)
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        there = [name for name in (*wanted, "CPUExecutionProvider") if name in runtime.get_available_providers()]
        try:
            options = runtime.SessionOptions()
            options.log_severity_level = 4
            self._session: Any = runtime.InferenceSession(str(path), options, providers=there)
            (entry,) = self._session.get_inputs()
        except Exception as error:  # the library's own types, one for each kind of fault; or more inputs than one
            raise FeatureError(f"{path} cannot be loaded as ONNX: {one_line(error)}") from error
        self._input, self._half = entry.name, "float16" in entry.type
        shape: Sequence[Any] = entry.shape
        if len(shape) != 4:
            raise FeatureError(
                f"{path} takes an input of the shape {list(shape)}, and images are [batch, 3, height, width]"
            )
        self._single = shape[0] == 1
        sides = [side for side in shape[2:] if isinstance(side, int)]
        if len(set(sides)) > 1 or len(sides) == 1:
            raise FeatureError(
                f"{path} takes images of {shape[3]} x {shape[2]} only: export it for squares, or any size"
            )
        self.side: int | None = sides[0] if sides else None
        names = [output.name for output in self._session.get_outputs()]
        self._output = next((name for name in _ROWS if name in names), names[0])

    def __call__(self, images: Tensor) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            raise FeatureError(
                "an ONNX network gives no gradients, which are needed here: use the same network as .safetensors or "
                "TorchScript"
            )
        values = images.detach().cpu().numpy().astype(np.float16 if self._half else np.float32)
        parts = np.split(values, len(values)) if self._single else [values]
        rows = [self._session.run([self._output], {self._input: part})[0] for part in parts]
        return _first_token(torch.from_numpy(np.concatenate(rows)).to(images.device))


def open_network(path: Path, device: str) -> NetworkFile:
    """TorchScript or ONNX. Raises FeatureError with a sentence where it is neither."""
    return Onnx(path, device) if path.suffix.lower() == ".onnx" else TorchScript(path, device)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FeatureError with a sentence."""
    from safetensors import safe_open

    try:
        with opened(path) as entire:
            check_size(entire.seek(0, 2), _MOST_BYTES)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > _MOST_TENSORS:
                raise Unreadable(f"it holds {len(names):,} tensors, and at most {_MOST_TENSORS:,} are read")
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the library's own type, and torch's for values that it does not know
        raise FeatureError(f"{path} is not a sound safetensors file: {one_line(error)}") from error


def is_weights(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def digest_of_network(path: Path) -> str:
    """8 digits of a file's bytes; of an ONNX file with those of the files beside it that it says hold its weights."""
    beside = [path.parent / name for name in _weights_beside(path)] if path.suffix.lower() == ".onnx" else []
    if not beside:
        return file_digest(path, 8)
    return digest_of([file_digest(one) for one in (path, *beside)], 8)


def _weights_beside(path: Path) -> list[str]:
    """The locations of external data in an ONNX file, in their order: entries of the key 'location' (protobuf's field 1)
    and a text (field 2), each after its length."""
    data, found = contents(path, _MOST_BYTES), set[str]()
    for entry in _LOCATION.finditer(data):
        length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(entry[1]))
        found.add(data[entry.end() : entry.end() + length].decode("utf-8", "replace"))
    return sorted(name for name in found if "\0" not in name and (path.parent / name).is_file())


def _first_token(rows: Tensor) -> Tensor:
    return rows[:, 0] if rows.ndim == 3 else rows.flatten(1)


def _onnxruntime(path: Path) -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise FeatureError(
            f"{path.name} needs the package onnxruntime: pip install onnxruntime, or name the network as .safetensors or "
            "TorchScript"
        ) from error
