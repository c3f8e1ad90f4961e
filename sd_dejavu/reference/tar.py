"""Training images in webdataset tars.

They are read with the standard library: members are never unpacked to disk, and nothing in a name is obeyed (the
webdataset package would run a name that begins with ``pipe:``).
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..kept.foreign import (
    CAPTION_BYTES,
    HEADER_BYTES,
    IMAGE_BYTES,
    Unreadable,
    check_caption,
    check_size,
    one_line,
    opened,
)
from .records import CAPTION_COLUMNS, CAPTION_ENDINGS, IMAGE_ENDINGS, Record, cleaned, decoded, identity_of, safe_name

_GZIP = b"\x1f\x8b"


@dataclass
class _Sample:
    """The members of one key. ``caption`` is read as it goes by, the image only where it is wanted."""

    key: str
    name: str = ""
    data: bytes = b""
    captions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    fault: str = ""

    @property
    def _ending(self) -> str:
        return next((e for e in (*CAPTION_ENDINGS, "json") if self.captions.get(e)), "")

    @property
    def caption(self) -> str:
        return self.captions.get(self._ending, "")

    @property
    def note(self) -> tuple[str, ...]:
        found = self.notes.get(self._ending)
        return (found,) if found else ()


@dataclass(frozen=True)
class TarSource:
    """Webdataset tars: files of one sample follow each other and share their name up to its first dot."""

    tars: tuple[Path, ...]

    @property
    def description(self) -> str:
        return f"{len(self.tars)} webdataset tar{'s' if len(self.tars) > 1 else ''}"

    @property
    def identity(self) -> str:
        return identity_of(self.tars)

    def count(self) -> int:
        return sum(1 for tar in self.tars for _ in _samples(tar, None))

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        for tar in self.tars:
            number = -1
            for number, sample in enumerate(_samples(tar, start, images)):
                if number >= start:
                    name = safe_name(f"{tar.name}/{sample.name or sample.key}")
                    yield Record(name, sample.data, sample.caption, fault=sample.fault, notes=sample.note)
            start = max(0, start - number - 1)


def _samples(path: Path, start: int | None, images: bool = True) -> Iterator[_Sample]:
    """The samples with an image; what is in them is read from the number ``start`` on, of none for None.

    A tar that breaks off ends in a sample that says so.
    """
    number, sample = 0, None
    try:
        with opened(path) as file, _unpacked(file) as stream:
            headers = _Headers(stream)
            tar: Any = tarfile.TarFile(fileobj=headers)  # type: ignore[arg-type]
            while (member := _next(tar)) is not None:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not member.isreg() or not stem or not ending:
                    continue
                key, ending = f"{folder}/{stem}", ending.lower()
                if sample is None or key != sample.key:
                    if sample is not None and sample.name:
                        yield sample
                        number += 1
                    sample = _Sample(key)
                wanted = start is not None and number >= start
                try:
                    if ending in IMAGE_ENDINGS and not sample.name:
                        sample.name = member.name
                        if images and wanted:
                            sample.data = _contents(stream, member, IMAGE_BYTES)
                    elif ending in (*CAPTION_ENDINGS, "json") and wanted:
                        text, sample.notes[ending] = decoded(_contents(stream, member, CAPTION_BYTES))
                        sample.captions[ending] = check_caption(
                            _json_caption(text) if ending == "json" else cleaned(text)
                        )
                except Unreadable as error:
                    sample.fault = f"{safe_name(base)}: {error}"
            if headers.last.strip(b"\0"):  # the library takes a broken header for the end
                raise tarfile.ReadError(f"broken header at byte {tar.offset}")
    except Exception as error:  # the library raises many types for broken bytes
        # The sample at hand goes with it, so that a count and a reading come to the same number.
        place = "" if sample is None else sample.key
        yield _Sample(place, fault=f"the tar cannot be read from here on: {one_line(error)}")
        return
    if sample is not None and sample.name:
        yield sample


def _unpacked(file: BinaryIO) -> BinaryIO:
    """What is in a gzip file; any other file as it is."""
    packed = file.read(len(_GZIP)) == _GZIP
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[return-value]


class _Headers:
    """What the library reads of a tar: its headers, which can say that they are of any size. ``last`` is the last."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell
        self.last = b""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self._stream.read(size)
        return self.last


def _next(tar: Any) -> tarfile.TarInfo | None:
    """The next member. Raises ReadError where it does not lie behind the one before, as a negative size makes it."""
    before = -1 if tar.firstmember is not None else tar.offset
    member: tarfile.TarInfo | None = tar.next()
    tar.members.clear()  # the list of all members would fill the memory
    if member is not None and tar.offset <= before:
        raise tarfile.ReadError(f"broken header at byte {before}")
    return member


def _contents(stream: BinaryIO, member: tarfile.TarInfo, most: int) -> bytes:
    """Raises Unreadable for a member that is not read, ReadError where the tar ends in it."""
    if member.issparse():
        raise Unreadable("a sparse file, which is not read")
    check_size(member.size, most)
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _json_caption(text: str) -> str:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    return next((cleaned(values[k]) for k in CAPTION_COLUMNS if isinstance(values.get(k), str)), "")
