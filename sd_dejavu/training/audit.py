"""Audit: which captions of a training set bring their images back, for the makers of checkpoints and LoRAs.

Each caption is measured at its first step: how far it moves the prediction (the magnitude of Wen et al., ICLR 2024),
and, where its training image is at hand, whether towards that image (:mod:`sd_dejavu.training.alignment`), which
then is what counts. It is compared with ordinary prompts by a split-conformal p-value. Over many captions some are
small by chance, so they are corrected by Benjamini & Hochberg's procedure: of the captions that are named, in
expectation a share of at most ``false_discovery_rate`` is named wrongly. The smallest p-value is 1 / (nulls + 1), so
with few nulls and many captions a single one cannot be told: :attr:`Audit.least_named`.

With a LoRA, or where the base model of a checkpoint is named, it is the gain over the base model that counts.

Those named, and the next highest, are drawn from several noises and compared with their training images: a flag is
a statistic, a copy is seen. With a LoRA the same captions (or a sample) are measured at growing strengths and for
each saved epoch.

What is finished is kept (:mod:`sd_dejavu.training.ledger`), so an audit that was stopped goes on where it stood.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
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
from ..core.settings import Checked, by_id, option
from ..core.statistics import benjamini_hochberg, spread
from ..kept import digest_of, json_digest
from ..reference.build import embed
from ..reference.features import Features
from ..reference.images import open_image, to_tensor
from ..reference.nearest import copy_threshold
from ..reference.reference_set import NEIGHBOURHOOD, ReferenceSet
from ..run.measure import Measurement
from .alignment import COMPARED, NEAREST_OF, contrast
from .ledger import Ledger
from .lora_files import holds_lora
from .tasks import Engine, Task, Trained, Variant, Work, one_process

Progress = Callable[[str, int, int], None]
Counts = Literal["magnitude", "contrast", "gain"]
BASE = Variant(base=True)
_NUMBER = re.compile(r"(\d+)$")  # at the end of a saved LoRA's name
NEAREST_SHOWN = 5  # near duplicates that are named


@dataclass(frozen=True)
class AuditSettings(Checked):
    """How a training set is audited, apart from how a prompt is measured."""

    false_discovery_rate: float = option(
        0.05, "share of the captions named that may be named wrongly", minimum=0, maximum=1, exclusive=True
    )
    nulls: int = option(
        1000, "ordinary prompts measured on the same weights, to compare with", minimum=20, maximum=1_000_000
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


@dataclass(frozen=True)
class Entry:
    """One image of the training set with its caption; ``row`` is its place in the reference set, None without one."""

    image: str
    caption: str
    repeats: int = 1
    row: int | None = None


@dataclass(frozen=True)
class Row:
    """What was found of one training image.

    ``magnitude`` is the first step's, L2; ``alignment`` is with its training image, -1 to 1, and ``base_alignment``
    that of the base model. ``score`` is what counts of these. ``q_value`` is the smallest false discovery rate at
    which it would be named, ``flagged`` whether that is low enough. All of these are None where ``why`` says what kept
    it from being measured. ``copies`` of ``drawn`` images are copies of this very training image, ``similarity``
    is that of the likest; None where none was drawn or no threshold is established. ``word`` brings the images
    about most.
    """

    image: str
    caption: str
    magnitude: float | None = None
    alignment: float | None = None
    base_alignment: float | None = None
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


@dataclass(frozen=True)
class Point:
    """A LoRA at one strength or epoch, over the sample of captions: how many are named, and the median of what counts."""

    strength: float
    epoch: int | None
    captions: int
    flagged: int
    median: float | None


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
    copy_threshold: float | None = None
    misfit: bool = False  # the ordinary prompts are stranger to the model than the captions

    @property
    def flagged(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.flagged)

    @property
    def copied(self) -> tuple[Row, ...]:
        """Rows of which a drawn image is a copy of the training image."""
        return tuple(row for row in self.rows if row.copies)

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


def identity(
    entries: Sequence[Entry], ordinary: Sequence[str], wanted: AuditSettings, measurement: Measurement, **host: Any
) -> dict[str, Any]:
    """All that what is measured depends on, as plain values for the ledger.

    ``host`` says by names what is audited there (checkpoint, LoRAs, autoencoder) and in what way.
    """
    return {
        **host,
        "dataset": digest_of(json.dumps([entry.image, entry.caption]) for entry in entries),
        "ordinary_prompts": json_digest(list(ordinary)),
        "partition": wanted.partition,
        **by_id(measurement),
    }


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

    def images(self, cases: Sequence[Entry]) -> tuple[bytes, ...]:
        if self.reference is None:
            return ()
        return tuple(self.reference.thumbnails[case.row] for case in cases if case.row is not None)


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
    """Audits the subject. ``ordinary`` prompts are the nulls; what the ledger holds is not done again.

    ``has_base`` says that ``load`` can also give the model that was trained on, as it always can where LoRAs are
    named. Raises ValueError where there is nothing to measure.
    """
    cases = subject.cases
    if not any(case.caption.strip() for case in cases):
        raise ValueError(
            "the training set holds no captions, so there is nothing to audit: put a .txt beside each image"
        )
    final = Variant(str(loras[-1].path)) if loras else Variant()
    has_base = has_base or bool(loras)
    counts: Counts = "magnitude" if subject.reference is None else "gain" if has_base else "contrast"
    strengths, epochs = _variants(loras, final, wanted) if loras and wanted.sweep else ({}, {})
    sweep = spread(range(len(cases)), wanted.sweep)
    swept = [cases[number] for number in sweep]
    measured = dict.fromkeys([final, *strengths, *epochs])
    case_tasks = {v: _caption_tasks(subject, cases if v == final else swept, v, wanted) for v in measured}
    if counts == "gain":
        case_tasks[BASE] = _caption_tasks(subject, cases, BASE, wanted)
    null_tasks = {v: _null_tasks(subject, ordinary, v, wanted, work.wanted.seed) for v in case_tasks}
    every = [task for v in case_tasks for task in (*null_tasks[v], *case_tasks[v])]
    finish = partial(_finish, load=load, work=work, ledger=ledger, engine=engine, on_progress=on_progress)
    finish(every, "measuring")

    on_base: list[dict[str, Any]] = list(ledger.values(case_tasks[BASE])) if counts == "gain" else [{}] * len(cases)
    base_cases = [counted(value, counts) for value in on_base]
    base_nulls = of_ordinary(list(ledger.values(null_tasks[BASE])), counts) if counts == "gain" else []

    def judged_on(variant: Variant, bases: Sequence[float | None]) -> tuple[list[float | None], Judged]:
        """What counts of the captions measured on a variant, and how it stands to ordinary prompts there."""
        values = [counted(value, counts) for value in ledger.values(case_tasks[variant])]
        nulls = of_ordinary(list(ledger.values(null_tasks[variant])), counts)
        if counts == "gain":
            values, nulls = gains(values, bases), gains(nulls, base_nulls)
        known = [value for value in nulls if value is not None]
        if not known:
            raise ValueError("none of the ordinary prompts could be measured, so there is nothing to compare with")
        return values, judged(values, known)

    def point(variant: Variant, strength: float, epoch: int | None) -> Point:
        swept_all = variant == final  # of which every caption was measured
        scores, found = judged_on(variant, base_cases if swept_all else [base_cases[number] for number in sweep])
        if swept_all:  # judged as the others are: among the sample
            scores = [scores[number] for number in sweep]
            found = Judged.of([found.p[number] for number in sweep])
        known = [score for score in scores if score is not None]
        named = sum(bool(one) for one in found.named(wanted.false_discovery_rate))
        return Point(strength, epoch, len(known), named, float(np.median(known)) if known else None)

    values = list(ledger.values(case_tasks[final]))
    scores, found = judged_on(final, base_cases)
    ranked = [(-np.inf if score is None else score) for score in scores]
    order = sorted(range(len(cases)), key=lambda n: (-ranked[n], n))
    prompts = list(dict.fromkeys(cases[n].caption for n in order if "why" not in values[n]))[: wanted.worst]
    drawing = [Task("images", final, number, (prompt,), words=True) for number, prompt in enumerate(prompts)]
    finish(drawing, "drawing")
    judge = _Judge(subject, dict(zip(prompts, ledger.values(drawing), strict=True)))
    named = found.named(wanted.false_discovery_rate)
    rows = {
        (case.caption, case.row): judge.row(case, value, base, score, p, q, flag)
        for case, value, base, score, p, q, flag in zip(
            cases, values, on_base, scores, found.p, found.q, named, strict=True
        )
    }
    return Audit(
        tuple(judge.of_entry(rows[entry.caption, entry.row], entry) for entry in subject.entries),
        counts,
        len(ordinary),
        wanted.false_discovery_rate,
        least_named(sum(q is not None for q in found.q), len(ordinary), wanted.false_discovery_rate),
        tuple(point(v, strength, None) for v, strength in strengths.items()),
        tuple(point(v, 1.0, epoch) for v, epoch in epochs.items()),
        () if subject.reference is None else tuple(subject.reference.details.get("skipped", ())),
        judge.threshold,
        stranger_nulls(*(_magnitudes(ledger.values(tasks[final])) for tasks in (case_tasks, null_tasks))),
    )


def _magnitudes(values: Iterable[dict[str, Any]]) -> list[float]:
    return [value["magnitude"] for value in values if "magnitude" in value]


def counted(value: dict[str, Any], counts: Counts) -> float | None:
    """Of a caption: its magnitude, or the contrast of its own image; None where it was not measured."""
    if counts == "magnitude" or "alignment" not in value:
        return value.get("magnitude") if counts == "magnitude" else None
    return contrast(value["alignment"][0], value["alignment"][1:])


def of_ordinary(values: Sequence[dict[str, Any]], counts: Counts) -> list[float | None]:
    """Of ordinary prompts in their order: the magnitude, or the contrast of an image drawn at random; where no base
    model is known, the highest contrast of several."""
    found: list[float | None] = []
    for number, value in enumerate(values):
        row = value.get("alignment")
        if row is None or counts == "magnitude":
            found.append(value.get("magnitude") if counts == "magnitude" else None)
            continue
        places = range(len(row))[:NEAREST_OF] if counts == "contrast" else [number % len(row)]
        found.append(max(contrast(row[place], row[:place] + row[place + 1 :]) for place in places))
    return found


def gain(own: float, base: float) -> float:
    """c - max(0, c_base)."""
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


def _null_tasks(
    subject: Subject, ordinary: Sequence[str], variant: Variant, wanted: AuditSettings, seed: int
) -> list[Task]:
    chosen = Random(seed)
    compared = min(COMPARED, len({case.row for case in subject.cases}))
    rows = sorted({case.row for case in subject.cases if case.row is not None})
    tasks = []
    for first in range(0, len(ordinary), wanted.partition):
        prompts = tuple(ordinary[first : first + wanted.partition])
        drawn = (
            [row for _ in range(0, len(prompts), PROMPTS_A_SEED) for row in chosen.sample(rows, compared)]
            if rows
            else []
        )
        images = tuple(subject.reference.thumbnails[row] for row in drawn) if subject.reference is not None else ()
        tasks.append(Task("nulls", variant, first, prompts, images))
    return tasks


def _caption_tasks(subject: Subject, cases: Sequence[Entry], variant: Variant, wanted: AuditSettings) -> list[Task]:
    parts = [(first, cases[first : first + wanted.partition]) for first in range(0, len(cases), wanted.partition)]
    return [
        Task("captions", variant, first, tuple(c.caption for c in part), subject.images(part)) for first, part in parts
    ]


def _finish(
    tasks: Sequence[Task],
    stage: str,
    load: Callable[[Variant], Trained],
    work: Work,
    ledger: Ledger,
    engine: Engine,
    on_progress: Progress,
) -> None:
    left = ledger.missing(list(dict.fromkeys(tasks)))
    total = sum(len(task.prompts) for task in tasks)
    done = total - sum(len(task.prompts) for task in left)
    on_progress(stage, done, total)
    if not left:
        return
    with ledger.held():
        for task, values in engine(left, load, work):
            ledger.keep(task, values)
            done += len(task.prompts)
            on_progress(stage, done, total)


class _Judge:
    """Puts together what is known of one training image."""

    def __init__(self, subject: Subject, seen: dict[str, dict[str, Any]]) -> None:
        self._reference, self._features = subject.reference, subject.features
        self._drawn = {
            caption: tuple(base64.b64decode(data) for data in found["images"]) for caption, found in seen.items()
        }
        self._words = {caption: found["word"] for caption, found in seen.items()}
        self._embedded: dict[str, Tensor] = {}
        self.threshold: float | None = None
        if self._reference is not None:
            small = self._reference.metric == "normalised L2" and len(self._reference) < NEIGHBOURHOOD
            self.threshold = None if small else copy_threshold(self._reference.features)
            self._sharing: dict[int, list[str]] = {}
            for entry in subject.entries:
                self._sharing.setdefault(entry.row or 0, []).append(entry.image)

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
        return Row(
            case.image,
            case.caption,
            value.get("magnitude"),
            value.get("alignment", [None])[0],
            base.get("alignment", [None])[0],
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
    if not row.flagged and not row.copies:
        return ""
    if row.copies and not row.flagged:
        return "it is copied, but its caption does not stand out from ordinary prompts: draw it with the base model too"
    if row.drawn and row.copies == 0:
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
