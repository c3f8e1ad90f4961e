"""Audit: which captions of a training set bring their images back, for the makers of checkpoints and LoRAs.

Where the training images are at hand, each is noised and denoised with its caption and with ordinary prompts
(:mod:`sd_dejavu.training.recovery`): what counts is how much of the error the caption takes away, and with a LoRA, or
where the base model of a checkpoint is named, the gain over the base model. Where there are captions alone, an image that
the model draws of each, without guidance, stands in for its training image: of a memorised caption that is the training
image. How far each caption moves the prediction at the first step (the magnitude of Wen et al., ICLR 2024) is told
beside.

Captions are compared with ordinary prompts by a split-conformal p-value. These are measured on images that the model
itself draws of them in the same way; those that come out as copies of the training set are left out. Over many captions some p-values are small by chance, so they are corrected by Benjamini & Hochberg's procedure: of
the captions that are named, in expectation a share of at most ``false_discovery_rate`` is named wrongly. The smallest
p-value is 1 / (ordinary prompts + 1), so with few of them and many captions a single one cannot be told
(:attr:`Audit.least_named`): where captions stand above all ordinary prompts, and are too few to be named for that, more
are drawn.

Those named, and the next highest, are drawn from several noises and compared with their training images: a flag is
a statistic, a copy is seen. With a LoRA the same captions (or a sample) are measured at growing strengths and for
each saved epoch.

What is finished is kept (:mod:`sd_dejavu.training.ledger`), so an audit that was stopped goes on where it stood.
"""

from __future__ import annotations

import base64
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..calibration.first_step import PROMPTS_A_SEED
from ..calibration.misfit import stranger_nulls
from ..calibration.recombined import recombined
from ..core.settings import Checked, by_id, option
from ..core.statistics import benjamini_hochberg, spread
from ..kept import digest_of, json_digest
from ..reference.build import PIECE, THUMBNAIL_SIDE, embed
from ..reference.features import Features, Grey
from ..reference.images import open_image, to_tensor
from ..reference.nearest import copy_threshold, threshold_of
from ..reference.parts import PartIndex, PartMatch, part_index
from ..reference.reference_set import ReferenceSet
from ..run.measure import Measurement
from .ledger import Ledger, Progress
from .likeness import distance, likeness, style, style_of
from .lora_files import holds_lora
from .lora_metadata import remarks
from .tasks import MEASURED, Chosen, Engine, Task, Trained, Variant, Work, one_process

Counts = Literal["recovery", "gain"]
BASE = Variant(base=True)
_NUMBER = re.compile(r"(\d+)$")  # at the end of a saved LoRA's name
NEAREST_SHOWN = 5  # near duplicates that are named
FIRST_DRAWN = 100  # ordinary prompts that are drawn before more are asked for
RECOMBINED = 20_000  # captions that ordinary prompts are recombined from, at most
FEWEST = 20  # ordinary prompts to compare with
COMPARED_AT_ONCE = 4096  # images drawn of ordinary prompts with all of the training set
OTHERS = 2  # ordinary prompts that each training image is denoised with beside its caption


