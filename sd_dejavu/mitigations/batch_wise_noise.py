"""Batch-wise initial noise: a few steps of x_T to where the prompt moves the prediction less, without gradients.

Han, Kim, Joo, Hong, Lee: *Adjusting Initial Noise to Mitigate Memorization in Text-to-Image Diffusion Models*,
NeurIPS 2025, algorithm 1 (equation 10). With Delta(n) the noise-prediction difference at unit-variance noise n,
M times over the whole batch

    n <- n - gamma [Delta(n + rho Delta(n) / || Delta(n) ||_2) - Delta(n)],

a finite difference for the gradient of the sharpness-aware magnitude; then the run starts from the new noise, and
guidance begins late. The paper's gamma .7, rho 50 and M = 2 are for latents of 4 x 64 x 64, whose noise has a norm
of 128: here rho is counted in expected norms of the noise, sqrt(C H W). Guidance begins at the paper's fifth of 50
steps, told by its noise level (.64 of the first one in Stable Diffusion's schedule), as samplers count differently;
on flow models by the noise over the signal, s / (1 - s), where all above Stable Diffusion's highest count as that.
Each round costs two evaluations with the prompt and two without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Model, Predictions, PredictionType, initial_latent
from ..core.guidance import GuidedStep, OfImages
from ..core.sampling import predict
from ..core.settings import Checked, option
from ..detectors.magnitude import difference
from . import Mitigation, Outcome, Start
from .anti_memorization_guidance import level_of


@dataclass(frozen=True)
class Settings(Checked):
    noise_rounds: int = option(2, "how often the noise is adjusted", minimum=1, maximum=100)
    noise_strength: float = option(0.7, "the paper's gamma: how far each round goes", minimum=0, maximum=100)
    noise_radius: float = option(
        50 / 128,
        "the paper's rho, in norms of the noise: how far away the difference is compared",
        minimum=0,
        maximum=10,
        exclusive=True,
    )
    guidance_from: float = option(
        0.64,
        "guidance begins at this share of the first noise level: 1 at once, 0.64 as published",
        minimum=0,
        maximum=1,
    )


class LateGuidance:
    """The rule of one run: the prediction without the prompt until sigma is at most ``share`` of the first sigma."""

    def __init__(self, share: float, prediction_type: PredictionType = "epsilon") -> None:
        self._share, self._prediction_type = share, prediction_type
        self._first: Tensor | None = None

    def __call__(self, step: GuidedStep) -> Tensor:
        """Raises ValueError in a run without guidance."""
        if step.scale == 1:
            raise ValueError(BATCH_WISE.refusal(self._prediction_type, guided=False))
        is_flow = self._prediction_type == "flow"
        level = level_of(step.sigma, "flow", "stable diffusion") if is_flow else step.sigma
        self._first = level if self._first is None else self._first
        guiding = level <= self._share * self._first
        return torch.where(guiding[:, None, None, None], step.plain, step.unconditional)


def adjust(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Start:
    """The start with its noise adjusted. Raises ValueError where the conditioning without the prompt is not at hand."""
    sigma = float(start.sigma[0])
    unit = float(initial_latent(torch.ones(()), sigma, model.prediction_type))
    radius = settings.noise_radius * start.x[0].numel() ** 0.5

    def delta(at: Start) -> Tensor:
        return difference(Predictions(predict(model, at.x, at.sigma, conditioning, at.batch_size), at.base, at.sigma))

    for _ in range(settings.noise_rounds):
        here = delta(start)
        norms = here.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        there = delta(start.moved(model, start.x + unit * radius * here / norms))
        start = start.moved(model, start.x - unit * settings.noise_strength * (there - here))
    return start


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    scores = start.scores(model, conditioning)
    images = start.to_change(scores)
    if not images.any():
        return Outcome.unchanged(conditioning, float(scores.max()))
    found = adjust(model, conditioning, start, settings)
    late = partial(LateGuidance, settings.guidance_from, model.prediction_type)
    rule = None if settings.guidance_from == 1 else partial(OfImages, images, late)
    after = torch.where(images, found.scores(model, conditioning), scores)
    x = torch.where(images[:, None, None, None], found.x, start.x)
    return Outcome(conditioning, float(scores.max()), float(after.max()), x=x, rule=rule)


BATCH_WISE = Mitigation(
    "batch-wise-noise",
    "adjust the starting noise where the prompt moves the prediction less, and begin guidance late",
    touches="noise",
    cost="two evaluations and two without the prompt a round, no gradients",
    settings=Settings,
    work=_apply,
    release=(0, 1),
    needs_guidance=True,
    remark="on flow the difference is that of velocities, and guidance begins by the noise over the signal",
)
MITIGATIONS = (BATCH_WISE,)
