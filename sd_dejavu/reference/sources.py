"""Where the pictures of a reference set come from: a folder, webdataset tars, or Parquet files.

A source gives its records one after the other, always in the same order, and can begin anywhere in it, so that a
build that was stopped goes on where it stood. What cannot be read is a record too, with the reason.

Tars are read with the standard library: members are never unpacked to disk, and nothing in a name is obeyed (the
webdataset package would run a name that begins with ``pipe:``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
CAPTION_ENDINGS = ("txt", "caption")  # the order in which they are looked for
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions", "texts", "prompts")
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img", "image_bytes", "bytes")
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_KOHYA = re.compile(r"(\d+)_")
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Record:
    """One picture: its relative name, its file's bytes (or why they cannot be had), caption, times shown an epoch."""

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

    def records(self, start: int = 0, pictures: bool = True) -> Iterator[Record]:
        """All records from this number on; with their captions only, where no ``pictures`` are wanted."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names of a Parquet file's columns; None finds them by their usual names."""

    picture: str | None = None
    caption: str | None = None


def open_source(path: Path, columns: Columns = Columns(), kohya_repeats: bool = True) -> Source:
    """The source at ``path``. Raises ValueError with a sentence where there is nothing to read."""
    if path.is_file():
        if path.name.lower().endswith(_TAR_ENDINGS):
            return TarSource((path,))
        if path.suffix.lower() == ".parquet":
            return ParquetSource((path,), columns)
        raise ValueError(f"{path} is neither a folder, nor a .tar, nor a .parquet file")
    if not path.is_dir():
        raise ValueError(f"there is no folder or file {path}")
    pictures, archives, tables = _walk(path)
    kinds = {f"{len(pictures)} pictures": pictures, f"{len(archives)} tars": archives, f"{len(tables)} Parquet": tables}
    found = [text for text, files in kinds.items() if files]
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(found)} files: name the folder or file that holds one kind only")
    if archives:
        return TarSource(tuple(archives))
    if tables:
        return ParquetSource(tuple(tables), columns)
    if not pictures:
        raise ValueError(f"{path} holds no pictures ({', '.join(PICTURE_ENDINGS)}), tars or Parquet files")
    return FolderSource(path, tuple(pictures), kohya_repeats)