@dataclass(frozen=True)
class AuditSettings(Checked):
    """How a training set is audited, apart from how a prompt is measured."""

    false_discovery_rate: float = option(
        0.05, "share of the captions named that may be named wrongly", minimum=0, maximum=1, exclusive=True
    )
    nulls: int = option(
        1000,
        "ordinary prompts to compare with, at most; 100 are drawn first, more where needed",
        minimum=FEWEST,
        maximum=1_000_000,
    )
    sample: int = option(0, "audit so many captions, drawn at random; 0: all of them", minimum=0, maximum=1_000_000_000)
    worst: int = option(12, "captions whose images are drawn and compared, the worst ones", minimum=0, maximum=1000)
    sweep: int = option(
        200, "captions measured at each strength and saved epoch of a LoRA, at even distances; 0: none", minimum=0
    )
    strength_steps: int = option(4, "strengths of a LoRA that are measured, up to 1", minimum=1, maximum=20)
    partition: int = option(
        100, "prompts in one piece of work, a multiple of 25; a stopped audit loses one at most", minimum=25
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition % PROMPTS_A_SEED:
            raise ValueError(f"partition must be a multiple of {PROMPTS_A_SEED}, not {self.partition}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of the training set with its caption; ``row`` is its place in the reference set, None without one."""

    image: str
    caption: str
    repeats: int = 1
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of one training image.

    ``magnitude`` is the first step's, L2; ``recovery`` is the share of the training image's denoising error that its
    caption takes away, and ``base_recovery`` that on the base model. ``score`` is what counts of these. ``q_value`` is
    the smallest false discovery rate at which it would be named, ``flagged`` whether that is low enough. All of these
    are None where ``why`` says what kept it from being measured. ``copies`` of ``drawn`` images are copies of this very training image, ``similarity``
    is that of the likest; None where none was drawn or no threshold is established. ``parts`` of the others hold a copy
    of a part of it, ``part`` is the plainest of these and ``part_drawn`` counts from 1 which image it is in; None where
    parts cannot be compared. ``word`` brings the images about most.
    """

    image: str
    caption: str
    magnitude: float | None = None
    recovery: float | None = None
    base_recovery: float | None = None
    score: float | None = None
    p_value: float | None = None
    q_value: float | None = None
    flagged: bool | None = None
    copies: int | None = None
    drawn: int = 0
    similarity: float | None = None
    word: str | None = None
    repeats: int = 1
    duplicates: tuple[str, ...] = ()
    near_duplicates: tuple[str, ...] = ()
    suggestion: str = ""
    why: str = ""
    images: tuple[bytes, ...] = field(default=(), repr=False)  # PNG files
    parts: int | None = None
    part: PartMatch | None = None
    part_drawn: int | None = None


@dataclass(frozen=True)
class Point:
    """A LoRA at one strength or epoch, over the sample of captions: how many are named, and the median of what counts.

    ``likeness`` is what it has of the style that the last one brings at full strength; None where none is told.
    """

    strength: float
    epoch: int | None
    captions: int
    flagged: int
    median: float | None
    likeness: float | None = None


@dataclass(frozen=True)
class Audit:
    """The whole finding. At least ``least_named`` captions must have the smallest p-value for any to be named."""

    rows: tuple[Row, ...]
    counts: Counts
    nulls: int
    false_discovery_rate: float
    least_named: int
    strengths: tuple[Point, ...] = ()
    epochs: tuple[Point, ...] = ()
    skipped: tuple[dict[str, str], ...] = ()
    captions_alone: bool = False  # what the model drew of each caption stood in for its training image
    copy_threshold: float | None = None
    misfit: bool = False  # the ordinary prompts are stranger to the model than the captions
    remarks: tuple[str, ...] = ()  # on the training set: as what it was read, and what of a LoRA's file does not fit it

    @property
    def flagged(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.flagged)

    @property
    def copied(self) -> tuple[Row, ...]:
        """Rows of which a drawn image is a copy of the training image."""
        return tuple(row for row in self.rows if row.copies)

    @property
    def partly_copied(self) -> tuple[Row, ...]:
        """Rows of which no drawn image is a copy, but one holds a copy of a part of the training image."""
        return tuple(row for row in self.rows if row.parts and not row.copies)

    @property
    def enough(self) -> int:
        """Ordinary prompts among which a single caption can be named."""
        measured = sum(row.q_value is not None for row in self.rows)
        return int(np.ceil(measured / self.false_discovery_rate - 1e-9)) - 1

    @property
    def begins(self) -> int | None:
        """The first saved epoch at which a caption is named."""
        return next((point.epoch for point in self.epochs if point.flagged), None)


# ------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judged:
    """p- and q-value of each caption, None where it was not measured."""

    p: tuple[float | None, ...]
    q: tuple[float | None, ...]

    @classmethod
    def of(cls, p: Sequence[float | None]) -> Judged:
        q = iter(benjamini_hochberg([value for value in p if value is not None]))
        return cls(tuple(p), tuple(None if value is None else next(q) for value in p))

    def named(self, rate: float) -> list[bool | None]:
        return [None if q is None else q <= rate for q in self.q]


def judged(scores: Sequence[float | None], nulls: Sequence[float]) -> Judged:
    """Conformal p-values of the scores among those of ordinary prompts, and their q-values."""
    ordered = np.sort(np.asarray(nulls, dtype=float))
    above = [None if score is None else len(ordered) - int(np.searchsorted(ordered, score)) for score in scores]
    return Judged.of([None if count is None else (1 + count) / (len(ordered) + 1) for count in above])


def least_named(captions: int, nulls: int, rate: float) -> int:
    """How many captions must have the smallest p-value together, for Benjamini & Hochberg to name any."""
    return max(1, int(np.ceil(captions / (nulls + 1) / rate - 1e-9)))


# ------------------------------------------------------------------------------------------- the training set


def entries_of(reference: ReferenceSet) -> list[Entry]:
    """All images of a reference set with their captions; exact copies of an image follow it."""
    row_of = {name: number for number, name in enumerate(reference.names)}
    copies: dict[int, list[Entry]] = {}
    for copy in reference.details.get("copies", ()):
        row = row_of[copy["of"]]
        copies.setdefault(row, []).append(Entry(copy["name"], copy["caption"], 1, row))
    found = []
    for row, (name, caption) in enumerate(zip(reference.names, reference.captions, strict=True)):
        found += [Entry(name, caption, int(reference.duplicates[row]), row), *copies.get(row, ())]
    return found


def sampled(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """``count`` of the entries at random (0: all), in their order."""
    if not 0 < count < len(entries):
        return list(entries)
    return [entries[number] for number in sorted(Random(seed).sample(range(len(entries)), count))]


def ordinary_for(entries: Sequence[Entry], count: int, otherwise: Callable[[int], list[str]]) -> list[str]:
    """Ordinary prompts to compare the captions with: recombined from them, so that they are no stranger to the model,
    at most ``count``, and two more to denoise each image with; ``otherwise`` gives others where the captions share too
    few words for 100. Of many captions some are recombined, at even distances, and what comes out as another is left out.
    """
    captions = [entry.caption for entry in entries if entry.caption.strip()]
    count += OTHERS
    some = spread(captions, RECOMBINED)
    try:
        made = recombined(some, count, at_least=min(count, FIRST_DRAWN))
    except ValueError:
        return otherwise(count)
    if len(some) == len(captions):
        return made
    given = {caption.casefold() for caption in captions}
    return [prompt for prompt in made if prompt.casefold() not in given]


def identity(subject: Subject, ordinary: Sequence[str], measurement: Measurement, **host: Any) -> dict[str, Any]:
    """All that what is measured depends on, as plain values for the ledger.

    ``host`` says by names what is audited there (checkpoint, LoRAs, autoencoder) and in what way. Release 0.1 measured
    in another way, so its audits are begun anew.
    """
    return {
        **host,
        "counts": "recovery",
        "dataset": digest_of(_contents(subject)),
        "ordinary_prompts": json_digest(list(ordinary)),
        **by_id(measurement),
    }


def _contents(subject: Subject) -> Iterator[str | bytes]:
    for entry in subject.entries:
        yield json.dumps([entry.image, entry.caption])
        if subject.reference is not None and entry.row is not None:
            yield subject.reference.thumbnails[entry.row]


@dataclass(frozen=True)
class LoraFile:
    """A saved LoRA; ``epoch`` counts from 1 in the order in which a trainer saved them."""

    path: Path
    epoch: int


def lora_files(paths: Sequence[Path]) -> list[LoraFile]:
    """The .safetensors files that were named, or lie in the folders named, in the order of the numbers they end in.

    Trainers number what they save (``cat-000002.safetensors``, ``epoch-6.safetensors``); the one without a number is
    the last. The epoch is the number, and for the one without it the next as far on; the place in the order where two
    bear the same number, or none. Raises ValueError with a sentence where a path holds none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.glob("*.safetensors")) if holds_lora(file)]
            if not inside:
                raise ValueError(
                    f"the folder {path} holds no LoRAs (.safetensors): name the folder with the saved ones"
                )
            found += inside
        elif not path.is_file():
            raise ValueError(f"there is no LoRA {path}: check the path")
        elif not holds_lora(path):
            raise ValueError(f"{path} is no LoRA in the .safetensors format: convert it, or name another file")
        else:
            found.append(path)
    twice = sorted({path.name for path in found if sum(path.name == other.name for other in found) > 1})
    if twice:
        raise ValueError(f"two LoRAs are called {twice[0]}: rename one, their results could not be told apart")
    numbered = {path: int(match[1]) for path in found if (match := _NUMBER.search(path.stem))}
    ordered = sorted(found, key=lambda path: (path not in numbered, numbered.get(path, 0), path.name))
    numbers = [numbered[path] for path in ordered if path in numbered]
    if len(set(numbers)) < len(numbers) or len(numbers) < len(found) - 1 or not numbers:
        return [LoraFile(path, place) for place, path in enumerate(ordered, 1)]
    following = 2 * numbers[-1] - (numbers[-2] if len(numbers) > 1 else 0)
    return [LoraFile(path, numbered.get(path, following)) for path in ordered]


