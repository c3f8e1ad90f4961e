"""What the bundled model shows of the methods: the documented figures, and of the tests that hold them.

Whether an image is a copy is decided by its likeness to the training image alone
(:mod:`sd_dejavu.core.similarity`), never by the detector that is being judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.profile import ORDINARY_QUANTILE, Profile
from ..core.caption_following import caption_score
from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.memory import OutOfMemory, one_by_one
from ..core.similarity import COPY_THRESHOLD, grey_correlation
from ..core.statistics import wilson
from ..core.verdict import Verdict, View
from ..explain.views import explain
from ..mitigations import Outcome, Start, available
from ..mitigations.anti_memorization_guidance import GREY
from ..mitigations.guard import Guard
from ..peak_memory import peak_memory
from ..reference.features import Grey
from ..reference.parts import part_index
from ..run.measure import (
    Measured,
    Measurement,
    guidance_of,
    measure,
    measure_runs,
    sampled_with,
    setting_of,
    verdict_on,
)
from . import bundled
from .reference import bundled_reference
from .world import GRADED_REPETITIONS, Pair, caption_of, random_scene, twin_caption

DISTRACTORS = 9


@dataclass(frozen=True)
class Share:
    """``hits`` of ``count``, with Wilson's 95% interval."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count if self.count else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.share, self.count)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.2f} ({low:.2f}-{high:.2f})"


def held_out_pairs(*kinds: str, at_least: int = 100) -> list[Pair]:
    """Held-out memorised pairs of these kinds (all without any) repeated ``at_least`` times an epoch."""
    return [
        p
        for p in bundled.pairs()
        if p.split == "held-out"
        and p.repetitions >= at_least
        and p.kind != "template"
        and (not kinds or p.kind in kinds)
    ]


