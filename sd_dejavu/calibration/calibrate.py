"""Make a calibration profile: measure ordinary prompts the way prompts will be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..denoiser import Model
from ..measure import Measurement, guidance_of, setting_of
from ..sampling import first_step, sample_prompts
from ..verdict import BandStep
from .ordinary_prompts import style_of
from .profile import Null, Profile, ScoreKind

SEED_BASE = 1_000_000  # far from the seeds people type
PROMPTS_A_SEED = 25


def calibrate(
    model: Model,
    prompts: Sequence[str],
    wanted: Measurement,
    full_runs: int = 0,
    batch_size: int = 32,
    on_prompt: Callable[[str], None] = lambda stage: None,
) -> Profile:
    """First-step scores of all prompts, and whole runs of the first ``full_runs`` of them.

    Every 25 prompts share a noise of their own, so that the nulls vary over noises as well as over
    prompts. The style of a null is what :func:`style_of` calls it, as with the prompts to be judged,
    which keeps p-values exact within a style. ``on_prompt`` is called with the stage's name
    after each prompt and may raise to interrupt.
    """
    if not prompts:
        raise ValueError("calibration needs ordinary prompts, none were given")
    sigma = model.sigmas(wanted.steps)[0]
    base = model.encode(wanted.negative if wanted.without == "negative prompt" else "")
    scores: list[dict[ScoreKind, tuple[float, ...]]] = []
    for start in range(0, len(prompts), PROMPTS_A_SEED):
        part = [model.encode(prompt) for prompt in prompts[start : start + PROMPTS_A_SEED]]
        noise = model.noise(SEED_BASE + start, wanted.images)
        values = first_step(model, part, base, noise, sigma, batch_size)
        for row in values:
            scores.append({"first step": tuple(row.tolist())})
            on_prompt("first step")
    curves: list[torch.Tensor] = []
    full_runs = min(full_runs, len(prompts))
    guidance, sigmas = guidance_of(model, wanted), model.sigmas(wanted.steps)
    for start in range(0, full_runs, PROMPTS_A_SEED):
        part = [model.encode(prompt) for prompt in prompts[start : min(start + PROMPTS_A_SEED, full_runs)]]
        noise = model.noise(SEED_BASE + start, wanted.images)
        for run in sample_prompts(model, part, guidance, noise, sigmas, None, batch_size):
            readings = torch.tensor([run.trace.reading(number) for number in range(wanted.steps)])
            scores[len(curves)]["first 5 steps"] = tuple(readings[:5].mean(0).tolist())
            scores[len(curves)]["all steps"] = tuple(readings.mean(0).tolist())
            curves.append(readings.mean(1))
            on_prompt("whole runs")
    nulls = tuple(Null(style_of(p), s) for p, s in zip(prompts, scores, strict=True))
    return Profile(setting_of(model, wanted), nulls, _band(curves, model.sigmas(wanted.steps)))


def _band(curves: Sequence[torch.Tensor], sigmas: Sequence[float]) -> tuple[BandStep, ...]:
    if not curves:
        return ()
    low, middle, high = torch.quantile(torch.stack(list(curves)), torch.tensor([0.05, 0.5, 0.95]), dim=0)
    return tuple(
        BandStep(*(float(f"{v:.7g}") for v in step)) for step in zip(sigmas[:-1], low, middle, high, strict=True)
    )
