"""Make a calibration profile: measure ordinary prompts the way prompts will be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ..core.denoiser import Model
from ..core.memory import OutOfMemory, one_by_one
from ..core.sampling import first_readings
from ..core.trace import Trace
from ..core.verdict import BandStep
from ..detectors import scores
from ..run.measure import Measurement, baseline_of, guidance_of, setting_of
from ..run.reference import sample_prompts
from .ordinary_prompts import style_of
from .profile import Null, Ordinary, Profile

SEED_BASE = 1_000_000  # far from the seeds people type
PROMPTS_A_SEED = 25


def calibrate(
    model: Model,
    prompts: Sequence[str],
    wanted: Measurement,
    full_runs: int = 0,
    batch_size: int = 32,
    on_prompt: Callable[[str], None] = lambda stage: None,
    on_left_out: Callable[[str, str], None] | None = None,
    ordinary: Ordinary = "generated",
) -> Profile:
    """First-step scores of all prompts, and whole runs of the first ``full_runs`` of them.

    Every 25 prompts share a noise of their own, so that the nulls vary over noises as well as over
    prompts. The style of a null is what :func:`style_of` calls it, as with the prompts to be judged. They are not
    quite independent then: of the variance of scores 2% come from the noise on the bundled model with one image, and
    less than 0.1% with four. ``ordinary`` says which prompts these
    are. ``on_prompt`` is called with the stage's name after each prompt and may raise to interrupt. A prompt for which memory does not suffice is left out, and
    ``on_left_out`` told why; without that, or where none is left, OutOfMemory is raised.
    """
    if not prompts:
        raise ValueError("calibration needs ordinary prompts, none were given")
    sigma = model.sigmas(wanted.steps)[0]
    base = baseline_of(model, wanted)
    at_once = {name: score for name, score in scores().items() if score.of_first_step}
    reads = {score.detector: score.read for score in at_once.values()}
    nulls: list[Null] = []
    kept: list[int] = []  # numbers of the prompts that were measured
    fault: OutOfMemory | None = None
    for start in range(0, len(prompts), PROMPTS_A_SEED):
        noise = model.noise(SEED_BASE + start, wanted.images)

        def rows(part: Sequence[str], noise: Tensor = noise) -> list[dict[str, Tensor]]:
            encoded = [model.encode(prompt) for prompt in part]
            found = first_readings(model, encoded, base, noise, sigma, reads, batch_size)
            return [{name: values[number] for name, values in found.items()} for number in range(len(part))]

        together = prompts[start : start + PROMPTS_A_SEED]
        for number, row in enumerate(one_by_one(rows, together), start):
            if isinstance(row, OutOfMemory):
                if on_left_out is None:
                    raise row
                fault = row
                on_left_out(prompts[number], str(row))
            else:
                kept.append(number)
                nulls.append(
                    Null(style_of(prompts[number]), {n: tuple(row[s.detector].tolist()) for n, s in at_once.items()})
                )
            on_prompt("first step")
    if not nulls and fault is not None:
        raise fault
    traces: list[Trace] = []
    guidance, sigmas = guidance_of(model, wanted), model.sigmas(wanted.steps)
    for group, members in groupby(kept[:full_runs], lambda number: number // PROMPTS_A_SEED):
        part = [model.encode(prompts[number]) for number in members]
        noise = model.noise(SEED_BASE + group * PROMPTS_A_SEED, wanted.images)
        runs = sample_prompts(
            model, part, guidance, noise, sigmas, None, batch_size, baseline=wanted.baseline, empty=model.encode("")
        )
        for run in runs:
            traces.append(run.trace)
            on_prompt("whole runs")
    return with_whole_runs(Profile(setting_of(model, wanted), tuple(nulls), ordinary=ordinary), traces)


def with_whole_runs(profile: Profile, traces: Sequence[Trace]) -> Profile:
    """The profile with the whole runs of its first prompts: the other scores, and the band of each step.

    Raises ValueError where the runs differ in their number of evaluations, as an adaptive sampler's do, and
    NotMeasured where one has an evaluation without a reading.
    """
    if not traces:
        return profile
    curves = [torch.tensor([t.reading(number) for number in range(len(t.readings))]) for t in traces]
    if len({len(curve) for curve in curves}) > 1:
        raise ValueError("this sampler takes another number of evaluations for each prompt, so its runs do not compare")
    nulls = list(profile.nulls)
    for number, curve in enumerate(curves):
        found = dict(nulls[number].scores)
        for name, score in scores().items():
            if not score.of_first_step and len(curve) >= (score.evaluations or 1):
                found[name] = tuple(traces[number].score(score.evaluations, score.detector).tolist())
        nulls[number] = replace(nulls[number], scores=found)
    low, middle, high = torch.quantile(torch.stack([c.mean(1) for c in curves]), torch.tensor([0.05, 0.5, 0.95]), dim=0)
    sigmas = [reading.sigma for reading in traces[0].readings]
    steps = zip(sigmas, low, middle, high, strict=True)
    return replace(
        profile, nulls=tuple(nulls), band=tuple(BandStep(*(float(f"{v:.7g}") for v in step)) for step in steps)
    )
