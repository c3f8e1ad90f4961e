"""Magnitude of the text-conditional noise prediction.

Wen, Liu, Chen, Lyu: *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*, ICLR
2024, equation 2: d = 1/T sum_t || eps(x_t, prompt) - eps(x_t, empty) ||_2. Memorised prompts move the
prediction far, and the same way for every noise; the first step alone tells.

With denoised predictions D and x = x0 + sigma * noise the same number is || D_c - D_u ||_2 / sigma.
For rectified flow that expression is the norm of the velocity difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.denoiser import Predictions, over_pixels
from . import Detector

HIGHEST_OF_EPSILON = 15.0  # Stable Diffusion's schedules end at sigma 14.6


def difference(predictions: Predictions) -> Tensor:
    """Noise-prediction (flow: velocity) difference [B, C, H, W] in fp32."""
    gap = predictions.unconditional.float() - predictions.conditional.float()
    return gap / over_pixels(predictions.sigma)


def length(difference: Tensor) -> Tensor:
    """|| Delta ||_2 of each image, [B], from Delta [B, C, H, W]."""
    found: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return found


def rounding(elements: int, sigma: float) -> float:
    """Two predictions of so many elements that differ by no more than this are equal: hosts evaluate both in one batch,
    and its rows need not be rounded alike.

    1e-5 of unit variance in each element. Above the noise levels of schedules that end before pure noise, only networks
    are sampled that put out v (or EDM's F): there the unit of :func:`magnitude` falls as 1 / sigma, and this with it.
    """
    return 1e-5 * math.sqrt(elements) * min(1.0, HIGHEST_OF_EPSILON / max(sigma, 1e-6))


def over_channels(difference: Tensor) -> Tensor:
    """Where the prompt acts: Delta^2 averaged over channels, [B, H, W], from Delta [B, C, H, W] (Kim & Lee, ICML 2026)."""
    return difference.square().mean(dim=1)


def magnitude(predictions: Predictions) -> Tensor:
    """|| Delta ||_2 of each image, [B], fp32. Differentiable except where the difference is zero.

    >>> with_prompt, without = torch.tensor([[[[3.0, 4.0]]]]), torch.zeros(1, 1, 1, 2)
    >>> magnitude(Predictions(with_prompt, without, sigma=torch.tensor([2.0])))  # 5 / 2
    tensor([2.5000])
    """
    return length(difference(predictions))


def magnitude_of_noise_predictions(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """The same from two noise predictions [B, C, H, W]."""
    return length(conditional.float() - unconditional.float())


DETECTORS = (
    Detector(
        "magnitude",
        "text-conditional noise prediction (Wen et al.)",
        images=(1, 4),
        read=magnitude,
        scores={"first step": 1, "first 5 steps": 5, "all steps": None},
        unit="L2",
    ),
)
