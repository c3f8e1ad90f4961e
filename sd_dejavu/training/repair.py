"""Repair: from a LoRA that copies its training set, one that does not, and what that costs in likeness.

The captions that the LoRA brings back most (by the gain of :mod:`sd_dejavu.training.audit`) are drawn as users draw them,
each once, and counted as copies where they come out as a training image of theirs. Ordinary prompts are drawn without
guidance, and tell how much of the way from the base model's style to the training set's is kept
(:mod:`sd_dejavu.training.likeness`). Both are asked of the LoRA as it is, and of it with more and more held back in
several ways (:mod:`sd_dejavu.training.spectral`): the whole course is the finding, and its best point is what is written.
As that was chosen on these very images, it is measured once more, beside the LoRA as it was, from other noises.

What is drawn and measured is kept (:mod:`sd_dejavu.training.ledger`) until the new LoRA is written, so a repair that was
stopped goes on where it stood.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.settings import Checked, option
from ..kept import file_digest, write_bytes, write_tensors
from ..kept.foreign import Unreadable, one_line
from ..reference.build import embed
from ..reference.features import Features
from ..reference.images import open_image, to_tensor
from ..reference.nearest import threshold_of
from ..reference.reference_set import ReferenceSet
from ..run.measure import Measurement
from .audit import BASE, OTHERS, Subject, gains, identity
from .ledger import Ledger, Progress
from .likeness import distance, likeness, style, style_of
from .lora_files import Contents, read
from .spectral import WAYS, Place, Update, Way
from .tasks import Chosen, Engine, Task, Trained, Variant, Work, one_process

KEPT: Mapping[Way, Sequence[float]] = {
    "strength": (0.8, 0.65, 0.5),
    "text layers": (0.5, 0.25, 0.0),
    "base-anchored": (0.5, 0.25, 0.125),
}
FEWEST_ORDINARY = 4  # prompts that tell a style
NOTE = "dejavu_repair"  # in the metadata of what is written
_NAME = re.compile(r"[\w][\w .()-]{0,99}")  # of a new file, where a page or a client gives it
_OTHER_NOISES, _SEEDS = 10_000, 2**63  # added to the seed where the chosen one is measured again, which is below
# What trainers and hosts note of the file's own bytes: by these a host would take the new file for the old one.
_OF_THE_BYTES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_LONGEST = 200  # bytes of a new file's name
_A_PIECE = 100  # captions that are measured before they are kept, a multiple of 25

Asked = Callable[[Sequence[Task], Progress], list[list[dict[str, Any]]]]  # the values of each task's prompts


@dataclass(frozen=True)
class RepairSettings(Checked):
    """How a LoRA is repaired, apart from how an image is drawn."""

    way: str = option(
        "all", "what is held back: all tries each way, and takes the best point of all", choices=("all", *WAYS)
    )
    most_copies: float = option(0.1, "share of the images that may still be copies", minimum=0, maximum=1)
    captions: int = option(8, "captions that are drawn, those that the LoRA brings back most", minimum=1, maximum=1000)
    ordinary: int = option(
        24, "ordinary prompts that are drawn to tell the style", minimum=FEWEST_ORDINARY, maximum=1000
    )


@dataclass(frozen=True)
class Point:
    """A LoRA of which a way kept so much: ``copies`` of ``drawn`` images, and its likeness (None: the LoRA has none).

    ``elsewhere`` is the share of the ordinary prompts' images that are copies of any training image.
    """

    way: Way
    kept: float
    copies: int
    drawn: int
    likeness: float | None
    elsewhere: float = 0.0

    @property
    def share(self) -> float:
        return self.copies / self.drawn


@dataclass(frozen=True)
class Repaired:
    """The finding. ``curve`` begins with the LoRA as it is; ``before`` and ``after`` are from other noises than it."""

    curve: tuple[Point, ...]
    before: Point
    after: Point
    most_copies: float

    @property
    def reached(self) -> bool:
        return self.after.share <= self.most_copies

    def as_json(self) -> dict[str, Any]:
        return {
            "before": _row(self.before),
            "after": _row(self.after),
            "most_copies": self.most_copies,
            "reached": self.reached,
            "rows": [_row(point) for point in self.curve],
        }


def file_called(name: str) -> str:
    """The new LoRA's file, beside others. Raises ValueError for a name that would lead elsewhere.

    >>> file_called("mended")
    'mended.safetensors'
    """
    if not _NAME.fullmatch(name) or len(name.encode("utf-8", "replace")) > _LONGEST:
        raise ValueError(
            f"{name!r:.100} cannot be the new LoRA's name: take a short one of letters, digits, spaces, '-' and '_' alone"
        )
    return f"{name}.safetensors"


def best_of(points: Sequence[Point], most_copies: float) -> Point:
    """The one with most likeness of those with few enough copies; of equal ones the one that keeps most. Where none has,
    the one with fewest copies.

    >>> a, b = Point("strength", 0.8, 5, 10, 0.9), Point("strength", 0.5, 1, 10, 0.6)
    >>> best_of([a, b], 0.1).kept, best_of([a, b], 0.5).kept, best_of([a], 0.1).kept
    (0.5, 0.8, 0.8)
    """
    few = [point for point in points if point.share <= most_copies]
    if few:
        return max(few, key=lambda point: (point.likeness or 0.0, point.kept))
    return min(points, key=lambda point: (point.share, -(point.likeness or 0.0)))


def repair(
    subject: Subject,
    lora: Path,
    out: Path,
    ordinary: Sequence[str],
    load: Callable[[Variant], Trained],
    places: Callable[[Contents], tuple[Contents, Mapping[str, Place]]],
    work: Work,
    folder: Path,
    wanted: RepairSettings = RepairSettings(),
    engine: Engine = one_process,
    on_progress: Progress = lambda stage, done, total: None,
    **host: Any,
) -> Repaired:
    """Writes to ``out`` what is left of a LoRA, and says what it was and is.

    ``ordinary`` prompts are drawn for the style, but for the last two, which the training images are denoised with beside
    their captions. ``places`` tells of a file's contents, as the base model takes them, which weights they are for.
    ``subject`` must have images. What is finished is kept below ``folder`` until ``out`` is written; ``host`` says by
    names what the LoRA is measured on. Raises ValueError with a sentence for a file or a training set that cannot be used,
    and where ``out`` is there already; nothing is written to it then.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: name another file, or remove it")
    if out.suffix != ".safetensors":
        raise ValueError(f"the repaired LoRA must be called something.safetensors, not {out.name}")
    write_bytes(out, b"")  # where that fails, better now than after all the work
    out.unlink()
    try:
        contents, digest = read(lora), file_digest(lora)
    except Unreadable as error:
        raise ValueError(f"the LoRA {lora} cannot be repaired: {one_line(error)}") from error
    if len(ordinary) < FEWEST_ORDINARY + OTHERS:
        raise ValueError(
            f"{len(ordinary)} ordinary prompts are too few to tell a style by: give {FEWEST_ORDINARY + OTHERS} or more"
        )
    update = Update(*places(contents))
    ways = [way for way in WAYS if wanted.way in ("all", way) and update.acts(way)]
    if not ways:
        raise ValueError(f"{wanted.way!r} would leave all of this LoRA, or nothing of it: choose another way")
    ledgers: list[Ledger] = []

    def asking(measurement: Measurement) -> Asked:
        begun = identity(subject, ordinary, measurement, **host, lora=f"{lora.name} {digest}")
        ledger = Ledger.below(folder, begun, "a repair")
        ledgers.append(ledger)
        own = replace(work, wanted=measurement)

        def asked(tasks: Sequence[Task], told: Progress) -> list[list[dict[str, Any]]]:
            ledger.finish(tasks, "measuring the captions", load, own, engine, told)
            return [list(ledger.values([task])) for task in tasks]

        return asked

    seen = _Seen(subject, ordinary[:-OTHERS], asking, work.wanted)
    steps = [(way, kept) for way in ways for kept in KEPT[way]]
    metadata = {name: text for name, text in contents.metadata.items() if name not in _OF_THE_BYTES}
    total = len(steps) + 3  # and the base model, the LoRA as it was, and the last look
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        on_progress("repairing", done, total)

    whole = Variant(str(lora))
    seen.choose(whole, ordinary[-OTHERS:], wanted.captions, on_progress)
    on_progress("repairing", 0, total)
    seen.base()
    told()
    curve = [seen.point("strength", 1.0, whole)]
    told()
    # Windows does not give up a file that a host still has in memory: no reason to lose what was found.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as trials:

        @contextmanager
        def written(tensors: dict[str, Tensor], way: Way, kept: float) -> Iterator[Variant]:
            path = Path(trials) / f"{digest} {way} {kept:g}.safetensors"  # by which what was measured is found again
            write_tensors(path, tensors, metadata)  # trainers note alphas there
            yield Variant(str(path))
            with suppress(OSError):
                path.unlink()

        for way, kept in steps:
            if tensors := update.tensors(way, kept):  # of some LoRAs nothing would be left
                with written(tensors, way, kept) as variant:
                    curve.append(seen.point(way, kept, variant))
            told()
        best = best_of(curve, wanted.most_copies)
        left = update.tensors(best.way, best.kept)
        again = seen.from_other_noises()
        before = again.point("strength", 1.0, whole)
        with written(left, best.way, best.kept) as variant:
            after = again.point(best.way, best.kept, variant)
    found = Repaired(tuple(curve), before, after, wanted.most_copies)
    note = json.dumps({"of": lora.name, "before": _row(before), "after": _row(after)})
    write_tensors(out, left, {**metadata, NOTE: note})
    for ledger in ledgers:
        ledger.discard()
    told()
    return found


