"""Measure prompts with a model and judge them: prompt -> trace -> score -> p-value -> verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from ..calibration.profile import ALPHA_DEFAULT, Profile, Setting
from ..core.conditioning import Baseline, Conditioning
from ..core.denoiser import Model, initial_latent
from ..core.memory import one_by_one
from ..core.sampling import Guidance, first_readings
from ..core.settings import Checked, option
from ..core.trace import NotMeasured
from ..core.verdict import Explanation, Verdict
from ..detectors import scores
from ..detectors.magnitude import magnitude, rounding
from ..mitigations import Outcome
from .judge import NOTHING_TO_COMPARE, judge
from .reference import Run, sample_prompts, sampled


@dataclass(frozen=True)
class Measurement(Checked):
    """Settings of a measurement, the same in every front end."""

    score: str = option("first step", "which evaluations the score averages", choices=tuple(scores()))
    images: int = option(4, "images (noises) a prompt; the score is their mean", minimum=1, maximum=64)
    steps: int = option(50, "sampling steps; they fix the noise level of the first step", minimum=1, maximum=1000)
    seed: int = option(0, "seed of the noise", minimum=0, maximum=2**63 - 1)
    guidance_scale: float = option(7.5, "strength of classifier-free guidance", minimum=0, maximum=100)
    negative: str = option("", "negative prompt that guidance steers away from")
    baseline: Baseline = option(
        "empty prompt", "what the prompt is measured against", choices=get_args(Baseline), former="without"
    )
    alpha: float = option(
        ALPHA_DEFAULT, "flag a prompt when its p-value is at most this", minimum=0, maximum=1, exclusive=True
    )


@dataclass(frozen=True)
class Measured:
    """One prompt's readings: score an image [images], mean magnitude a step, or why there is none."""

    prompt: str
    scores: Tensor | None
    per_step: tuple[tuple[float, float | None], ...]
    latents: Tensor | None = None
    where: Tensor | None = None
    why: str | None = None
    out_of_memory: bool = False


def setting_of(model: Model, wanted: Measurement) -> Setting:
    return Setting(
        model=model.fingerprint,
        prediction_type=model.prediction_type,
        latent_shape=model.latent_shape,
        steps=wanted.steps,
        sigma=model.sigmas(wanted.steps)[0],
        guidance_scale=wanted.guidance_scale,
        baseline=wanted.baseline,
        negative_prompt=wanted.negative,
        patches=model.patches,
        text_encoder=model.text_encoder,
    )


def guidance_of(model: Model, wanted: Measurement) -> Guidance:
    """Guidance against the negative prompt, or the empty one."""
    return Guidance(model.encode(wanted.negative), wanted.guidance_scale, bool(wanted.negative.strip()))


def baseline_of(model: Model, wanted: Measurement) -> Conditioning:
    """What prompts are measured against."""
    return model.encode(wanted.negative if wanted.baseline == "negative prompt" else "")


def measure(
    model: Model,
    prompts: Sequence[str],
    wanted: Measurement,
    batch_size: int = 32,
    on_progress: Callable[[float], None] = lambda prompts_done: None,
) -> list[Measured]:
    """Measure every prompt on the same seeded noise. ``on_progress`` gets the prompts done, in fractions.

    Only as many steps are run as the score needs. A prompt for which memory does not suffice is not measured, and
    says why. Raises ValueError for a prompt that is too long.
    """
    done = 0.0

    def work(part: Sequence[str]) -> list[Measured]:
        nonlocal done
        before = done
        found = _measure(model, part, wanted, batch_size, lambda count: on_progress(before + count))
        done = before + len(part)
        return found

    return [
        found if isinstance(found, Measured) else Measured(prompt, None, (), why=str(found), out_of_memory=True)
        for prompt, found in zip(prompts, one_by_one(work, prompts), strict=True)
    ]


def _measure(
    model: Model,
    prompts: Sequence[str],
    wanted: Measurement,
    batch_size: int,
    on_progress: Callable[[float], None],
) -> list[Measured]:
    conditionings = [model.encode(prompt) for prompt in prompts]
    noise = model.noise(wanted.seed, wanted.images)
    if scores()[wanted.score].of_first_step:
        return _measure_first_step(model, conditionings, noise, wanted, batch_size, on_progress)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done)

    return measure_runs(model, conditionings, noise, wanted, scores()[wanted.score].evaluations, batch_size, progress)


