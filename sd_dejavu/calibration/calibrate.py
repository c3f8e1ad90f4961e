"""Make a calibration profile: measure ordinary prompts the way prompts will be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from ..core.denoiser import Model
from ..core.trace import Trace
from ..core.verdict import BandStep
from ..detectors import scores
from ..run.measure import Measurement, baseline_of, guidance_of, setting_of
from ..run.reference import sample_prompts
from .first_step import first_step_nulls, seed_of
from .profile import Ordinary, Profile


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

    Every 25 prompts share a noise of their own, so that the nulls vary over noises as well as over prompts. They are
    not quite independent then: of the variance of scores 2% come from the noise on the bundled model with one image,
    and less than 0.1% with four. ``ordinary`` says which prompts these are. ``on_prompt`` is called with the stage's
    name after each prompt and may raise to interrupt; ``on_left_out`` is that of :func:`first_step_nulls`.
    """
    if not prompts:
        raise ValueError("calibration needs ordinary prompts, none were given")
    sigma, base = model.sigmas(wanted.steps)[0], baseline_of(model, wanted)

    def first_step_done() -> None:
        on_prompt("first step")

    nulls = first_step_nulls(model, prompts, base, sigma, wanted.images, batch_size, first_step_done, on_left_out)
    traces: list[Trace] = []
    guidance, sigmas = guidance_of(model, wanted), model.sigmas(wanted.steps)
    for seed, members in groupby(list(nulls)[:full_runs], seed_of):
        part = [model.encode(prompts[number]) for number in members]
        noise = model.noise(seed, wanted.images)
        runs = sample_prompts(
            model, part, guidance, noise, sigmas, None, batch_size, baseline=wanted.baseline, empty=model.encode("")
        )
        for run in runs:
            traces.append(run.trace)
            on_prompt("whole runs")
    return with_whole_runs(Profile(setting_of(model, wanted), tuple(nulls.values()), ordinary=ordinary), traces)


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
