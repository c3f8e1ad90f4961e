"""What a LoRA's file says of the data set that it was trained with, held against what was read.

kohya's trainer writes ``ss_dataset_dirs`` ({folder: {n_repeats, img_count}}), ``ss_num_train_images`` (images, as often as an
epoch shows them) and ``ss_tag_frequency`` ({folder: {tag in small letters: how often}}, counted before a prefix or a choice
is put in).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..kept.foreign import is_number
from ..reference.left_out import notes_in_short
from ..reference.reference_set import ReferenceSet

MOST = 6  # sentences
_TAGS_SHOWN = 3
_AGAIN = re.compile(r" \(\d+\)$")  # a folder that was given several times
_DRAWN = re.compile(r"[{}\n]")  # of tags among which the trainer draws
_MOST_TAGS = 2000  # of a folder, that are looked for


@dataclass(frozen=True)
class Shown:
    """An image that was read: its relative name, caption, and times an epoch shows it (None: other images are equal)."""

    name: str
    caption: str
    repeats: int | None = 1

    @property
    def folder(self) -> str:
        """The name of the folder it lies in; empty at the top."""
        return self.name.rpartition("/")[0].rpartition("/")[2]


def remarks(reference: ReferenceSet, loras: Sequence[Path]) -> tuple[str, ...]:
    """Sentences on a training set: as what it was read, how captions were, and what in the LoRAs' files does not fit."""
    source = reference.details.get("source")
    read = [f"Training set: {source}."] if source else []
    read += [f"{note}." for note in notes_in_short(reference.details.get("notes", ()))]
    total = int(reference.duplicates.sum())
    found = [sentence for lora in loras for sentence in misfits(_metadata(lora), shown(reference), total)]
    different = list(dict.fromkeys(found))
    more = [f"And {len(different) - MOST} more that do not fit."] if len(different) > MOST else []
    return (*read, *different[:MOST], *more)


def shown(reference: ReferenceSet) -> list[Shown]:
    """All images of a reference set, equal ones too."""
    copies = reference.details.get("copies", ())
    equal = {copy["of"] for copy in copies}
    found = [
        Shown(name, caption, None if name in equal else int(repeats))
        for name, caption, repeats in zip(reference.names, reference.captions, reference.duplicates, strict=True)
    ]
    return found + [Shown(copy["name"], copy["caption"], None) for copy in copies]


def misfits(metadata: Mapping[str, str], images: Sequence[Shown], total: int) -> list[str]:
    """What a LoRA's metadata says otherwise than what was read, a sentence each; ``total``: images an epoch shows.

    Nothing for a file that does not name its data set.

    >>> misfits({"ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 2}}'}, [Shown("10_cat/a.png", "cat", 10)], 10)
    ["The LoRA was trained with 2 images of the folder '10_cat', and 1 was read."]
    """
    trained = _folders(metadata)
    if not trained:
        return []
    read: dict[str, list[Shown]] = {}
    for image in images:
        read.setdefault(image.folder, []).append(image)
    if len(trained) == 1 and (set(read) == {""} or next(iter(trained)).endswith((".json", ".jsonl"))):
        read = {next(iter(trained)): list(images)}
    found = []
    frequencies = _dict(_json(metadata.get("ss_tag_frequency")))
    for folder, (count, repeats) in trained.items():
        here = read.get(folder, [])
        if not here:
            found.append(f"The LoRA was trained with a folder '{folder}', of which nothing was read.")
            continue
        if count != len(here):
            found.append(
                f"The LoRA was trained with {_images(count)} of the folder '{folder}', and {len(here):,} "
                f"{'was' if len(here) == 1 else 'were'} read."
            )
        known = Counter(image.repeats for image in here if image.repeats is not None)
        if known and repeats not in known:
            found.append(
                f"The LoRA was shown the folder '{folder}' {_times(repeats)} an epoch, and it was read as shown "
                f"{_times(known.most_common(1)[0][0])}."
            )
        if count == len(here):
            found += _tags(folder, _dict(frequencies.get(folder)), here)
    found += [
        f"The folder '{name}' was read, and the LoRA was not trained with it." for name in read if name not in trained
    ]
    count = _json(metadata.get("ss_num_train_images"))
    if not found and is_number(count) and int(count) != total:
        found.append(f"The LoRA was shown {int(count):,} images an epoch, and {total:,} were read.")
    return found


def _tags(folder: str, counted: Mapping[str, Any], here: Sequence[Shown]) -> list[str]:
    """Tags that its trainer counted more often than they stand in the captions, and tags that it never counted."""
    text = "\n".join(image.caption.lower() for image in here)
    usable = {tag: int(value) for tag, value in counted.items() if is_number(value) and "|" not in tag}
    counts = dict(Counter(usable).most_common(_MOST_TAGS))
    if not text.strip() or not counts or any(_DRAWN.search(tag) for tag in counted):
        return []
    fewer = {tag: times for tag, times in counts.items() if text.count(tag) < times}
    tags = Counter(tag.strip() for caption in text.split("\n") for tag in caption.split(",") if tag.strip())
    all_known = len(usable) == len(counts) and len(tags) <= _MOST_TAGS
    new = [tag for tag in tags if not any(known in tag for known in counts)] if all_known else []
    found = []
    if fewer:
        told = [f"'{tag}' {_times(fewer[tag])} there, {text.count(tag):,} here" for tag in _first(fewer)]
        found.append(f"Captions of the folder '{folder}' have changed since: {'; '.join(told)}.")
    if new and not fewer:
        told = [f"'{tag}'" for tag in new[:_TAGS_SHOWN]]
        found.append(f"Captions of the folder '{folder}' have changed since: the LoRA never saw {', '.join(told)}.")
    return found


def _first(counts: Mapping[str, int]) -> list[str]:
    return sorted(counts, key=lambda tag: -counts[tag])[:_TAGS_SHOWN]


def _folders(metadata: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """(images, times an epoch shows each) of every folder."""
    found: dict[str, tuple[int, int]] = {}
    for name, about in _dict(_json(metadata.get("ss_dataset_dirs"))).items():
        count, repeats = (_dict(about).get(key) for key in ("img_count", "n_repeats"))
        if is_number(count) and is_number(repeats):
            folder = _AGAIN.sub("", name)
            before = found.get(folder, (0, 0))[1] if folder != name else 0
            found[folder] = (int(count or 0), before + int(repeats or 0))
    return found


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _times(count: int | None) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _metadata(path: Path) -> Mapping[str, str]:
    """Of a file that is no more than read: nothing where it is no .safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
