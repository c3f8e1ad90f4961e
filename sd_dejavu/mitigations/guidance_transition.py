"""Guidance transition: no guidance until the magnitude's first local minimum, then as usual.

Jain et al.: *Classifier-Free Guidance inside the Attraction Basin May Cause Memorization*, CVPR 2025. Guidance pulls a memorised prompt's run into its training
image while || Delta_t ||_2 is high; without it the run leaves that basin, which the first local minimum of
|| Delta_t || shows. Until there the guidance scale is 0, or -s ('opposite'):

    D_t = D_u + g_t (D_c - D_u),   g_t = s from the first t with || Delta_t || > || Delta_{t-1} || on, else 0 or -s.

Each image of a batch has its own transition. No gradients; both predictions are there anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.guidance import GuidedStep, OfImages, guided
from ..core.settings import Checked, option
from ..detectors.magnitude import magnitude
from . import Mitigation, Outcome, Start

Before = Literal["off", "opposite"]


@dataclass(frozen=True)
class Settings(Checked):
    before_transition: Before = option(
        "off",
        "guidance before the transition; off: the prediction without the prompt, opposite: away from the prompt",
        choices=get_args(Before),
    )


class Transition:
    """The rule of one run. Of evaluations at one noise level only the first counts (samplers of second order)."""

    def __init__(self, before: Before) -> None:
        self._before = before
        self._lowest_sigma: Tensor | None = None
        self._last: Tensor | None = None
        self.guiding: Tensor | None = None  # [B]: which images have passed their transition

    def __call__(self, step: GuidedStep) -> Tensor:
        """Raises ValueError in a run without guidance."""
        if step.scale == 1:
            raise ValueError(TRANSITION.refusal("epsilon", guided=False))
        if self._lowest_sigma is None or self._last is None or self.guiding is None:
            self.guiding = torch.zeros(len(step.x), dtype=torch.bool, device=step.x.device)
            self._last = torch.full((len(step.x),), torch.inf, device=step.x.device)
            self._lowest_sigma = torch.full_like(self._last, torch.inf)
        found, falls = magnitude(step.predictions), step.sigma < self._lowest_sigma
        self.guiding = self.guiding | (falls & (found > self._last))
        self._last = torch.where(falls, found, self._last)
        self._lowest_sigma = torch.minimum(self._lowest_sigma, step.sigma)
        early = (
            step.unconditional if self._before == "off" else guided(step.conditional, step.unconditional, -step.scale)
        )
        return torch.where(self.guiding[:, None, None, None], step.plain, early)


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    scores = start.scores(model, conditioning)
    score, images = float(scores.max()), start.to_change(scores)
    if not images.any():
        return Outcome.unchanged(conditioning, score)
    rule = partial(OfImages, images, partial(Transition, settings.before_transition))
    return Outcome(conditioning, score, score, rule=rule)


TRANSITION = Mitigation(
    "guidance-transition",
    "no guidance until the magnitude's first local minimum",
    touches="guidance",
    cost="one evaluation",
    settings=Settings,
    work=_apply,
    release=(0, 1),
    prediction_types=("epsilon", "v_prediction"),
    needs_guidance=True,
    why_not="the curve whose minimum counts is that of noise predictions, which begins at 0 on flow models",
)
MITIGATIONS = (TRANSITION,)
