"""The reference sampler: DDIM with classifier-free guidance, over any denoiser.

In the scale x = x0 + sigma * noise a deterministic DDIM step (Song et al., 2021) is
x' = D + (sigma' / sigma) (x - D), with the guided D of :mod:`sd_dejavu.core.guidance`.
For rectified flow the same formula is Euler's step. Hosts bring their own samplers; this one serves
the command line, calibration and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..detectors import Read
from ..detectors.magnitude import magnitude
from .conditioning import Baseline, Conditioning, sharing, stack
from .denoiser import Denoiser, Evaluation, Predictions, initial_latent
from .guidance import GuidanceRule, GuidedStep, guided
from .memory import in_pieces


@dataclass(frozen=True)
class Guidance:
    """What guidance steers away from, the negative prompt or the empty one, and how strongly."""

    unconditional: Conditioning
    scale: float = 7.5
    is_negative_prompt: bool = False

    @property
    def kind(self) -> Baseline:
        return "negative prompt" if self.is_negative_prompt else "empty prompt"


def sample(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    conditional: Conditioning,
    guidance: Guidance,
    observe: Callable[[Evaluation], object] = lambda evaluation: None,
    on_step: Callable[[int], None] = lambda step: None,
    rule: GuidanceRule | None = None,
    batch_size: int = 32,
) -> Tensor:
    """From x [B, C, H, W] at ``sigmas[0]`` down to the last of ``sigmas``; returns the latents in fp32.

    ``observe`` is given every evaluation, and ``on_step`` its number after each step. A shorter ``sigmas`` ends the run
    early. ``rule`` takes the place of plain guidance. At most ``batch_size`` images share an evaluation.
    """
    with torch.no_grad():
        for number, (level, following) in enumerate(pairwise(sigmas)):
            sigma = levels_of(x, level)
            ask = partial(predict, denoiser, x, sigma, batch_size=batch_size)
            with_prompt, unconditional = ask(conditional), ask(guidance.unconditional)
            observe(Evaluation(x, sigma, with_prompt, unconditional, guidance.kind))
            if rule is None:
                denoised = guided(with_prompt, unconditional, guidance.scale)
            else:
                denoised = rule(GuidedStep(x, sigma, with_prompt, unconditional, guidance.scale, number, ask))
            x = denoised + (following / level) * (x - denoised)
            on_step(number)
    return x


def batches(keys: Sequence[Any], images: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """(prompt, image) pairs in batches of prompts with one key; see :func:`sd_dejavu.core.conditioning.sharing`."""
    for key in sorted(set(keys)):
        jobs = [(p, i) for p, known in enumerate(keys) if known == key for i in range(images)]
        for start in range(0, len(jobs), batch_size):
            yield jobs[start : start + batch_size]


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
    reads = {"magnitude": magnitude}
    return first_readings(denoiser, conditionings, unconditional, noise, sigma, reads, batch_size, progress)[
        "magnitude"
    ]


def first_readings(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    unconditional: Conditioning,
    noise: Tensor,
    sigma: float,
    reads: Mapping[str, Read],
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """The same for what several detectors read, [number of prompts, images] each, from the same evaluations."""
    found = {name: torch.empty(len(conditionings), noise.shape[0]) for name in reads}
    for part, predictions in first_predictions(denoiser, conditionings, unconditional, noise, sigma, batch_size):
        for name, read in reads.items():
            for (prompt, image), value in zip(part, read(predictions).cpu(), strict=True):
                found[name][prompt, image] = value
        progress(len(part))
    return found


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
    """The noise level of each image of a batch, [B]."""
    return torch.full((x.shape[0],), sigma, device=x.device)


def predict(denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, batch_size: int = 32) -> Tensor:
    """The denoised prediction [B, C, H, W] under a conditioning of batch 1 or B, without gradients.

    At most ``batch_size`` images share an evaluation, fewer where memory runs out. Raises OutOfMemory where it does
    not suffice for one.
    """

    def evaluation(start: int, stop: int) -> Tensor:
        return denoiser(x[start:stop], sigma[start:stop], conditioning.of_images(start, stop, len(x)))

    with torch.no_grad():
        parts = list(in_pieces(evaluation, len(x), conditioning.images_at_once(len(x), batch_size)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