def _walk(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(pictures, tars, Parquet files) below a folder, each in the order of their relative names; no hidden ones."""
    found: tuple[list[Path], list[Path], list[Path]] = ([], [], [])
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            low = name.lower()
            if name.startswith("."):
                continue
            if low.rpartition(".")[2] in PICTURE_ENDINGS:
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
    """Pictures with their captions beside them: ``cat.png`` and ``cat.txt`` (or ``cat.caption``).

    Where no picture lies in the folder itself and every folder with pictures is below one named like ``10_cat``, as
    kohya's trainer wants it, the number says how many times an epoch shows each picture.
    """

    folder: Path
    pictures: tuple[Path, ...]
    kohya_repeats: bool = True

    @property
    def description(self) -> str:
        repeated = ", repeated as their folders' names say" if self._kohya else ""
        return f"{len(self.pictures)} pictures of a folder{repeated}"

    @property
    def identity(self) -> str:
        digest = hashlib.blake2b(str(self._kohya).encode(), digest_size=16)
        for picture in self.pictures:
            for file in filter(None, (picture, _caption_file(picture))):
                digest.update(f"{self._name(file)}\0{_stamp(file)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def count(self) -> int:
        return len(self.pictures)

    def records(self, start: int = 0, pictures: bool = True) -> Iterator[Record]:
        for picture in self.pictures[start:]:
            name = safe_name(self._name(picture))
            try:
                caption = _caption_file(picture)
                text = decoded(caption.read_bytes()) if caption else ""
                data = picture.read_bytes() if pictures else b""
                yield Record(name, data, text, self._repeats(picture))
            except OSError as error:
                yield Record(name, fault=f"cannot be read: {error.strerror}")

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    @cached_property
    def _kohya(self) -> bool:
        return self.kohya_repeats and all(
            "/" in self._name(p) and _KOHYA.match(self._name(p)) is not None for p in self.pictures
        )

    def _repeats(self, picture: Path) -> int:
        found = _KOHYA.match(self._name(picture)) if self._kohya else None
        return max(1, int(found[1])) if found else 1


def _caption_file(picture: Path) -> Path | None:
    return next((f for f in (picture.with_suffix(f".{e}") for e in CAPTION_ENDINGS) if f.is_file()), None)


# ---------------------------------------------------------------------------------------------------- tar


@dataclass
class _Sample:
    """The members of one key. ``caption`` is read as it goes by, the picture only where it is wanted."""

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

    def records(self, start: int = 0, pictures: bool = True) -> Iterator[Record]:
        for tar in self.tars:
            number = -1
            for number, sample in enumerate(_samples(tar, start, pictures)):
                if number >= start:
                    name = safe_name(f"{tar.name}/{sample.name or sample.key}")
                    yield Record(name, sample.data, sample.caption, fault=sample.fault)
            start = max(0, start - number - 1)


def _samples(path: Path, start: int | None, pictures: bool = True) -> Iterator[_Sample]:
    """The samples with a picture; what is in them is read from the number ``start`` on, of none for None.

    A tar that breaks off ends in a sample that says so.
    """
    number, sample = 0, None
    try:
        tar: Any
        with tarfile.open(path) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # the list of all members would fill the memory
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
                if ending in PICTURE_ENDINGS and not sample.name:
                    sample.name = member.name
                    if pictures and start is not None and number >= start:
                        sample.data = _contents(tar, member)
                elif ending in (*CAPTION_ENDINGS, "json") and start is not None and number >= start:
                    text = decoded(_contents(tar, member))
                    sample.captions[ending] = _json_caption(text) if ending == "json" else text
            _check_end(tar)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        # The sample at hand goes with it, so that a count and a reading come to the same number.
        place = "" if sample is None else sample.key
        yield _Sample(place, fault=f"the tar cannot be read from here on: {error}")
        return
    if sample is not None and sample.name:
        yield sample


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError where the headers end in anything but zeros: the library takes a broken one for the end."""
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"broken header at byte {tar.offset}")


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


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
    """Rows with a picture's bytes (a binary column, or a struct with ``bytes``) and a caption."""

    files: tuple[Path, ...]
    columns: Columns = Columns()

    def __post_init__(self) -> None:
        for file in self.files:
            self._chosen(file)

    @property
    def description(self) -> str:
        return f"{len(self.files)} Parquet file{'s' if len(self.files) > 1 else ''}"

    @property
    def identity(self) -> str:
        return _identity(self.files) + repr(self.columns)

    def count(self) -> int:
        return sum(_rows(file) for file in self.files)

    def records(self, start: int = 0, pictures: bool = True) -> Iterator[Record]:
        for path in self.files:
            rows = _rows(path)
            if start < rows:
                yield from self._of_file(path, start, pictures)
            start = max(0, start - rows)

    def _of_file(self, path: Path, start: int, pictures: bool) -> Iterator[Record]:
        picture, caption = self._chosen(path)
        columns = [name for name in (picture if pictures or caption is None else None, caption) if name is not None]
        row = 0
        with _parquet(path) as file:
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                if end > start:
                    for values in _of_group(file, group, columns, end - row):
                        if row >= start:
                            yield _record(f"{path.name}/row-{row}", values, picture if pictures else None, caption)
                        row += 1
                row = end

    def _chosen(self, path: Path) -> tuple[str, str | None]:
        """The columns of the picture and of the caption; there need be no caption."""
        with _parquet(path) as file:
            names = file.schema_arrow.names
        picture = _column(names, self.columns.picture, PICTURE_COLUMNS)
        caption = _column(names, self.columns.caption, CAPTION_COLUMNS)
        shown = ", ".join(repr(name) for name in names[:12]) or "none"
        if picture is None:
            wanted = repr(self.columns.picture or PICTURE_COLUMNS[0])
            raise ValueError(f"{path.name}: no column {wanted} among {shown}: name the column that holds the pictures")
        if caption is None and self.columns.caption is not None:
            raise ValueError(
                f"{path.name}: no column {self.columns.caption!r} among {shown}: name the column that holds the captions"
            )
        return picture, caption


def _of_group(file: Any, group: int, columns: list[str], rows: int) -> Iterator[dict[str, Any] | str]:
    """The rows of one group as dictionaries; where it breaks off, a sentence for each row that is left."""
    import pyarrow as pa

    given = 0
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            for values in batch.to_pylist():
                yield values
                given += 1
    except (pa.ArrowException, OSError) as error:
        yield from [f"the row cannot be read: {' '.join(str(error).split())}"] * (rows - given)


def _record(name: str, values: dict[str, Any] | str, picture: str | None, caption: str | None) -> Record:
    if isinstance(values, str):
        return Record(name, fault=values)
    data, text = values[picture] if picture else b"", values.get(caption or "")
    if isinstance(data, dict):
        data = data.get("bytes")
    if not isinstance(data, bytes):
        return Record(name, fault="the row holds no bytes of a picture")
    if isinstance(text, list):
        text = next(iter(text), "")
    return Record(name, data, cleaned(text) if isinstance(text, str) else "")


def _rows(path: Path) -> int:
    with _parquet(path) as file:
        return int(file.metadata.num_rows)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path.name}: reading Parquet files needs pyarrow: pip install pyarrow") from error
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path.name}: not a sound Parquet file ({' '.join(str(error).split())})") from error


def _column(names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    if wanted is not None:
        return wanted if wanted in names else None
    by_folded = {name.casefold(): name for name in reversed(names)}
    return next((by_folded[name] for name in usual if name in by_folded), None)


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
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _identity(files: Sequence[Path]) -> str:
    return hashlib.blake2b("\n".join(f"{f.name} {_stamp(f)}" for f in files).encode(), digest_size=16).hexdigest()