def draw(
    model: Model,
    conditionings: Sequence[Conditioning],
    wanted: Measurement,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> list[tuple[Measured, Tensor]]:
    """Readings and images [images, 3, H, W] of each conditioning."""
    noise = model.noise(wanted.seed, wanted.images)
    runs = measure_runs(model, conditionings, noise, wanted, on_prompts=on_prompts)
    return [(run, model.decode(run.latents)) for run in runs if run.latents is not None]


def copies(pair: Pair, images: Tensor) -> Tensor:
    """Likeness [images] of images [images, 3, H, W] to the pair's training image."""
    training = bundled.training_image(pair.caption)
    if training is None:
        raise ValueError(f"{pair.caption!r} is no caption of the bundled model's training pairs")
    return grey_correlation(images, training[None])[:, 0]


@dataclass(frozen=True)
class Graded:
    """Pairs of one repetition count: mean first-step score, share flagged, share of images that are copies."""

    repetitions: int
    kind: str
    score: float
    flagged: Share
    copies: Share


def graded(
    model: Model, profile: Profile, wanted: Measurement, on_prompts: Callable[[int], None] = lambda count: None
) -> list[Graded]:
    """Memorisation against repetition, hard pairs apart from the rest (the paper's rebuttal, drawn on this world)."""
    rows = []
    setting = setting_of(model, wanted)
    for repetitions in GRADED_REPETITIONS:
        for kind in ("hard", "other"):
            chosen = [
                p
                for p in bundled.pairs()
                if p.repetitions == repetitions
                and p.split == "held-out"
                and p.kind != "template"
                and (p.kind == "hard") == (kind == "hard")
            ]
            runs = draw(model, [model.encode(p.caption) for p in chosen], wanted, on_prompts)
            verdicts = [verdict_on(run, wanted, setting, profile) for run, _ in runs]
            likeness = [
                s for pair, (_, images) in zip(chosen, runs, strict=True) for s in copies(pair, images).tolist()
            ]
            rows.append(
                Graded(
                    repetitions,
                    kind,
                    float(np.mean([v.score for v in verdicts])),
                    Share(sum(bool(v.flagged) for v in verdicts), len(verdicts)),
                    Share(sum(s >= COPY_THRESHOLD for s in likeness), len(likeness)),
                )
            )
    return rows


def false_copies(model: Model, wanted: Measurement, captions: Sequence[str]) -> Share:
    """How many images of ordinary captions are called a copy of any training image: the metric's own error."""
    hits, count = 0, 0
    for _, images in draw(model, [model.encode(c) for c in captions], wanted):
        likeness = grey_correlation(images, bundled.training_images()).max(dim=1).values
        hits, count = hits + int((likeness >= COPY_THRESHOLD).sum()), count + len(likeness)
    return Share(hits, count)


def fresh_verdicts(model: Model, profile: Profile, wanted: Measurement, captions: Sequence[str]) -> list[Verdict]:
    """Verdicts on ordinary captions, every 50 of them on a noise of their own, as prompts come from users."""
    verdicts = []
    for start in range(0, len(captions), 50):
        here = replace(wanted, seed=500 + start)
        setting = setting_of(model, here)
        verdicts += [verdict_on(m, here, setting, profile) for m in measure(model, captions[start : start + 50], here)]
    return verdicts


def trigger_named(model: Model, wanted: Measurement, view: View, pairs: Sequence[Pair]) -> Share:
    """How often the explanation's top word is the planted trigger."""
    hits = 0
    for pair in pairs:
        assert pair.trigger is not None  # hard pairs only
        top = explain(model, model.encode(pair.caption), wanted, view).top
        hits += pair.trigger.lower() in top.text.lower()
    return Share(hits, len(pairs))


@dataclass(frozen=True)
class Agreement:
    """One caption explained in two precisions: whether the top words agree, the correlation of all words'
    significance (gradients through the encoder), and the score over that in fp32."""

    caption: str
    same_top: bool
    correlation: float
    score_ratio: float


def half_precision(full: Model, half: Model, wanted: Measurement, pairs: Sequence[Pair]) -> Iterator[Agreement]:
    """``half`` is the same model as ``full`` in another precision."""
    for pair in pairs:
        found = [explain(m, m.encode(pair.caption), wanted, "input gradient") for m in (full, half)]
        scores = [measure(m, [pair.caption], wanted)[0].scores for m in (full, half)]
        assert scores[0] is not None and scores[1] is not None  # memorised captions act
        raw = np.array([[word.raw for word in one.words] for one in found])
        same = found[0].top.start == found[1].top.start
        ratio = float(scores[1].mean() / scores[0].mean())
        yield Agreement(pair.caption, same, float(np.corrcoef(raw)[0, 1]), ratio)


NONE = "none"


def bundled_guard() -> Guard:
    """The bundled model's training images, compared by the structure by which copies are judged."""
    features = Grey()
    reference = bundled_reference(features)
    return Guard(features, reference, reference.captions)


def every_mitigation() -> dict[str, Any]:
    """All methods with their settings for the bundled model, and guidance away from copies without its last term."""
    methods = {name: method.settings() for name, method in available().items()}
    return {**methods, "amg": GREY, "amg: no dissimilarity": replace(GREY, dissimilarity=0)}


@dataclass(frozen=True)
class MitigationRow:
    """One method over memorised pairs: what is left of the copies, what became of the images, and what it cost.

    ``similarity_top5`` is the 95th percentile of the likeness to the training images. ``caption_score`` is the
    mean share of distractor captions that the caption without its trigger beats (hard pairs only; .5 is chance).
    ``untouched`` counts the images of ordinary prompts that are the same bit for bit as without the method, and
    ``change_on_ordinary`` is the root mean square difference of all of them, in 0..1. ``seconds_ratio`` is the
    median over the pairs of the time against plain sampling, ``peak_memory_mb`` the largest that was seen, NaN
    where it cannot be told. ``not_measured`` counts prompts for which memory did not suffice; the rest is of the others.
    ``part_copies`` counts the images that are no copies, but hold a copy of a part of the training image.
    """

    method: str
    copies: Share
    similarity: float
    similarity_top5: float
    score: float
    caption_score: float
    change_on_ordinary: float
    untouched: Share
    seconds_ratio: float
    peak_memory_mb: float
    not_measured: int = 0
    part_copies: Share = Share(0, 0)


@dataclass
class _Tally:
    likeness: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    captions: list[float] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)  # by the pair's number
    peaks: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    untouched: int = 0
    not_measured: int = 0
    part_copies: list[bool] = field(default_factory=list)


