"""What the bundled model shows of the methods: the figures of the README, and of the tests that hold them.

Whether a picture is a copy is decided by its likeness to the training picture alone
(:mod:`sd_dejavu.similarity`), never by the detector that is being judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.profile import ORDINARY_QUANTILE, Profile
from ..caption_following import caption_score
from ..conditioning import Conditioning
from ..denoiser import Model
from ..explain.views import explain
from ..measure import Measured, Measurement, guidance_of, judge, measure, measure_runs, setting_of
from ..mitigations import Start, available
from ..similarity import COPY_THRESHOLD, grey_correlation
from ..statistics import wilson
from ..verdict import Verdict, View
from . import bundled
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
    """Readings and pictures [images, 3, H, W] of each conditioning."""
    noise = model.noise(wanted.seed, wanted.images)
    runs = measure_runs(model, conditionings, noise, wanted, on_prompts=on_prompts)
    return [(run, model.decode(run.latents)) for run in runs if run.latents is not None]


def copies(pair: Pair, pictures: Tensor) -> Tensor:
    """Likeness [images] of pictures [images, 3, H, W] to the pair's training picture."""
    training = bundled.training_picture(pair.caption)
    if training is None:
        raise ValueError(f"{pair.caption!r} is no caption of the bundled model's training pairs")
    return grey_correlation(pictures, training[None])[:, 0]


@dataclass(frozen=True)
class Graded:
    """Pairs of one repetition count: mean first-step score, share flagged, share of pictures that are copies."""

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
            verdicts = [judge(run, wanted, setting, profile) for run, _ in runs]
            likeness = [
                s for pair, (_, pictures) in zip(chosen, runs, strict=True) for s in copies(pair, pictures).tolist()
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
    """How many pictures of ordinary captions are called a copy of any training picture: the metric's own error."""
    hits, count = 0, 0
    for _, pictures in draw(model, [model.encode(c) for c in captions], wanted):
        likeness = grey_correlation(pictures, bundled.training_pictures()).max(dim=1).values
        hits, count = hits + int((likeness >= COPY_THRESHOLD).sum()), count + len(likeness)
    return Share(hits, count)


def fresh_verdicts(model: Model, profile: Profile, wanted: Measurement, captions: Sequence[str]) -> list[Verdict]:
    """Verdicts on ordinary captions, every 50 of them on a noise of their own, as prompts come from users."""
    verdicts = []
    for start in range(0, len(captions), 50):
        here = replace(wanted, seed=500 + start)
        setting = setting_of(model, here)
        verdicts += [judge(m, here, setting, profile) for m in measure(model, captions[start : start + 50], here)]
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
class MitigationRow:
    """One method over memorised pairs: what is left of the copies, and what it cost.

    ``caption_score`` is the mean share of distractor captions that the caption without its trigger
    beats (hard pairs only; .5 is chance). ``seconds_ratio`` compares with plain sampling.
    """

    method: str
    copies: Share
    similarity: float
    score: float
    caption_score: float
    seconds_ratio: float


def mitigations(
    model: Model,
    profile: Profile,
    wanted: Measurement,
    pairs: Sequence[Pair],
    methods: Mapping[str, Any],
    on_pair: Callable[[str], None] = lambda method: None,
) -> list[MitigationRow]:
    """Each method (name -> settings) on the same pairs and noises, after 'none'. All of it counts as seconds but rating."""
    noise, sigma = model.noise(wanted.seed, wanted.images), model.sigmas(wanted.steps)[0]
    target = profile.quantile(0.5, "first step", wanted.images)
    ordinary = profile.quantile(ORDINARY_QUANTILE, "first step", wanted.images)
    start = Start.of(model, noise, sigma, guidance_of(model, wanted).unconditional, target, wanted.seed, ordinary)
    rows: list[MitigationRow] = []
    plain_seconds = 0.0
    for name, settings in {"none": None, **methods}.items():
        began = time.perf_counter()
        conditionings = []
        for pair in pairs:
            conditioning = model.encode(pair.caption)
            if name != "none":
                conditioning = available()[name].apply(model, conditioning, start, settings).conditioning
            conditionings.append(conditioning)
            on_pair(name)
        runs = draw(model, conditionings, wanted)
        seconds = time.perf_counter() - began
        plain_seconds = plain_seconds or seconds
        likeness = [s for pair, (_, pictures) in zip(pairs, runs, strict=True) for s in copies(pair, pictures).tolist()]
        captions = [
            follows(model, pair, latent)
            for pair, (run, _) in zip(pairs, runs, strict=True)
            if pair.trigger and run.latents is not None
            for latent in run.latents[:1]
        ]
        rows.append(
            MitigationRow(
                name,
                Share(sum(s >= COPY_THRESHOLD for s in likeness), len(likeness)),
                float(np.mean(likeness)),
                float(np.mean([start.score(model, c) for c in conditionings])),
                float(np.mean(captions)) if captions else float("nan"),
                seconds / plain_seconds,
            )
        )
    return rows


def ordinary_caption_score(model: Model, wanted: Measurement, pairs: Sequence[Pair]) -> float:
    """The caption score of pictures drawn from hard pairs' twins: as well as this model follows captions at all."""
    runs = draw(model, [model.encode(twin_caption(pair)) for pair in pairs], wanted)
    return float(np.mean([follows(model, p, run.latents[0]) for p, (run, _) in zip(pairs, runs, strict=True)]))  # type: ignore[index]


def follows(model: Model, pair: Pair, latent: Tensor) -> float:
    """The caption score of one picture's latent [C, H, W]: what a hard pair's caption names, as a plain sentence,
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