# --------------------------------------------------------------------------------------------- the audit


@dataclass(frozen=True)
class Subject:
    """What is audited: the entries, with the reference set they come from where their images are at hand.

    ``features`` compares drawn images with the reference set's.
    """

    entries: Sequence[Entry]
    reference: ReferenceSet | None = None
    features: Features | None = None

    @property
    def cases(self) -> list[Entry]:
        """The different captions, those of another image apart."""
        return list({(entry.caption, entry.row): entry for entry in reversed(self.entries)}.values())[::-1]


def audit(
    subject: Subject,
    loras: Sequence[LoraFile],
    ordinary: Sequence[str],
    load: Callable[[Variant], Trained],
    work: Work,
    ledger: Ledger,
    wanted: AuditSettings = AuditSettings(),
    engine: Engine = one_process,
    on_progress: Progress = lambda stage, done, total: None,
    has_base: bool = False,
) -> Audit:
    """Audits the subject against ``ordinary`` prompts; what the ledger holds is not done again.

    The last two are what each image is denoised with besides its caption.

    ``has_base`` says that ``load`` can also give the model that was trained on, as it always can where LoRAs are
    named. Raises ValueError where there is nothing to measure, or to compare with.
    """
    cases = subject.cases
    if not any(case.caption.strip() for case in cases):
        raise ValueError(
            "the training set holds no captions, so there is nothing to audit: put a .txt beside each image"
        )
    final = Variant(str(loras[-1].path)) if loras else Variant()
    has_base = has_base or bool(loras)
    counts: Counts = "gain" if has_base else "recovery"
    strengths, epochs = _variants(loras, final, wanted) if loras and wanted.sweep else ({}, {})
    sweep = spread(range(len(cases)), wanted.sweep)
    finish = partial(ledger.finish, load=load, work=work, engine=engine, on_progress=on_progress)
    judge = _Judge(subject)
    others, ordinary = tuple(ordinary[-OTHERS:]), ordinary[:-OTHERS]
    pictures = _pictures(subject, cases, final, wanted, others, finish, ledger)
    swept = pictures.some(sweep)
    asked = [final, BASE] if counts == "gain" else [final]
    finish([task for v in asked for task in pictures.tasks(v)], "measuring")
    values = {v: pictures.values(v) for v in asked}
    both = [
        pair for pair in zip(values[final], values.get(BASE, ()), strict=False) if not any("why" in v for v in pair)
    ]
    if both and all(own == base for own, base in both):
        raise ValueError(
            "the model predicts of every caption just what the base model does, so there is nothing to judge: its LoRA is "
            "empty or of a kind that this host passes over, as the host's log says, or the two models are one"
        )
    scores = _scores(values[final], values.get(BASE))

    # What a LoRA draws is like its training set, whatever the prompt: only beside pictures that it has not drawn
    # itself does the base model draw the ordinary prompts.
    drawn_by = BASE if counts == "gain" and subject.reference is not None else final
    nulls = _Nulls(ordinary, others, wanted, pictures, finish, ledger, drawn_by)
    first = -(-FIRST_DRAWN // wanted.partition) * wanted.partition  # whole tasks, so that none is done twice
    count = min(len(ordinary), first)
    while True:
        tasks = nulls.tasks(final, count)
        null_scores = _scores(nulls.values(final, tasks), nulls.values(BASE, tasks) if counts == "gain" else None)
        found = judged(scores, _compared_with(null_scores))
        if count == len(ordinary) or not more_needed(found, len(_known(null_scores)), wanted.false_discovery_rate):
            break
        count = min(len(ordinary), 2 * count)

    def point(variant: Variant, strength: float, epoch: int | None) -> Point:
        """Of the sample alone, also for the variant of which every caption was measured."""
        own = values.get(variant) or swept.values(variant)
        chosen = [own[number] for number in sweep] if variant == final else own
        bases = [values[BASE][number] for number in sweep] if counts == "gain" else None
        null_bases = nulls.values(BASE, tasks) if counts == "gain" else None
        scores = _scores(chosen, bases)
        there = judged(scores, _compared_with(_scores(nulls.values(variant, tasks), null_bases)))
        named = sum(bool(one) for one in there.named(wanted.false_discovery_rate))
        known = _known(scores)
        median = float(np.median(known)) if known else None
        return Point(strength, epoch, len(known), named, median, likest.get(variant))

    swept_variants = list(dict.fromkeys([*strengths, *epochs]))
    part = tuple(ordinary[: min(wanted.partition, count)])  # as what was drawn already
    ordinary_ones = Task("drawn", BASE, 0, part, side=pictures.side)
    likest = _likenesses(subject.reference, final, swept_variants, ordinary_ones, finish, ledger)
    left = [v for v in swept_variants if v != final]
    finish([task for v in left for task in swept.tasks(v)], "measuring")
    points = {v: point(v, strengths.get(v, 1.0), epochs.get(v)) for v in swept_variants}

    ranked = [(-np.inf if score is None else score) for score in scores]
    order = sorted(range(len(cases)), key=lambda n: (-ranked[n], n))
    prompts = list(dict.fromkeys(cases[n].caption for n in order if "why" not in values[final][n]))[: wanted.worst]
    drawing = [Task("images", final, number, (prompt,), words=True) for number, prompt in enumerate(prompts)]
    finish(drawing, "drawing")
    judge.saw(dict(zip(prompts, ledger.values(drawing), strict=True)))
    named = found.named(wanted.false_discovery_rate)
    case_of = {(case.caption, case.row): number for number, case in enumerate(cases)}

    def row(entry: Entry) -> Row:
        n = case_of[entry.caption, entry.row]
        base = values[BASE][n] if counts == "gain" else {}
        return judge.row(cases[n], values[final][n], base, scores[n], found.p[n], found.q[n], named[n])

    compared = len(_known(null_scores))
    return Audit(
        tuple(judge.of_entry(row(entry), entry) for entry in subject.entries),
        counts,
        compared,
        wanted.false_discovery_rate,
        least_named(sum(q is not None for q in found.q), compared, wanted.false_discovery_rate),
        tuple(replace(points[v], epoch=None) for v in strengths),
        tuple(points[v] for v in epochs),
        () if subject.reference is None else tuple(subject.reference.details.get("skipped", ())),
        subject.reference is None,
        judge.threshold,
        stranger_nulls(*map(_magnitudes, (values[final], nulls.values(final, tasks)))),
        (
            *(() if subject.reference is None else remarks(subject.reference, [lora.path for lora in loras])),
            *judge.remarks,
        ),
    )


def _likenesses(
    reference: ReferenceSet | None,
    final: Variant,
    variants: Sequence[Variant],
    drawing: Task,
    finish: Callable[[Sequence[Task], str], None],
    ledger: Ledger,
) -> dict[Variant, float | None]:
    """What each variant of a LoRA has of the style of ``final``, by what it draws of ordinary prompts."""
    if reference is None or not variants:
        return {}
    tasks = {v: replace(drawing, variant=v) for v in dict.fromkeys([BASE, final, *variants])}
    finish(list(tasks.values()), "drawing ordinary prompts")
    training = style_of(reference)
    found = {}
    for variant, task in tasks.items():
        drawn = [base64.b64decode(value["image"]) for value in ledger.values([task]) if "image" in value]
        found[variant] = distance(style(to_tensor(open_image(file))[0] for file in drawn), training) if drawn else None
    whole, bare = found[final], found[BASE]
    if whole is None or bare is None:
        return {}
    return {v: None if there is None else likeness(there, whole, bare) for v, there in found.items()}


@dataclass(frozen=True)
class _Pictures:
    """The image that each caption is measured with: its number among ``files``, None where ``whys`` says why not.

    ``copies`` tells which of other images are copies of any of them.
    """

    captions: Sequence[str]
    files: Sequence[bytes]
    numbers: Sequence[int | None]
    whys: Mapping[int, str]
    others: tuple[str, ...]
    partition: int
    ledger: Ledger
    copies: Callable[[Sequence[bytes]], list[bool]]

    @property
    def side(self) -> int:
        """Of the longer side in pixels. Raises ValueError where there is no image at all."""
        for number in self.numbers:
            if number is not None:
                return max(open_image(self.files[number]).size)
        raise ValueError(f"none of the captions could be drawn, so there is nothing to measure: {self.whys[0]}")

    def some(self, places: Sequence[int]) -> _Pictures:
        captions, numbers = [self.captions[n] for n in places], [self.numbers[n] for n in places]
        whys = {place: self.whys[n] for place, n in enumerate(places) if n in self.whys}
        return replace(self, captions=captions, numbers=numbers, whys=whys)

    def tasks(self, variant: Variant) -> list[Task]:
        found = []
        for first in range(0, len(self.captions), self.partition):
            here = slice(first, first + self.partition)
            pairs = [
                (c, number)
                for c, number in zip(self.captions[here], self.numbers[here], strict=True)
                if number is not None
            ]
            if pairs:
                files = Chosen(self.files, [number for _, number in pairs])
                found.append(Task("captions", variant, first, tuple(c for c, _ in pairs), files, others=self.others))
        return found

    def values(self, variant: Variant) -> _Values:
        """What was measured of each caption, or why it was not."""
        measured = self.ledger.values(self.tasks(variant))
        return _Values(
            {"why": self.whys[place]} if number is None else next(measured) for place, number in enumerate(self.numbers)
        )


class _Values(Sequence[dict[str, Any]]):
    """What was measured of many prompts, as two numbers each; or why it was not."""

    def __init__(self, values: Iterable[dict[str, Any]]) -> None:
        self._numbers, self._whys = array("d"), dict[int, str]()
        for place, value in enumerate(values):
            if "why" in value:
                self._whys[place] = value["why"]
            self._numbers.extend(value.get(name, np.nan) for name in MEASURED)

    def __len__(self) -> int:
        return len(self._numbers) // len(MEASURED)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place in self._whys:
            return {"why": self._whys[place]}
        start = place * len(MEASURED)
        return dict(zip(MEASURED, self._numbers[start : start + len(MEASURED)], strict=True))


class _Drawings(Sequence[bytes]):
    """The images that finished tasks drew, read from the ledger a task at a time; ``whys`` says why one is not there.

    All tasks but the last have as many prompts as the first.
    """

    def __init__(self, tasks: Sequence[Task], ledger: Ledger) -> None:
        self._tasks, self._ledger = tasks, ledger
        self._count = sum(len(task.prompts) for task in tasks)
        self._read: tuple[int, list[dict[str, Any]]] = (-1, [])
        self.whys = {n: value["why"] for n, value in enumerate(ledger.values(tasks)) if "why" in value}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        task, place = divmod(range(self._count)[number], len(self._tasks[0].prompts))
        if self._read[0] != task:
            self._read = (task, list(self._ledger.values([self._tasks[task]])))
        return base64.b64decode(self._read[1][place]["image"])


def _pictures(
    subject: Subject,
    cases: Sequence[Entry],
    final: Variant,
    wanted: AuditSettings,
    others: tuple[str, ...],
    finish: Callable[[Sequence[Task], str], None],
    ledger: Ledger,
) -> _Pictures:
    """The training images; or where there are captions alone, what the model draws of each without guidance."""
    captions = [case.caption for case in cases]
    if subject.reference is not None:
        numbers = [case.row for case in cases]
        copies = _Judge(subject).copies
        return _Pictures(captions, subject.reference.thumbnails, numbers, {}, others, wanted.partition, ledger, copies)
    drawing = [
        Task("stand-ins", final, first, tuple(captions[first : first + wanted.partition]), side=THUMBNAIL_SIDE)
        for first in range(0, len(cases), wanted.partition)
    ]
    finish(drawing, "drawing the captions")
    files = _Drawings(drawing, ledger)
    drawn = [None if n in files.whys else n for n in range(len(files))]
    there = Chosen(files, [n for n in drawn if n is not None])
    return _Pictures(
        captions, files, drawn, files.whys, others, wanted.partition, ledger, partial(_copies_of_any, files=there)
    )


def _copies_of_any(images: Sequence[bytes], files: Sequence[bytes]) -> list[bool]:
    """Which images are copies of any of many files, of which a piece is read at a time."""
    features = Grey()
    threshold = copy_threshold(features.name)
    if threshold is None or not images:
        return [False] * len(images)
    rows = embed(features, map(to_tensor, map(open_image, images)))
    nearest = torch.full((len(rows),), -1.0)
    for start in range(0, len(files), PIECE):
        there = embed(features, map(to_tensor, map(open_image, files[start : start + PIECE])))
        nearest = nearest.maximum((rows @ there.T).amax(1))
    return (nearest >= threshold).tolist()


class _Nulls:
    """The ordinary prompts of an audit, with an image of each that ``drawn_by`` draws.

    Beside training images that is the base model where one is known, as it has not seen them: what an overfitted LoRA
    draws of any prompt is made of its training images.
    """

    def __init__(
        self,
        ordinary: Sequence[str],
        others: tuple[str, ...],
        wanted: AuditSettings,
        pictures: _Pictures,
        finish: Callable[[Sequence[Task], str], None],
        ledger: Ledger,
        drawn_by: Variant,
    ) -> None:
        self._drawn_by, self._others = drawn_by, others
        self._ordinary, self._wanted, self._pictures = ordinary, wanted, pictures
        self._finish, self._ledger = finish, ledger
        self._copied: dict[int, bool] = {}

    def tasks(self, final: Variant, count: int) -> list[Task]:
        """Of the first ``count``, to be measured on ``final``, without those whose images copy the training set.

        Raises ValueError where those leave too few to compare with.
        """
        size = self._wanted.partition
        parts = [(first, tuple(self._ordinary[first : min(first + size, count)])) for first in range(0, count, size)]
        drawing = [Task("drawn", self._drawn_by, first, part, side=self._pictures.side) for first, part in parts]
        self._finish(drawing, "drawing ordinary prompts")
        files = _Drawings(drawing, self._ledger)
        there = [n for n in range(len(files)) if n not in files.whys]
        for start in range(0, len(there), COMPARED_AT_ONCE):
            fresh = [n for n in there[start : start + COMPARED_AT_ONCE] if n not in self._copied]
            self._copied.update(zip(fresh, self._pictures.copies(Chosen(files, fresh)[:]), strict=True))
        copied = sum(self._copied[n] for n in there)
        found: list[Task] = []
        for task in drawing:
            kept = [n for n in range(task.first, task.first + len(task.prompts)) if self._copied.get(n) is False]
            if kept:
                prompts = tuple(self._ordinary[n] for n in kept)
                found.append(Task("nulls", final, task.first, prompts, Chosen(files, kept), others=self._others))
        left = sum(len(task.prompts) for task in found)
        if copied and left < min(FEWEST, count):
            raise ValueError(
                f"of {count:,} ordinary prompts the model draws {copied:,} as copies of the training set, and {left:,} are too "
                "few to compare its captions with: train for fewer steps, or at a lower rate"
            )
        return found

    def values(self, variant: Variant, tasks: Sequence[Task]) -> _Values:
        """What is measured of the same prompts and images on a variant."""
        own = [replace(task, variant=variant) for task in tasks]
        self._finish(own, "measuring ordinary prompts")
        return _Values(self._ledger.values(own))


def _scores(values: Sequence[dict[str, Any]], bases: Sequence[dict[str, Any]] | None) -> list[float | None]:
    """What counts of each value; None where it, or that of the base model, was not measured."""
    own = [value.get("recovery") for value in values]
    return own if bases is None else gains(own, [value.get("recovery") for value in bases])


def _known(scores: Sequence[float | None]) -> list[float]:
    return [score for score in scores if score is not None]


def _compared_with(scores: Sequence[float | None]) -> list[float]:
    if not (known := _known(scores)):
        raise ValueError("none of the ordinary prompts could be measured, so there is nothing to compare with")
    return known


def more_needed(found: Judged, nulls: int, rate: float) -> bool:
    """Whether captions stand above all of so many ordinary prompts, and are too few to be named for that."""
    known = _known(found.p)
    highest = sum(p <= 1 / (nulls + 1) for p in known)
    return 0 < highest < least_named(len(known), nulls, rate)


def _magnitudes(values: Iterable[dict[str, Any]]) -> list[float]:
    return [value["magnitude"] for value in values if "magnitude" in value]


def gain(own: float, base: float) -> float:
    """r - max(0, r_base): an image that the base model loses more of with the caption than without is no credit."""
    return own - max(0.0, base)


def gains(values: Sequence[float | None], bases: Sequence[float | None]) -> list[float | None]:
    """Pair by pair; None where either was not measured."""
    return [None if v is None or b is None else gain(v, b) for v, b in zip(values, bases, strict=True)]


def _variants(
    loras: Sequence[LoraFile], final: Variant, wanted: AuditSettings
) -> tuple[dict[Variant, float], dict[Variant, int]]:
    """The strengths of the last LoRA up to 1, and each saved epoch at full strength."""
    steps = [step / wanted.strength_steps for step in range(1, wanted.strength_steps)]
    strengths = {**{Variant(final.lora, strength): strength for strength in steps}, final: 1.0}
    return strengths, {Variant(str(lora.path)): lora.epoch for lora in loras} if len(loras) > 1 else {}


class _Judge:
    """Puts together what is known of one training image."""

    def __init__(self, subject: Subject) -> None:
        self._reference, self._features = subject.reference, subject.features
        self._drawn: dict[str, tuple[bytes, ...]] = {}
        self._words: dict[str, str | None] = {}
        self._embedded: dict[str, Tensor] = {}
        self._parts: PartIndex | None = None
        self._entries = subject.entries
        self.remarks: tuple[str, ...] = ()
        self.threshold: float | None = None
        if self._reference is not None:
            self.threshold = threshold_of(self._reference)
            self._sharing: dict[int, list[str]] = {}
            for entry in subject.entries:
                self._sharing.setdefault(entry.row or 0, []).append(entry.image)

    def saw(self, images: dict[str, dict[str, Any]]) -> None:
        """The images drawn of captions, with the word that brings them about."""
        self._drawn = {
            caption: tuple(base64.b64decode(data) for data in found["images"]) for caption, found in images.items()
        }
        self._words = {caption: found["word"] for caption, found in images.items()}
        rows = [entry.row for entry in self._entries if entry.row is not None and self._drawn.get(entry.caption)]
        if rows and self._reference is not None and self._features is not None and self.threshold is not None:
            try:
                self._parts = part_index(self._reference, self._features, rows)
            except ValueError as error:  # sets that parts are not compared with
                self.remarks = (f"copies of parts were not looked for: {error}",)

    def copies(self, images: Sequence[bytes]) -> list[bool]:
        """Which of these files are copies of any training image; none where that cannot be said."""
        if self.threshold is None or self._reference is None or self._features is None or not images:
            return [False] * len(images)
        rows = embed(self._features, [to_tensor(open_image(data)) for data in images])
        nearest = self._reference.search(rows, 1).similarity[:, 0]
        return [similarity >= self.threshold for similarity in nearest.tolist()]

    def row(
        self,
        case: Entry,
        value: dict[str, Any],
        base: dict[str, Any],
        score: float | None,
        p: float | None,
        q: float | None,
        flag: bool | None,
    ) -> Row:
        """Of one case; entries that share its caption and image get the same."""
        similarity, copies = self._compared(case)
        parts, part, part_drawn = self._compared_parts(case)
        return Row(
            case.image,
            case.caption,
            value.get("magnitude"),
            value.get("recovery"),
            base.get("recovery"),
            score,
            p,
            q,
            flag,
            copies,
            len(self._drawn.get(case.caption, ())),
            similarity,
            self._words.get(case.caption),
            near_duplicates=self._near(case) if flag or copies else (),
            why=value.get("why") or base.get("why", ""),
            images=self._drawn.get(case.caption, ()),
            parts=parts,
            part=part,
            part_drawn=part_drawn,
        )

    def of_entry(self, row: Row, entry: Entry) -> Row:
        others = () if self._reference is None else tuple(n for n in self._sharing[entry.row or 0] if n != entry.image)
        known = replace(row, image=entry.image, repeats=entry.repeats, duplicates=others)
        return replace(known, suggestion=suggestion(known))

    def _compared(self, case: Entry) -> tuple[float | None, int | None]:
        """Similarity of the likest drawn image to the training image, and how many are its copies."""
        images = self._drawn.get(case.caption)
        if not images or self._reference is None or self._features is None or case.row is None:
            return None, None
        if case.caption not in self._embedded:
            self._embedded[case.caption] = embed(self._features, [to_tensor(open_image(data)) for data in images])
        rows = self._embedded[case.caption]
        similarity = self._reference.similarity(rows, torch.full((len(rows),), case.row))
        copies = None if self.threshold is None else int((similarity >= self.threshold).sum())
        return float(similarity.max()), copies

    def _compared_parts(self, case: Entry) -> tuple[int | None, PartMatch | None, int | None]:
        """How many drawn images that are no copies hold a copied part of the training image, the plainest, and in which."""
        images = self._drawn.get(case.caption)
        if self._parts is None or self._reference is None or case.row is None or not images:
            return None, None, None
        rows = self._embedded[case.caption]
        whole = self._reference.similarity(rows, torch.full((len(rows),), case.row)).tolist()
        found = self._parts.against([to_tensor(open_image(data)) for data in images], case.row)
        partly = [
            (match, number)
            for number, (match, similarity) in enumerate(zip(found, whole, strict=True), 1)
            if match.copy and similarity < (self.threshold or 0.0)
        ]
        if not partly:
            return 0, None, None
        return len(partly), *max(partly, key=lambda one: one[0].score)

    def _near(self, case: Entry) -> tuple[str, ...]:
        """Other images of the set that are nearly the same."""
        if self._reference is None or self._reference.near_threshold is None or case.row is None:
            return ()
        found = self._reference.search(self._reference.embeddings[case.row][None], NEAREST_SHOWN + 1)
        pairs = zip(found.index[0].tolist(), found.similarity[0].tolist(), strict=True)
        near = [number for number, s in pairs if s > self._reference.near_threshold and number != case.row]
        return tuple(self._reference.names[number] for number in near[:NEAREST_SHOWN])


def suggestion(row: Row) -> str:
    """What to do about one training image; empty where there is nothing."""
    if not row.flagged and not row.copies and not row.parts:
        return ""
    if row.parts and not row.copies and not row.flagged:
        return "look at the part that is like it: its caption does not stand out from ordinary prompts"
    if row.copies and not row.flagged:
        return "it is copied, but its caption does not stand out from ordinary prompts: draw it with the base model too"
    if row.drawn and row.copies == 0 and not row.parts:
        return "watch it: its caption acts like a memorised one, but no image drawn from it is a copy yet"
    if row.duplicates:
        return f"keep one of the {1 + len(row.duplicates)} equal images, and drop the others"
    if row.near_duplicates:
        return f"drop its near duplicates: {', '.join(row.near_duplicates)}"
    if row.repeats > 1:
        return f"show it less often: it comes {row.repeats} times an epoch"
    if row.word:
        return f"re-caption it ('{row.word}' brings it back), drop it, or stop training earlier"
    return "drop it, or stop training earlier"
