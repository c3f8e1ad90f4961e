"""Which images of a training set were left out, and what is to be known of those that were read, in short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

Kind = Literal[
    "unreadable", "format", "mask", "condition", "beside", "unlisted", "unnamed", "regularisation", "validation"
]
_WORDS: dict[str, tuple[str, str]] = {
    "unreadable": ("image that could not be read", "images that could not be read"),
    "format": ("image in a format that is not read", "images in formats that are not read"),
    "mask": ("mask", "masks"),
    "condition": ("condition image", "condition images"),
    "beside": ("image beside the numbered folders", "images beside the numbered folders"),
    "unlisted": ("image that the list of captions does not name", "images that the list of captions does not name"),
    "unnamed": ("image that the configuration does not name", "images that the configuration does not name"),
    "regularisation": ("regularisation image", "regularisation images"),
    "validation": ("image for validation", "images for validation"),
}


def in_short(skipped: Iterable[Mapping[str, str]]) -> str:
    """What was left out, by its kind, in the order of the kinds; empty where nothing was.

    >>> in_short([{"kind": "mask"}, {"kind": "beside"}, {"kind": "mask"}])
    'Left out: 2 masks, 1 image beside the numbered folders'
    """
    counts = Counter(one.get("kind", "unreadable") for one in skipped)
    told = [f"{counts[kind]:,} {words[counts[kind] > 1]}" for kind, words in _WORDS.items() if counts[kind]]
    return f"Left out: {', '.join(told)}" if told else ""


def notes_in_short(notes: Iterable[Mapping[str, str]]) -> list[str]:
    """How captions were read where one should know it, each way once, the most frequent first.

    >>> notes_in_short([{"name": "a.png", "note": "only the first line of its caption is read"}])
    ['1 image: only the first line of its caption is read']
    """
    counts = Counter(one["note"] for one in notes)
    return [f"{count:,} image{'s' if count > 1 else ''}: {note}" for note, count in counts.most_common()]
