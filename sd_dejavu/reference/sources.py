"""Where the images of a reference set come from: a folder, webdataset tars, or Parquet files.

A source gives its records one after the other, always in the same order, and can begin anywhere in it, so that a
build that was stopped goes on where it stood. What cannot be read is a record too, with the reason.

Tars are read with the standard library: members are never unpacked to disk, and nothing in a name is obeyed (the
webdataset package would run a name that begins with ``pipe:``). What is read at most of a file, a member and a row is
said in :mod:`sd_dejavu.kept.foreign`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from ..kept import digest_of
from ..kept.foreign import (
    CAPTION_BYTES,
    HEADER_BYTES,
    IMAGE_BYTES,
    REPEATS,
    ROWS,
    Unreadable,
    check_caption,
    check_size,
    contents,
    one_line,
    opened,
)

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
CAPTION_ENDINGS = ("txt", "caption")  # the order in which they are looked for
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions", "texts", "prompts")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img", "image_bytes", "bytes")
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_KOHYA = re.compile(r"(\d+)_")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Record:
    """One image: its relative name, its file's bytes (or why they cannot be had), caption, times shown an epoch."""

    name: str
    data: bytes = b""
    caption: str = ""
    repeats: int = 1
    fault: str = ""


class Source(Protocol):
    @property
    def description(self) -> str:
        """What was found, in a few words, without the path to it."""
        ...

    @property
    def identity(self) -> str:
        """Equal as long as the source has not changed."""
        ...

    def count(self) -> int:
        """Records in all."""
        ...

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        """All records from this number on; with their captions only, where no ``images`` are wanted."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names of a Parquet file's columns; None finds them by their usual names."""

    image: str | None = None
    caption: str | None = None


def open_source(path: Path, columns: Columns = Columns(), kohya_repeats: bool = True) -> Source:
    """The source at ``path``. Raises ValueError with a sentence where there is nothing to read."""
    if path.is_file():
        if path.name.lower().endswith(_TAR_ENDINGS):
            return TarSource((path,))
        if path.suffix.lower() == ".parquet":
            return ParquetSource((path,), columns)
        raise ValueError(f"{path} is neither a folder, nor a .tar, nor a .parquet file")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device: name a folder, or a .tar or .parquet file")
    if not path.is_dir():
        raise ValueError(f"there is no folder or file {path}")
    images, archives, tables = _walk(path)
    kinds = {f"{len(images)} images": images, f"{len(archives)} tars": archives, f"{len(tables)} Parquet": tables}
    found = [text for text, files in kinds.items() if files]
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(found)} files: name the folder or file that holds one kind only")
    if archives:
        return TarSource(tuple(archives))
    if tables:
        return ParquetSource(tuple(tables), columns)
    if not images:
        raise ValueError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)}), tars or Parquet files")
    return FolderSource(path, tuple(images), kohya_repeats)


