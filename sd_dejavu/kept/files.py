"""Files that are written whole or not at all, of finite numbers only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .foreign import one_line

PARTIAL = ".partial"
_AT_ONCE = 1 << 24  # values looked at together


class NotKept(OSError, ValueError):
    """A result that could not be written. The text says which, and why."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that becomes ``path`` when it is whole. Raises NotKept.

    A device or a pipe is no place for it: renaming would put a file where it stands.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise NotKept(f"{path} is a device or a pipe, and would be replaced by a file: give the name of a file")
    partial = path.with_name(path.name + PARTIAL)
    try:
        if partial.is_symlink():  # in a folder of somebody else's: it would lead the writing elsewhere
            partial.unlink()
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last for a full disk
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise not_kept(path, error) from error


def not_kept(path: Path, error: Exception) -> NotKept:
    return NotKept(f"{path} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}")


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def json_text(document: Any, **how: Any) -> str:
    """JSON of finite numbers. Raises ValueError for NaN and infinity, which JSON does not know."""
    return json.dumps(document, allow_nan=False, **how)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises ValueError for NaN and infinity, NotKept where it cannot be written."""
    check_finite(tensors, path.name)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata)


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError where a floating-point tensor holds NaN or infinity."""
    for name, values in tensors.items():
        if values.is_floating_point() and not is_finite(values):
            raise ValueError(f"{what} is not saved: its {name} hold NaN or infinity")


def is_finite(values: Tensor) -> bool:
    parts = values.detach().reshape(-1).split(_AT_ONCE)
    # Of numbers in one byte torch asks nothing.
    return all(bool(torch.isfinite(part.float() if part.element_size() == 1 else part).all()) for part in parts)
