"""The reference sampler: DDIM with classifier-free guidance, over any denoiser.

In the scale x = x0 + sigma * noise a deterministic DDIM step (Song et al., 2021) is
x' = D + (sigma' / sigma) (x - D), with the guided D of :mod:`sd_dejavu.guidance`.
For rectified flow the same formula is Euler's step. Hosts bring their own samplers; this one serves
the command line, calibration and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .conditioning import Conditioning, Unconditional, sharing, stack
from .denoiser import Denoiser, Predictions, initial_latent
from .detectors.magnitude import magnitude
from .guidance import GuidanceRule, GuidedStep, guided
from .memory import in_pieces
from .trace import Trace


@dataclass(frozen=True)
class Guidance:
    """What guidance steers away from, and how strongly.

    ``unconditional`` is the conditioning guidance uses (the negative prompt, or the empty one).
    ``measured_against`` is given where the trace shall be measured against something else: one more
    model evaluation at each measured step.
    """

    unconditional: Conditioning
    scale: float = 7.5
    is_negative_prompt: bool = False
    measured_against: Conditioning | None = None


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    conditional: Conditioning,
    guidance: Guidance,
    trace: Trace | None = None,
    measured_steps: int | None = None,
    on_step: Callable[[int], None] = lambda step: None,
    rule: GuidanceRule | None = None,
    batch_size: int = 32,
) -> Tensor:
    """From x [B, C, H, W] at ``sigmas[0]`` down to the last of ``sigmas``; returns the latents in fp32.

    ``trace`` records the first ``measured_steps`` evaluations (None: all). A shorter ``sigmas`` ends
    the run early. ``on_step`` is called after each step. ``rule`` takes the place of plain guidance. At most
    ``batch_size`` pictures share an evaluation.
    """
    with torch.no_grad():
        for number, (level, following) in enumerate(pairwise(sigmas)):
            sigma = levels_of(x, level)
            ask = partial(predict, denoiser, x, sigma, batch_size=batch_size)
            with_prompt, without = ask(conditional), ask(guidance.unconditional)
            if trace is not None and (measured_steps is None or number < measured_steps):
                if guidance.measured_against is None:
                    kind: Unconditional = "negative prompt" if guidance.is_negative_prompt else "empty prompt"
                    trace.record(Predictions(with_prompt, without, sigma, kind))
                else:
                    trace.record(Predictions(with_prompt, ask(guidance.measured_against), sigma))
            if rule is None:
                denoised = guided(with_prompt, without, guidance.scale)
            else:
                denoised = rule(GuidedStep(x, sigma, with_prompt, without, guidance.scale, number, ask))
            x = denoised + (following / level) * (x - denoised)
            on_step(number)
    return x


@dataclass(frozen=True)
class Run:
    """One prompt's pictures: the trace of all its images, and their final latents [images, C, H, W]."""

    trace: Trace
    latents: Tensor


def batches(keys: Sequence[Any], images: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """(prompt, image) pairs in batches of prompts with one key; see :func:`sd_dejavu.conditioning.sharing`."""
    for key in sorted(set(keys)):
        jobs = [(p, i) for p, known in enumerate(keys) if known == key for i in range(images)]
        for start in range(0, len(jobs), batch_size):
            yield jobs[start : start + batch_size]


def sample_prompts(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    guidance: Guidance,
    noise: Tensor,
    sigmas: Sequence[float],
    evaluations: int | None = None,
    batch_size: int = 32,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> list[Run]:
    """Every prompt on the same noise [images, C, H, W]; prompts of one length share batches.

    The images of a prompt are sampled together, however few share an evaluation. ``evaluations`` ends each run after
    that many steps (None: to the end of ``sigmas``). ``on_prompts`` gets the prompts just done.
    """
    images = noise.shape[0]
    x = initial_latent(noise, sigmas[0], denoiser.prediction_type)
    path = sigmas if evaluations is None else sigmas[: evaluations + 1]
    runs: dict[int, Run] = {}
    for part in batches(sharing(conditionings), 1, max(1, batch_size // images)):
        prompts = [prompt for prompt, _ in part]
        together = stack([conditionings[p] for p in prompts]).repeat(images)
        trace = Trace()
        latents = sample(
            denoiser, x.repeat(len(prompts), 1, 1, 1), path, together, guidance, trace, batch_size=batch_size
        )
        trace.settle()  # else it keeps more of each batch on the device than will be asked for
        for place, prompt in enumerate(prompts):
            start, stop = place * images, (place + 1) * images
            runs[prompt] = Run(trace.of_images(start, stop), latents[start:stop])
        on_prompts(len(prompts))
    return [runs[p] for p in range(len(conditionings))]


def first_step(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    unconditional: Conditioning,
    noise: Tensor,
    sigma: float,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """First-step magnitudes [number of prompts, images] of many prompts on the same noise [images, C, H, W].

    ``progress`` is called with the evaluations just done. Raises ValueError when a prediction is not finite.
    """
    scores = torch.empty(len(conditionings), noise.shape[0])
    for part, predictions in first_predictions(denoiser, conditionings, unconditional, noise, sigma, batch_size):
        for (prompt, image), value in zip(part, magnitude(predictions).cpu(), strict=True):
            scores[prompt, image] = value
        progress(len(part))
    return scores


def first_predictions(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    unconditional: Conditioning,
    noise: Tensor,
    sigma: float,
    batch_size: int = 32,
) -> Iterator[tuple[list[tuple[int, int]], Predictions]]:
    """Both predictions at x_T for every prompt on every noise [images, C, H, W], batch after batch.

    Each batch comes with its (prompt, image) numbers. At x_T the unconditional prediction of a noise is the same for
    every prompt, so it is computed once; prompts and images then share batches. Raises ValueError when a prediction
    is not finite.
    """
    x = initial_latent(noise, sigma, denoiser.prediction_type)
    levels = levels_of(x, sigma)
    base = predict(denoiser, x, levels, unconditional, batch_size)
    for part in batches(sharing(conditionings), noise.shape[0], batch_size):
        which = [image for _, image in part]
        together = stack([conditionings[p] for p, _ in part])
        denoised = predict(denoiser, x[which], levels[which], together, batch_size)
        if not torch.isfinite(denoised).all() or not torch.isfinite(base).all():
            raise ValueError("the model's predictions are not finite (NaN or infinity): its weights may be broken")
        yield part, Predictions(denoised, base[which], levels[which])


def levels_of(x: Tensor, sigma: float) -> Tensor:
    """The noise level of each picture of a batch, [B]."""
    return torch.full((x.shape[0],), sigma, device=x.device)


def predict(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, batch_size: int = 32) -> Tensor:
    """The denoised prediction [B, C, H, W] under a conditioning of batch 1 or B, without gradients.

    At most ``batch_size`` pictures share an evaluation, fewer where memory runs out. Raises OutOfMemory where it does
    not suffice for one.
    """

    def evaluation(start: int, stop: int) -> Tensor:
        return denoiser(x[start:stop], sigma[start:stop], conditioning.of_pictures(start, stop, len(x)))

    with torch.no_grad():
        parts = list(in_pieces(evaluation, len(x), conditioning.pictures_at_once(len(x), batch_size)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
