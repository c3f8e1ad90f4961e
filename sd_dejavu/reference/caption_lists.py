"""Captions in one list for a whole folder: diffusers' ``metadata.jsonl`` and ``.csv``, kohya's ``meta_*.json``."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..kept.foreign import CAPTION_CHARACTERS, TEXT_BYTES, Unreadable, contents, one_line
from .records import CAPTION_COLUMNS, cleaned, stamp_of

FILE_NAME = "file_name"
_ITS_CAPTION = ("text", *CAPTION_COLUMNS)  # diffusers' scripts ask for 'text'


@dataclass(frozen=True)
class CaptionList:
    """``captions`` and ``tags`` by an image's name in the list; ``stamp`` changes when the list does."""

    name: str
    stamp: str
    captions: Mapping[str, str] = field(repr=False)
    tags: Mapping[str, str] = field(repr=False, default_factory=dict)

    def text_of(self, image: str, separator: str, each_line: bool) -> str | None:
        """Caption and tags of an image by its relative name, joined as kohya's trainer does; None for one not in it.

        ``each_line``: the tags follow each line of the caption.
        """
        key = self._key(image)
        if key is None:
            return None
        caption, tags = self.captions[key], self.tags.get(key, "")
        if not tags:
            return caption
        if each_line:
            tags = tags.replace("\n", separator)
            return "\n".join(f"{line}{separator}{tags}" for line in caption.split("\n") if line.strip())
        return f"{caption}{separator if caption else ''}{tags}"

    def _key(self, image: str) -> str | None:
        """By its name with or without its ending, or the end of a longer path."""
        names = (image, image.rpartition(".")[0])
        in_full = (name for name in names if name in self.captions)
        return next(in_full, None) or next((self._by_end[name] for name in names if self._by_end.get(name)), None)

    @cached_property
    def _by_end(self) -> Mapping[str, str]:
        """The keys by the ends of their paths; empty where two share one."""
        found: dict[str, str] = {}
        for key in self.captions:
            parts = key.split("/")
            for start in range(max(1, len(parts) - 3), len(parts)):
                end = "/".join(parts[start:])
                found[end] = "" if end in found else key
        return found


def diffusers_list(folder: Path, files: Sequence[str], column: str) -> CaptionList:
    """One list of all those that lie in a folder and below it (their relative names); the nearest to an image counts.

    Raises ValueError with a sentence where one cannot be read.
    """
    captions: dict[str, str] = {}
    for file in sorted(files, key=lambda name: name.count("/")):
        for number, row in enumerate(_rows(folder / file, file), 1):
            named = row.get(FILE_NAME)
            if not isinstance(named, str):
                raise ValueError(f"{file}, entry {number}: it has no {FILE_NAME}, which says whose caption it is")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(file), named.replace("\\", "/")))
            captions[place] = _caption(row, column, file, number)
    return CaptionList(", ".join(files), " ".join(stamp_of(folder / file) for file in files), captions)


def _caption(row: Mapping[str, Any], column: str, file: str, number: int) -> str:
    if column:
        if column not in row:
            raise ValueError(f"{file}, entry {number}: no {column!r}: name the key that holds the captions")
        return _text(row[column])
    keys = (*_ITS_CAPTION, *(key for key in row if key != FILE_NAME))
    return next((_text(row[key]) for key in keys if isinstance(row.get(key), str)), "")


def _rows(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    text = _contents(path, name)
    if name.lower().endswith(".csv"):
        try:
            yield from csv.DictReader(io.StringIO(text))
        except csv.Error as error:
            raise ValueError(f"{name}: not valid CSV: {one_line(error)}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _json(line, f"{name}, line {number}")
            if not isinstance(row, dict):
                raise ValueError(f"{name}, line {number}: not an entry {{...}}")
            yield row


def kohya_list(path: Path, name: str) -> CaptionList:
    """kohya's own form, {image: {caption, tags}}, or its lines {image_path, caption, tags}. Raises ValueError."""
    if name.lower().endswith(".jsonl"):
        found = {str(row.get("image_path", "")): row for row in _rows(path, name)}
    else:
        found = _json(_contents(path, name), name)
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f"{name}: no list of captions in kohya's form, {{image: {{caption, tags}}}}")
    entries = {posixpath.normpath(key.replace("\\", "/")): entry for key, entry in found.items()}
    return CaptionList(
        name,
        stamp_of(path),
        {key: _text(entry.get("caption")) for key, entry in entries.items()},
        {key: _text(entry.get("tags")) for key, entry in entries.items()},
    )


def _contents(path: Path, name: str) -> str:
    try:
        return contents(path, TEXT_BYTES).decode("utf-8-sig")
    except Unreadable as error:
        raise ValueError(f"{name}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: save it as UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {one_line(error)}") from error


def _text(value: object) -> str:
    """Empty for what is no text. Cut where it is longer than a caption can be: the reader then says so."""
    return cleaned(value[: CAPTION_CHARACTERS + 1]) if isinstance(value, str) else ""
