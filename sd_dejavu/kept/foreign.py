"""The door for files that others made: what is opened, how much of it is read at most, and which numbers are numbers.

Whatever reads images, captions, archives or JSON that came from elsewhere goes through here. What a file says of its
own size is never believed: sizes are looked at before reading, and counted while reading.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

IMAGE_BYTES = 256 << 20  # of one image's file, alone or in an archive
PIXELS = 64 << 20  # of one image: 67 megapixels, 768 MiB in fp32
CAPTION_BYTES = 1 << 20  # of one caption's file, alone or in an archive
CAPTION_CHARACTERS = 100_000
CONFIG_BYTES = 1 << 20  # of a trainer's configuration
HEADER_BYTES = 1 << 20  # of what an archive says of one of its files
ROWS = 10_000_000  # of one Parquet file
REPEATS = 10_000  # times an epoch shows one image
TEXT_BYTES = 1 << 30  # of a list of prompts, or of JSON
_AT_ONCE = 1 << 20


class Unreadable(ValueError):
    """A foreign file, or a part of one, that is not read. The text says why, and does not name it."""


def opened(path: Path) -> BinaryIO:
    """A regular file, or a link to one, to be read. Never waits, as a pipe would make it. Raises Unreadable."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        file = open(path, "rb", opener=_without_waiting) if regular else None  # noqa: SIM115 - the caller closes it
    except (OSError, ValueError) as error:
        raise Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if file is None or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise Unreadable("cannot be read: it is a folder, a pipe or a device, not a regular file")
    return file


def contents(path: Path, most: int) -> bytes:
    """All bytes of a regular file. Raises Unreadable, also for more than ``most`` bytes."""
    with opened(path) as file:
        check_size(os.fstat(file.fileno()).st_size, most)
        found = bytearray()
        try:
            while piece := file.read(_AT_ONCE):
                found += piece
                check_size(len(found), most)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    return bytes(found)


def check_size(size: int, most: int) -> None:
    """Raises Unreadable where ``size`` bytes are more than ``most``."""
    if size > most:
        raise Unreadable(f"too large: {size:,} bytes, and at most {most:,} are read")


def check_caption(text: str) -> str:
    """The text itself. Raises Unreadable where it is too long to be a caption."""
    if len(text) > CAPTION_CHARACTERS:
        raise Unreadable(
            f"its caption is too long: {len(text):,} characters, and at most {CAPTION_CHARACTERS:,} are read"
        )
    return text


def json_of(path: Path) -> Any:
    """The value in a JSON file. Raises Unreadable."""
    try:
        return json.loads(contents(path, TEXT_BYTES).decode("utf-8"))
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable("not valid JSON: nested too deep") from error
    except ValueError as error:
        raise Unreadable(f"not valid JSON: {error}") from error


def is_number(value: Any) -> bool:
    """A finite number that fits a float; True and False are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of 400 digits
        return False


def one_line(error: BaseException | str) -> str:
    """What was said, on one line of at most 300 characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:299]}…"


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
