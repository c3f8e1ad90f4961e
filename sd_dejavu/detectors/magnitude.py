"""Magnitude of the text-conditional noise prediction.

Wen, Liu, Chen, Lyu: *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*, ICLR
2024, equation 2: d = 1/T sum_t || eps(x_t, prompt) - eps(x_t, empty) ||_2. Memorised prompts move the
prediction far, and the same way for every noise; the first step alone tells.

With denoised predictions D and x = x0 + sigma * noise the same number is || D_c - D_u ||_2 / sigma.
For rectified flow that expression is the norm of the velocity difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..conditioning import Conditioning, stack
from ..denoiser import Denoiser, Predictions, initial_latent, over_pixels


def difference(predictions: Predictions) -> Tensor:
    """Noise-prediction (flow: velocity) difference [B, C, H, W] in fp32."""
    gap = predictions.unconditional.float() - predictions.conditional.float()
    return gap / over_pixels(predictions.sigma)


def magnitude(predictions: Predictions) -> Tensor:
    """|| Delta ||_2 of each image, [B], fp32. Differentiable except where the difference is zero."""
    return difference(predictions).flatten(1).norm(dim=1)


def magnitude_of_noise_predictions(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """The same from two noise predictions [B, C, H, W]."""
    return (conditional.float() - unconditional.float()).flatten(1).norm(dim=1)


def squared_difference_map(predictions: Predictions) -> Tensor:
    """Where the prompt acts: Delta^2 averaged over channels, [B, H, W] (Kim & Lee, ICML 2026)."""
    return difference(predictions).square().mean(dim=1)


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

    At x_T the unconditional prediction of a noise is the same for every prompt, so it is computed once;
    all prompts and images then share batches. ``progress`` is called with the evaluations just done.
    Raises ValueError when a prediction is not finite.
    """
    images = noise.shape[0]
    x = initial_latent(noise, sigma, denoiser.prediction_type)
    levels = torch.full((images,), sigma, device=x.device)
    with torch.no_grad():
        base = torch.cat(
            [denoiser(x[i : i + batch_size], levels[i : i + batch_size], unconditional) for i in range(0, images, batch_size)]
        )
    scores = torch.empty(len(conditionings), images)
    lengths = [c.rows.shape[1] for c in conditionings]
    for length in sorted(set(lengths)):
        jobs = [(p, i) for p, n in enumerate(lengths) if n == length for i in range(images)]
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            which = [i for _, i in part]
            with torch.no_grad():
                denoised = denoiser(x[which], levels[which], stack([conditionings[p] for p, _ in part]))
                values = magnitude(Predictions(denoised, base[which], levels[which])).cpu()
            for (p, i), value in zip(part, values, strict=True):
                scores[p, i] = value
            progress(len(part))
    if not torch.isfinite(scores).all():
        raise ValueError("the model's predictions are not finite (NaN or infinity): its weights may be broken")
    return scores