def _walk(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(images, tars, Parquet files) below a folder, each in the order of their relative names; no hidden ones."""
    found: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            low = name.lower()
            if name.startswith("."):
                continue
            if low.rpartition(".")[2] in IMAGE_ENDINGS:
                found[0].append(Path(place, name))
            elif low.endswith(_TAR_ENDINGS):
                found[1].append(Path(place, name))
            elif low.endswith(".parquet"):
                found[2].append(Path(place, name))
    for kind in found:
        kind.sort(key=lambda file: file.relative_to(folder).as_posix())
    return found


# ------------------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class FolderSource:
    """Images with their captions beside them: ``cat.png`` and ``cat.txt`` (or ``cat.caption``).

    Where no image lies in the folder itself and every folder with images is below one named like ``10_cat``, as
    kohya's trainer wants it, the number says how many times an epoch shows each image. Raises ValueError where that
    is no number of times to show one.
    """

    folder: Path
    images: tuple[Path, ...]
    kohya_repeats: bool = True

    def __post_init__(self) -> None:
        for image in self.images:
            self._repeats(image)

    @property
    def description(self) -> str:
        repeated = ", repeated as their folders' names say" if self._kohya else ""
        return f"{len(self.images)} images of a folder{repeated}"

    @property
    def identity(self) -> str:
        files = (file for image in self.images for file in (image, _caption_file(image)) if file)
        stamps = (f"{self._name(file)}\0{_stamp(file)}\n" for file in files)
        return digest_of(chain([str(self._kohya)], stamps), 32, "blake2b")

    def count(self) -> int:
        return len(self.images)

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        for image in self.images[start:]:
            name = safe_name(self._name(image))
            try:
                caption = _caption_file(image)
                text = check_caption(decoded(contents(caption, CAPTION_BYTES))) if caption else ""
                data = contents(image, IMAGE_BYTES) if images else b""
                yield Record(name, data, text, self._repeats(image))
            except Unreadable as error:
                yield Record(name, fault=str(error))

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    @cached_property
    def _kohya(self) -> bool:
        return self.kohya_repeats and all(
            "/" in self._name(p) and _KOHYA.match(self._name(p)) is not None for p in self.images
        )

    def _repeats(self, image: Path) -> int:
        found = _KOHYA.match(self._name(image)) if self._kohya else None
        repeats = max(1, int(found[1])) if found else 1
        if repeats > REPEATS:
            raise ValueError(
                f"the name of the folder {self._name(image).partition('/')[0]} asks for more than {REPEATS:,} repeats "
                "an epoch: rename it"
            )
        return repeats


def _caption_file(image: Path) -> Path | None:
    return next((f for f in (image.with_suffix(f".{e}") for e in CAPTION_ENDINGS) if f.is_file()), None)


# ---------------------------------------------------------------------------------------------------- tar


@dataclass
class _Sample:
    """The members of one key. ``caption`` is read as it goes by, the image only where it is wanted."""

    key: str
    name: str = ""
    data: bytes = b""
    captions: dict[str, str] = field(default_factory=dict)
    fault: str = ""

    @property
    def caption(self) -> str:
        return next((self.captions[e] for e in (*CAPTION_ENDINGS, "json") if self.captions.get(e)), "")


@dataclass(frozen=True)
class TarSource:
    """Webdataset tars: files of one sample follow each other and share their name up to its first dot."""

    tars: tuple[Path, ...]

    @property
    def description(self) -> str:
        return f"{len(self.tars)} webdataset tar{'s' if len(self.tars) > 1 else ''}"

    @property
    def identity(self) -> str:
        return _identity(self.tars)

    def count(self) -> int:
        return sum(1 for tar in self.tars for _ in _samples(tar, None))

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        for tar in self.tars:
            number = -1
            for number, sample in enumerate(_samples(tar, start, images)):
                if number >= start:
                    name = safe_name(f"{tar.name}/{sample.name or sample.key}")
                    yield Record(name, sample.data, sample.caption, fault=sample.fault)
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
                        text = decoded(_contents(stream, member, CAPTION_BYTES))
                        sample.captions[ending] = check_caption(_json_caption(text) if ending == "json" else text)
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


# ------------------------------------------------------------------------------------------------ Parquet


@dataclass(frozen=True)
class ParquetSource:
    """Rows with an image's bytes (a binary column, or a struct with ``bytes``) and a caption.

    A file that cannot be read is one record that says so. Raises ValueError where none of them can, or one lacks a column.
    """

    files: tuple[Path, ...]
    columns: Columns = Columns()

    def __post_init__(self) -> None:
        faults = [_looked_at(file)[1] for file in self.files]
        if all(faults):
            raise ValueError(f"{self.files[0].name}: {faults[0]}")
        for file, fault in zip(self.files, faults, strict=True):
            if not fault:
                self._chosen(file)

    @property
    def description(self) -> str:
        return f"{len(self.files)} Parquet file{'s' if len(self.files) > 1 else ''}"

    @property
    def identity(self) -> str:
        return _identity(self.files) + repr(self.columns)

    def count(self) -> int:
        return sum(_looked_at(file)[0] for file in self.files)

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        for path in self.files:
            rows, fault = _looked_at(path)
            if start < rows and fault:
                yield Record(safe_name(path.name), fault=fault)
            elif start < rows:
                yield from self._of_file(path, start, images)
            start = max(0, start - rows)

    def _of_file(self, path: Path, start: int, images: bool) -> Iterator[Record]:
        image, caption = self._chosen(path)
        columns = [name for name in (image if images or caption is None else None, caption) if name is not None]
        row = 0
        with parquet_file(path) as file:
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if end > start:
                    for values in _of_group(file, group, columns, end - row):
                        if row >= start:
                            name = safe_name(f"{path.name}/row-{row}")
                            yield _record(name, values, image if images else None, caption)
                        row += 1
                row = end

    def _chosen(self, path: Path) -> tuple[str, str | None]:
        """The columns of the image and of the caption; there need be no caption."""
        with parquet_file(path) as file:
            names = file.schema_arrow.names
        image = column_of(names, self.columns.image, IMAGE_COLUMNS)
        caption = column_of(names, self.columns.caption, CAPTION_COLUMNS)
        shown = ", ".join(repr(name) for name in names[:12]) or "none"
        if image is None:
            wanted = repr(self.columns.image or IMAGE_COLUMNS[0])
            raise ValueError(f"{path.name}: no column {wanted} among {shown}: name the column that holds the images")
        if caption is None and self.columns.caption is not None:
            raise ValueError(
                f"{path.name}: no column {self.columns.caption!r} among {shown}: name the column that holds the captions"
            )
        return image, caption


def _of_group(file: Any, group: int, columns: list[str], rows: int) -> Iterator[dict[str, Any] | str]:
    """The rows of one group as dictionaries, or a sentence for each that cannot be had.

    One by one: a file of some kilobytes can hold the same 100 MB in every row.
    """
    given = 0
    fault = "the file holds no such row"
    try:
        for batch in file.iter_batches(1, row_groups=[group], columns=columns):
            given += 1
            yield _values(batch)
    except Exception as error:  # the library raises many types for broken bytes
        fault = f"the row cannot be read: {one_line(error)}"
    for _ in range(rows - given):
        yield fault


def _values(row: Any) -> dict[str, Any] | str:
    """The values of a batch of one row."""
    try:
        values: dict[str, Any]
        (values,) = row.to_pylist()
        return values
    except Exception as error:  # text that is not UTF-8
        return f"the row cannot be read: {one_line(error)}"


def _record(name: str, values: dict[str, Any] | str, image: str | None, caption: str | None) -> Record:
    if isinstance(values, str):
        return Record(name, fault=values)
    data, text = values[image] if image else b"", values.get(caption or "")
    if isinstance(data, dict):
        data = data.get("bytes")
    if not isinstance(data, bytes):
        return Record(name, fault="the row holds no bytes of an image")
    if isinstance(text, list):
        text = next(iter(text), "")
    try:
        check_size(len(data), IMAGE_BYTES)
        return Record(name, data, check_caption(cleaned(text) if isinstance(text, str) else ""))
    except Unreadable as error:
        return Record(name, fault=str(error))


def _looked_at(path: Path) -> tuple[int, str]:
    """(records that a file makes, why it cannot be read): its rows and '', or 1 and a sentence."""
    try:
        with parquet_file(path) as file:
            rows = sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    except Unreadable as error:
        return 1, str(error)
    if not 0 <= rows <= ROWS:
        return 1, f"it says that it holds {rows:,} rows, and at most {ROWS:,} are read"
    return rows, ""


def parquet_file(path: Path) -> Any:
    """A file of the library's, to be closed. Raises Unreadable, and ValueError where the package is not installed."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path.name}: reading Parquet files needs pyarrow: pip install pyarrow") from error
    opened(path).close()  # or the library would wait for a pipe
    try:
        file = pq.ParquetFile(path)
        _ = file.schema_arrow  # a schema can be broken too
        return file
    except Exception as error:  # the library raises many types for broken bytes
        raise Unreadable(f"not a sound Parquet file ({one_line(error)})") from error


def column_of(names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The name among ``names`` that is wanted, or else the first usual one, exactly or in other letter case."""
    if wanted in names:
        return wanted
    by_folded = {name.strip().casefold(): name for name in reversed(names)}
    candidates = usual if wanted is None else (wanted.casefold(),)
    return next((by_folded[name] for name in candidates if name in by_folded), None)


# ----------------------------------------------------------------------------------------- what they share


def safe_name(name: str) -> str:
    """A relative name with '/' between its parts that leads nowhere else, on any system."""
    drive = re.sub(r"^[A-Za-z]:", "", cleaned(name).replace("\\", "/"))
    return (
        "/".join(part for part in PurePosixPath(drive.replace("\0", "")).parts if part not in ("/", "//", "..")) or "_"
    )


def decoded(data: bytes) -> str:
    """Text of a caption file; what is not UTF-8 becomes the replacement character."""
    return cleaned(data.decode("utf-8-sig", "replace"))


def cleaned(text: str) -> str:
    """Without blanks around it, and without halves of characters, which no file could hold."""
    return text.strip().encode("utf-8", "replace").decode()


def _stamp(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:  # a link to nothing, which is told when it is read
        return "not there"
    return f"{status.st_size} {status.st_mtime_ns}"


def _identity(files: Sequence[Path]) -> str:
    return digest_of(["\n".join(f"{f.name} {_stamp(f)}" for f in files)], 32, "blake2b")