def _measure_first_step(
    model: Model,
    conditionings: Sequence[Conditioning],
    noise: Tensor,
    wanted: Measurement,
    batch_size: int,
    on_progress: Callable[[float], None],
) -> list[Measured]:
    sigma = model.sigmas(wanted.steps)[0]
    done = 0

    def progress(evaluations: int) -> None:
        nonlocal done
        done += evaluations
        on_progress(done / noise.shape[0])

    base, chosen = baseline_of(model, wanted), scores()[wanted.score]
    wanted_reads = {"magnitude": magnitude, chosen.detector: chosen.read}
    found = first_readings(model, conditionings, base, noise, sigma, wanted_reads, batch_size, progress)
    equal = rounding(noise[0].numel(), sigma)
    return [
        Measured(c.prompt, row, ((sigma, float(lengths.mean())),))
        if bool((lengths > equal).all())
        else Measured(c.prompt, None, ((sigma, None),), why="both predictions are equal: the prompt acts on nothing")
        for c, row, lengths in zip(conditionings, found[chosen.detector], found["magnitude"], strict=True)
    ]


def measure_runs(
    model: Model,
    conditionings: Sequence[Conditioning],
    noise: Tensor,
    wanted: Measurement,
    evaluations: int | None = None,
    batch_size: int = 32,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> list[Measured]:
    """Sample the images of each prompt from noise [images, C, H, W] and measure on the way.

    ``evaluations`` ends the runs early (None: to the end, so that the latents are images).
    """
    guidance, sigmas = guidance_of(model, wanted), model.sigmas(wanted.steps)
    empty = model.encode("")
    runs = sample_prompts(
        model, conditionings, guidance, noise, sigmas, evaluations, batch_size, on_prompts, wanted.baseline, empty
    )
    return [_measured(run, conditioning.prompt, wanted) for run, conditioning in zip(runs, conditionings, strict=True)]


def sampled_with(model: Model, outcome: Outcome, x: Tensor, wanted: Measurement, batch_size: int = 32) -> Measured:
    """The images of one prompt under a mitigation, whatever it touches, measured on the way.

    x [images, C, H, W] is the run's x_T, from which it starts unless the outcome says otherwise.
    """
    start = x if outcome.x is None else outcome.x
    rule = None if outcome.rule is None else outcome.rule()
    guidance, sigmas = guidance_of(model, wanted), model.sigmas(wanted.steps)
    given, empty = [outcome.conditioning], model.encode("")
    (run,) = sampled(model, given, guidance, start, sigmas, rule, batch_size, wanted.baseline, empty)
    return _measured(run, outcome.conditioning.prompt, wanted)


def _measured(run: Run, prompt: str, wanted: Measurement) -> Measured:
    per_step = tuple((r.sigma, None if r.values is None else sum(r.values) / len(r.values)) for r in run.trace.readings)
    try:
        chosen = scores()[wanted.score]
        found = run.trace.score(chosen.evaluations, chosen.detector)
    except NotMeasured as error:
        return Measured(prompt, None, per_step, run.latents, why=str(error))
    return Measured(prompt, found, per_step, run.latents, run.trace.where())


def verdict_on(
    measured: Measured,
    wanted: Measurement,
    setting: Setting,
    profile: Profile | None,
    explanation: Explanation | None = None,
) -> Verdict:
    """The verdict on one measured prompt; without a fitting profile it has a score but no p-value."""
    verdict = Verdict(
        prompt=measured.prompt,
        score=None if measured.scores is None else float(measured.scores.mean()),
        p_value=None,
        flagged=None,
        alpha=wanted.alpha,
        score_kind=wanted.score,
        images=wanted.images,
        baseline=wanted.baseline,
        score_per_step=measured.per_step,
        why=measured.why,
        explanation=explanation,
    )
    if profile is not None or verdict.score is None:
        return verdict if profile is None else judge(verdict, setting, profile)
    return replace(
        verdict,
        why=f"{NOTHING_TO_COMPARE}: make a calibration with 'sd-dejavu calibrate', or check with --calibrate-first 100",
    )


def start_of_run(model: Model, wanted: Measurement) -> tuple[Tensor, Tensor]:
    """x_T [images, C, H, W] and its sigma [images]: where explanations and mitigations act."""
    sigma = model.sigmas(wanted.steps)[0]
    noise = model.noise(wanted.seed, wanted.images)
    return initial_latent(noise, sigma, model.prediction_type), torch.full((wanted.images,), sigma, device=noise.device)
