"""Training images in Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kept.foreign import IMAGE_BYTES, ROWS, Unreadable, check_caption, check_size, one_line, opened
from .reading import Reading
from .records import CAPTION_COLUMNS, Record, cleaned, identity_of, safe_name

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img", "image_bytes", "bytes")


@dataclass(frozen=True)
class ParquetSource:
    """Rows with an image's bytes (a binary column, or a struct with ``bytes``) and a caption.

    A file that cannot be read is one record that says so. Raises ValueError where none of them can, or one lacks a column.
    With ``captions_alone`` no images are needed, and none are read.
    """

    files: tuple[Path, ...]
    reading: Reading = Reading()
    captions_alone: bool = False

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
        image, caption = self.reading.image_column or None, self.reading.caption_column or None
        return f"{identity_of(self.files)}Columns({image=!r}, {caption=!r})"  # the same as in release 0.1

    def count(self) -> int:
        return sum(_looked_at(file)[0] for file in self.files)

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        images = images and not self.captions_alone
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

    def _chosen(self, path: Path) -> tuple[str | None, str | None]:
        """The columns of the image and of the caption; there need be only one of them, that which is asked for."""
        with parquet_file(path) as file:
            names = file.schema_arrow.names
        image = column_of(names, self.reading.image_column or None, IMAGE_COLUMNS)
        caption = column_of(names, self.reading.caption_column or None, CAPTION_COLUMNS)
        shown = ", ".join(repr(name) for name in names[:12]) or "none"
        if image is None and not self.captions_alone:
            wanted = repr(self.reading.image_column or IMAGE_COLUMNS[0])
            raise ValueError(f"{path.name}: no column {wanted} among {shown}: name the column that holds the images")
        if caption is None and (self.captions_alone or self.reading.caption_column):
            wanted = repr(self.reading.caption_column or CAPTION_COLUMNS[0])
            raise ValueError(f"{path.name}: no column {wanted} among {shown}: name the column that holds the captions")
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


def without_images(files: Sequence[Path], reading: Reading = Reading()) -> bool:
    """Whether none of these files that can be read has a column of images."""
    return not reading.image_column and not any(_image_column(file) for file in files if not _looked_at(file)[1])


def _image_column(path: Path) -> str | None:
    with parquet_file(path) as file:
        return column_of(file.schema_arrow.names, None, IMAGE_COLUMNS)


def column_of(names: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The name among ``names`` that is wanted, or else the first usual one, exactly or in other letter case."""
    if wanted in names:
        return wanted
    by_folded = {name.strip().casefold(): name for name in reversed(names)}
    candidates = usual if wanted is None else (wanted.casefold(),)
    return next((by_folded[name] for name in candidates if name in by_folded), None)