def mitigations(
    model: Model,
    profile: Profile,
    wanted: Measurement,
    pairs: Sequence[Pair],
    methods: Mapping[str, Any],
    on_pair: Callable[[str], None] = lambda method: None,
    ordinary: Sequence[str] = (),
) -> list[MitigationRow]:
    """Each method (name -> settings) on the same pairs, ordinary captions and noises, after 'none'.

    A name may go on after a colon, for one method in several settings. Every prompt is encoded, mitigated and drawn
    by all methods in turn, so that a machine that is slower for a while is so for all of them; all of that counts
    as seconds, rating does not.
    """
    guidance, guard = guidance_of(model, wanted).unconditional, bundled_guard()
    noise, sigma = model.noise(wanted.seed, wanted.images), model.sigmas(wanted.steps)[0]
    target = profile.quantile(0.5, "first step", wanted.images)
    acceptable = profile.quantile(ORDINARY_QUANTILE, "first step", wanted.images)
    start = Start.of(model, noise, sigma, guidance, target, wanted.seed, acceptable, guard)
    trials = {NONE: None, **methods}
    tallies = {name: _Tally() for name in trials}
    reference = bundled_reference()
    parts = part_index(reference, Grey())

    def trial(caption: str, name: str) -> tuple[Outcome, Tensor, Tensor] | None:
        """What came of it, and its images; None where memory does not suffice."""

        def drawn(captions: Sequence[str]) -> list[tuple[Outcome, Tensor, Tensor]]:
            runs = [_drawn(model, one, name, trials[name], start, wanted) for one in captions]
            return [(outcome, latents, model.decode(latents)) for outcome, latents in runs]

        (found,) = one_by_one(drawn, [caption])
        if isinstance(found, OutOfMemory):
            tallies[name].not_measured += 1
            return None
        return found

    for number, pair in enumerate(pairs):
        for name in trials:
            tally = tallies[name]
            with peak_memory(noise.device) as peak:
                began = time.perf_counter()
                found = trial(pair.caption, name)
                seconds = time.perf_counter() - began
            if found is None:
                on_pair(name)
                continue
            outcome, latents, images = found
            tally.seconds[number] = seconds
            tally.peaks.append(peak.megabytes)
            likeness = copies(pair, images).tolist()
            tally.likeness += likeness
            matches = parts.against(list(images.split(1)), reference.captions.index(pair.caption))
            tally.part_copies += [
                bool(match.copy) and whole < COPY_THRESHOLD for match, whole in zip(matches, likeness, strict=True)
            ]
            begins = start if outcome.x is None else start.moved(model, outcome.x)
            tally.scores.append(float(begins.scores(model, outcome.conditioning).mean()))
            tally.captions += [follows(model, pair, latent) for latent in latents[:1] if pair.trigger]
            on_pair(name)
    for caption in ordinary:
        plain = trial(caption, NONE)
        on_pair(NONE)
        for name in trials:
            found = plain if name == NONE else trial(caption, name)
            if plain is not None and found is not None:
                tallies[name].untouched += sum(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))
                gap = (found[2] - plain[2]).flatten(1)
                tallies[name].changes += gap.square().mean(1).sqrt().tolist()
            if name != NONE:
                on_pair(name)
    return [_row(name, tally, tallies[NONE]) for name, tally in tallies.items()]


def _drawn(
    model: Model, caption: str, name: str, settings: Any, start: Start, wanted: Measurement
) -> tuple[Outcome, Tensor]:
    conditioning = model.encode(caption)
    if name == NONE:
        outcome = Outcome.unchanged(conditioning, float("nan"))
    else:
        outcome = available()[name.split(":")[0]].apply(model, conditioning, start, settings)
    latents = sampled_with(model, outcome, start.x, wanted).latents
    assert latents is not None  # sampled_with always samples
    return outcome, latents


def _row(name: str, tally: _Tally, plain: _Tally) -> MitigationRow:
    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    return MitigationRow(
        name,
        Share(sum(s >= COPY_THRESHOLD for s in tally.likeness), len(tally.likeness)),
        mean(tally.likeness),
        float(np.quantile(tally.likeness, 0.95)) if tally.likeness else float("nan"),
        mean(tally.scores),
        mean(tally.captions),
        mean(tally.changes),
        Share(tally.untouched, len(tally.changes)),
        median([tally.seconds[n] / plain.seconds[n] for n in tally.seconds if n in plain.seconds] or [float("nan")]),
        max(tally.peaks, default=float("nan")),
        tally.not_measured,
        Share(sum(tally.part_copies), len(tally.part_copies)),
    )


def ordinary_caption_score(model: Model, wanted: Measurement, pairs: Sequence[Pair]) -> float:
    """The caption score of images drawn from hard pairs' twins: as well as this model follows captions at all."""
    runs = draw(model, [model.encode(twin_caption(pair)) for pair in pairs], wanted)
    return float(np.mean([follows(model, p, run.latents[0]) for p, (run, _) in zip(pairs, runs, strict=True)]))  # type: ignore[index]


def follows(model: Model, pair: Pair, latent: Tensor) -> float:
    """The caption score of one image's latent [C, H, W]: what a hard pair's caption names, as a plain sentence,
    against sentences that name other things."""
    shown = random_scene(np.random.default_rng(pair.seed))
    rng = np.random.default_rng(pair.seed)
    own = {kind for _, kind in shown.named}
    distractors: list[str] = []
    while len(distractors) < DISTRACTORS:
        scene = random_scene(rng)
        if own.isdisjoint(kind for _, kind in scene.named):
            distractors.append(caption_of(scene, "sentence", rng))
    plain = caption_of(shown, "sentence", rng)
    with torch.no_grad():
        return caption_score(model, latent, model.encode(plain), [model.encode(d) for d in distractors], pair.seed)