class _Seen:
    """What is drawn of a variant: copies of the captions chosen, and the style of ordinary prompts."""

    def __init__(
        self,
        subject: Subject,
        ordinary: Sequence[str],
        asking: Callable[[Measurement], Asked],
        measurement: Measurement,
    ) -> None:
        if subject.reference is None or subject.features is None:
            raise ValueError("a repair needs the training images: name their folder, or a reference set of them")
        self._reference: ReferenceSet = subject.reference
        self._features: Features = subject.features
        threshold = threshold_of(subject.reference)
        if threshold is None:
            raise ValueError(
                f"no threshold is known from which {subject.reference.features!r} features show a copy in a set of "
                f"{len(subject.reference):,} images: take grey or SSCD features"
            )
        self._threshold = threshold
        self._subject, self._ordinary = subject, tuple(ordinary)
        self._asking, self._measurement = asking, measurement
        self._asked = asking(measurement)
        self._chosen: dict[str, list[int]] = {}  # captions, and where their images are in the set
        self._side = max(open_image(bytes(self._reference.thumbnails[0])).size)
        self._training = style_of(self._reference)
        self._bare: float | None = None
        self._whole: float | None = None

    def choose(self, lora: Variant, others: Sequence[str], count: int, on_progress: Progress) -> None:
        """The captions with the highest gain over the base model, at most so many."""
        cases = [case for case in self._subject.cases if case.caption.strip() and case.row is not None]
        if not cases:
            raise ValueError(
                "the training set holds no captions, so there is nothing to draw: put a .txt beside each image"
            )

        def tasks(variant: Variant) -> list[Task]:
            found = []
            for first in range(0, len(cases), _A_PIECE):
                part = cases[first : first + _A_PIECE]
                images = Chosen(self._reference.thumbnails, [case.row for case in part if case.row is not None])
                prompts = tuple(case.caption for case in part)
                found.append(Task("captions", variant, first, prompts, images, others=tuple(others)))
            return found

        values = self._asked([task for variant in (lora, BASE) for task in tasks(variant)], on_progress)
        measured = [value.get("recovery") for part in values for value in part]
        own, base = measured[: len(cases)], measured[len(cases) :]
        known = [(gain, number) for number, gain in enumerate(gains(own, base)) if gain is not None]
        if not known:
            raise ValueError("none of the captions could be measured: they may be too long for the model")
        ranked = [cases[number].caption for _, number in sorted(known, key=lambda pair: (-pair[0], pair[1]))]
        self._chosen = {caption: [] for caption in list(dict.fromkeys(ranked))[:count]}
        for case in cases:
            if case.caption in self._chosen and case.row is not None:
                self._chosen[case.caption].append(case.row)

    def base(self) -> None:
        """The base model's distance, from which the likeness counts."""
        (values,) = self._asked([self._drawing(BASE)], _silent)
        self._bare = distance(style(_images_of(values)), self._training)

    def from_other_noises(self) -> _Seen:
        """The same captions and prompts, drawn anew."""
        seed = (self._measurement.seed + _OTHER_NOISES) % _SEEDS
        again = _Seen(self._subject, self._ordinary, self._asking, replace(self._measurement, seed=seed))
        again._chosen = self._chosen
        again.base()
        return again

    def point(self, way: Way, kept: float, variant: Variant) -> Point:
        """Of a variant; the first that is asked for is the LoRA as it is."""
        captions = Task("images", variant, 0, tuple(self._chosen))
        found, ordinary = self._asked([captions, self._drawing(variant)], _silent)
        copies, drawn = self._copies([one["images"] for one in found])
        images = _images_of(ordinary)
        there = distance(style(images), self._training)
        rows = embed(self._features, [image[None] for image in images])
        elsewhere = float((self._reference.search(rows, 1).similarity[:, 0] >= self._threshold).float().mean())
        self._whole = there if self._whole is None else self._whole
        assert self._bare is not None  # the base model comes first
        return Point(way, kept, copies, drawn, likeness(there, self._whole, self._bare), elsewhere)

    def _drawing(self, variant: Variant) -> Task:
        return Task("drawn", variant, 0, self._ordinary, side=self._side)

    def _copies(self, files: Sequence[Sequence[str]]) -> tuple[int, int]:
        """How many of each caption's images in base64 are copies of any of its training images, and of how many."""
        copies = drawn = 0
        for places, data in zip(self._chosen.values(), files, strict=True):
            if not data:
                continue
            rows = embed(self._features, [to_tensor(open_image(base64.b64decode(one))) for one in data])
            alike = [self._reference.similarity(rows, torch.full((len(rows),), place)) for place in places]
            own = torch.stack(alike).amax(0)
            copies, drawn = copies + int((own >= self._threshold).sum()), drawn + len(rows)
        if not drawn:
            raise ValueError("none of the captions could be drawn: the LoRA may break the model at this strength")
        return copies, drawn


def _silent(stage: str, done: int, total: int) -> None:
    """For what is one step of the whole."""


def _images_of(values: Sequence[dict[str, Any]]) -> list[Tensor]:
    """[3, H, W] each, of the ordinary prompts that could be drawn."""
    images = [to_tensor(open_image(base64.b64decode(value["image"])))[0] for value in values if "image" in value]
    if not images:
        raise ValueError("none of the ordinary prompts could be drawn: the LoRA may break the model")
    return images


def _row(point: Point) -> dict[str, Any]:
    return {
        "way": point.way,
        "kept": point.kept,
        "copies": point.copies,
        "drawn": point.drawn,
        "likeness": point.likeness,
        "elsewhere": point.elsewhere,
    }
