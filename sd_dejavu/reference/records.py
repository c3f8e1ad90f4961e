"""What a training set is read as, one record an image, and what the readers of all kinds of sources share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..kept import digest_of
from .left_out import Kind

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "avif", "jxl")
CAPTION_ENDINGS = ("txt", "caption")  # the order in which they are looked for, where no trainer says another
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions", "texts", "prompts")
NOT_UTF8 = "its caption is not UTF-8"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Record:
    """One image: its relative name, its file's bytes, its caption, and how many times an epoch shows it.

    ``fault`` says why it is left out, ``kind`` in which way; ``notes`` what one should know of how its caption was read,
    in words that are the same for all images to which it happened. ``upright`` is False where the trainer does not
    turn an image as its EXIF data says.
    """

    name: str
    data: bytes = b""
    caption: str = ""
    repeats: int = 1
    fault: str = ""
    kind: Kind = "unreadable"
    notes: tuple[str, ...] = ()
    upright: bool = True


class Source(Protocol):
    @property
    def description(self) -> str:
        """What was found, and as what it is read, in a few words, without the path to it."""
        ...

    @property
    def identity(self) -> str:
        """Equal as long as the source, and how it is read, has not changed."""
        ...

    def count(self) -> int:
        """Records in all."""
        ...

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        """All records from this number on; with their captions only, where no ``images`` are wanted."""
        ...


def safe_name(name: str) -> str:
    """A relative name with '/' between its parts that leads nowhere else, on any system."""
    drive = re.sub(r"^[A-Za-z]:", "", cleaned(name).replace("\\", "/"))
    return (
        "/".join(part for part in PurePosixPath(drive.replace("\0", "")).parts if part not in ("/", "//", "..")) or "_"
    )


def decoded(data: bytes) -> tuple[str, str]:
    """(text of a caption file, a note where it is not UTF-8).

    Other text is UTF-16 where it says so, else Windows-1252.

    >>> decoded(b"caf\\xe9")
    ('café', 'its caption is not UTF-8: read as Windows-1252')
    """
    try:
        return data.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        called, encoding = ("UTF-16", "utf-16") if data.startswith(_UTF16) else ("Windows-1252", "cp1252")
        return data.decode(encoding, "replace"), f"{NOT_UTF8}: read as {called}"


def cleaned(text: str) -> str:
    """Without blanks around it, and without halves of characters, which no file could hold."""
    return text.strip().encode("utf-8", "replace").decode()


def stamp_of(file: Path) -> str:
    """Changes when a file does."""
    try:
        status = file.stat()
    except OSError:  # a link to nothing, which is told when it is read
        return "not there"
    return f"{status.st_size} {status.st_mtime_ns}"


def identity_of(files: Sequence[Path]) -> str:
    return digest_of(["\n".join(f"{f.name} {stamp_of(f)}" for f in files)], 32, "blake2b")
