"""Digests: hexadecimal digits that tell contents apart. Equal contents give equal digits on every machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from .foreign import opened

_AT_ONCE = 1 << 20
_PIECES, _PIECE = 256, 1 << 12  # that are read of each file of a model
_OF_A_MODEL = (".safetensors", ".bin", ".ckpt", ".pt", ".json", ".txt")


def digest_of(
    parts: Iterable[str | bytes | memoryview], digits: int = 16, by: Literal["sha256", "blake2b"] = "sha256"
) -> str:
    """Of texts and bytes, one after another. ``blake2b`` is the quick one, of 32 digits, for whole images.

    >>> digest_of(["a", b"b"]) == digest_of(["ab"])
    True
    """
    found = hashlib.sha256() if by == "sha256" else hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
    return found.hexdigest()[:digits]


def json_digest(value: Any) -> str:
    """16 digits of what JSON can hold; the order of keys counts.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    False
    """
    return digest_of([json.dumps(value)])


def file_digest(path: Path, digits: int = 16) -> str:
    """Of a regular file's bytes. Raises Unreadable where it is none."""
    with opened(path) as file:
        return digest_of(iter(lambda: file.read(_AT_ONCE), b""), digits)


def model_digest(path: Path) -> str:
    """16 digits of a checkpoint, or of the weights, configurations and tokenizers in a folder, wherever it lies: from sizes
    and evenly spaced pieces, as gigabytes take long to read. A training changes all weights. Raises Unreadable.
    """
    if not path.is_dir():
        return digest_of(_pieces(path))
    inside = (file for file in path.rglob("*") if file.suffix in _OF_A_MODEL and file.is_file())
    files = sorted((file.relative_to(path).as_posix(), file) for file in inside)
    return digest_of(part for name, file in files for part in (f"{name}\0", *_pieces(file)))


def _pieces(path: Path) -> Iterator[str | bytes]:
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        yield f"{size}\0"
        for number in range(_PIECES):
            file.seek(number * size // _PIECES)
            yield file.read(_PIECE)
