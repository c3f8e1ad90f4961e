"""Digests: hexadecimal digits that tell contents apart. Equal contents give equal digits on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .foreign import opened

_AT_ONCE = 1 << 20


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
