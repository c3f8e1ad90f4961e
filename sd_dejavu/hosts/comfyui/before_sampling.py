"""Work before the sampler: explain, mitigate and calibrate from the noise that a run would begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...calibration.calibrate import calibrate as run_calibration
from ...calibration.calibrate import with_whole_runs
from ...calibration.first_step import seed_of
from ...calibration.profile import ORDINARY_QUANTILE, Ordinary, Profile
from ...core.conditioning import Conditioning, Unconditional
from ...mitigations import Mitigation, Outcome, Start
from ...run.measure import Measurement
from ...run.monitoring import Monitoring, method_for
from ...run.report import Report
from ...run.state import RunState
from .api import CLIP, Entry, HostConditioning, ModelPatcher
from .attention import RULE, heeding
from .evaluation import covers
from .model import ComfyModel, ordinary_for, with_model
from .monitor import Monitor
from .setting import kind_of, profile_for, setting_of
from .text import SOURCE, Source, conditioning_of, empty_prompt, encode_text, options_with


def examine(
    patcher: ModelPatcher,
    positive: HostConditioning,
    negative: HostConditioning,
    start: tuple[Tensor, Tensor, Tensor],
    monitoring: Monitoring,
    profile: Profile | None,
    folder: Path | None,
    on_progress: Callable[[str, RunState], None],
) -> Report:
    """The report on a run's first step without the run; ``start`` is its latent, noise and sigmas."""
    first_step = replace(monitoring, when_flagged="report", score="first step")
    monitor = Monitor(first_step, profile, folder, on_progress=on_progress)
    latent, noise, sigmas = start

    def sample(
        model: Any, x: Tensor, step_sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        model(x, step_sigmas[0].expand(x.shape[0]), **(extra_args or {}))
        return x

    guider = comfy.samplers.CFGGuider(monitor.attach(patcher))
    guider.set_conds(positive, negative)
    guider.set_cfg(7.0)  # any scale that lets both predictions be made; the first step does not depend on it
    guider.sample(noise, latent, comfy.samplers.KSAMPLER(sample), sigmas, disable_pbar=True)
    return Report.of(monitor.runs[-1].state)


def mitigate(
    patcher: ModelPatcher,
    positive: HostConditioning,
    negative: HostConditioning,
    start: tuple[Tensor, Tensor, Tensor],
    seed: int,
    target: float,
    name: str,
    settings: object,
    profile: Profile | None,
    folder: Path | None,
) -> tuple[HostConditioning, ModelPatcher, dict[str, object]]:
    """The conditioning that the method of this name gives, the model to sample it with, and what was done as plain values.

    ``start`` is the run's latent, noise and sigmas, ``seed`` for methods that draw words. Raises ValueError where the
    prompt has several conditionings, its text is needed and not known, or no target is given and no calibration found.
    """
    if len(positive) != 1:
        raise ValueError(f"the prompt is combined from {len(positive)} conditionings; mitigate each before combining")
    latent, noise, sigmas = start
    options = dict(positive[0][1])

    def work(model: ComfyModel, x: Tensor, sigma: Tensor) -> tuple[Mitigation, Outcome]:
        conditioning, begin = begin_of(model, x, sigma, positive, target, profile, folder)
        method = method_for(name, conditioning)
        if method.touches == "prompt" and not conditioning.prompt:
            raise ValueError(
                f"{name} changes the text of the prompt, which is not known here: encode it with the Text Encode "
                "(Déjà Vu) node"
            )
        return method, method.apply(model, conditioning, replace(begin, seed=seed), settings)

    method, outcome = with_model(patcher, positive, latent, noise, sigmas, work, negative=negative)
    changed = outcome.conditioning
    rows = changed.rows
    options = options_with(options, changed)
    source: Source | None = options.pop(SOURCE, None)
    if source is not None and method.touches != "conditioning":  # moved rows are what no text encodes to
        options[SOURCE] = source if changed.prompt == source.text else Source(source.clip, changed.prompt)
    if changed.attention is not None:
        rows, options[RULE] = changed.attention.rows(rows), changed.attention
        patcher = heeding(patcher)
    document = {
        "method": method.name,
        "score_before": outcome.score_before,
        "score_after": outcome.score_after,
        **({"prompt": changed.prompt} if method.touches == "prompt" else {}),
        **{k: list(v) if isinstance(v, tuple) else v for k, v in outcome.details.items()},
    }
    # The host batches conditionings only where they lie on one device: here, where it keeps those of the prompt.
    if isinstance(pooled := options.get("pooled_output"), Tensor):
        options["pooled_output"] = pooled.to(positive[0][0].device)
    return [[rows.to(positive[0][0]), options]], patcher, document


def begin_of(
    model: ComfyModel,
    x: Tensor,
    sigma: Tensor,
    positive: HostConditioning,
    target: float,
    profile: Profile | None,
    folder: Path | None,
) -> tuple[Conditioning, Start]:
    """The prompt and the start of the run for a mitigation; a target of 0 takes it from the calibration.

    Raises ValueError where no target is given and no calibration found, or it is for another setting, and where the
    prompt or negative prompt does not act at the first step.
    """
    conditioning = conditioning_of(positive[0][0], positive[0][1])
    entries = model.negative
    for name, given in (("prompt", [model.entry]), ("negative prompt", entries)):
        if not covers(given, float(sigma[0])):
            raise ValueError(
                f"the {name} does not act on the whole image at the first step (an area, mask or range): give one "
                "that does"
            )
    unconditional, kind = model.of_the_host(entries), kind_of(entries, model.clip)
    goal, ordinary = target, None
    if not goal:
        known, why = _calibration_for(model, kind, entries, profile, folder)
        if why and kind != "empty prompt" and model.clip is not None:  # one for the empty prompt serves every negative
            known, other = _calibration_for(model, "empty prompt", entries, profile, folder)
            if not other:
                unconditional, why = empty_prompt(model.clip), ""
        if known is None or why:
            raise ValueError(why)
        goal = known.quantile(0.5, "first step", 1)
        ordinary = known.quantile(ORDINARY_QUANTILE, "first step", 1)
    with torch.no_grad():
        base = model(x, sigma, unconditional)
    with torch.inference_mode(False):
        return conditioning, Start(x.clone(), sigma.clone(), x, unconditional, base.clone(), goal, ordinary=ordinary)


def _calibration_for(
    model: ComfyModel, kind: Unconditional, entries: list[Entry], profile: Profile | None, folder: Path | None
) -> tuple[Profile | None, str]:
    """The calibration to take a target from, and why it is of no use."""
    setting = setting_of(model, kind, entries, 1.0)
    known = profile or profile_for(setting, model, Monitoring(), folder)
    if known is None:
        return None, "there is no calibration to take the target from: calibrate, or give a target"
    why = known.setting.mismatch(setting, "first step")
    return known, f"the calibration is for another setting: {why}" if why else ""


def calibrate(
    patcher: ModelPatcher,
    clip: CLIP,
    latent: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    negative: str,
    count: int,
    on_prompt: Callable[[str], None],
    whole_runs: int = 0,
    sampler: object = None,
    scale: float = 7.0,
    like: Sequence[str] = (),
) -> Profile:
    """First-step scores of ``count`` ordinary prompts, at the first of ``sigmas``; one image each.

    The first ``whole_runs`` of them are sampled to the end with the host's ``sampler`` at this guidance ``scale``. They
    are recombined from the prompts ``like`` them where there are any.
    """
    prompts = ordinary_for(patcher, count, like)
    ordinary: Ordinary = "recombined" if like else "generated"
    wanted = Measurement(
        images=1,
        steps=max(1, len(sigmas) - 1),
        negative=negative,
        baseline="negative prompt" if negative.strip() else "empty prompt",
    )
    clip.load_model()
    profile = with_model(
        patcher,
        encode_text(clip, ""),
        latent,
        noise,
        sigmas,
        lambda model, x, sigma: run_calibration(model, prompts, wanted, 0, 8, on_prompt, ordinary=ordinary),
    )
    if not whole_runs:
        return profile
    monitor = Monitor(
        Monitoring(baseline=wanted.baseline, explain="never", score="all steps"), clip=clip, every_score=True
    )
    guider = comfy.samplers.CFGGuider(monitor.attach(patcher))
    guider.set_cfg(scale)
    traces = []
    for number, prompt in enumerate(prompts[:whole_runs]):
        guider.set_conds(encode_text(clip, prompt), encode_text(clip, negative))
        noise = comfy.sample.prepare_noise(latent, seed_of(number))
        guider.sample(noise, latent, sampler, sigmas, disable_pbar=True)
        run = monitor.runs[-1]
        traces.append(run.state.trace)
        on_prompt("whole runs")
    setting = replace(profile.setting, guidance_scale=scale, sampler=run.sampler)
    return with_whole_runs(replace(profile, setting=setting), traces)
