"""Guidance: what to make of the two predictions of one step.

Classifier-free guidance (Ho & Salimans, 2022) is D = D_u + s (D_c - D_u). A mitigation may put a rule in its
place. A rule is asked at each model evaluation of a host's own sampler, so it may assume nothing of it: levels
may repeat (samplers of second order evaluate twice a step), images of a batch are told apart by their place,
and the sampler ends when it likes. What a rule has to remember it keeps itself, for one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .conditioning import Conditioning
from .denoiser import Predictions, over_pixels


@dataclass(frozen=True)
class GuidedStep:
    """One model evaluation of a guided run.

    x [B, C, H, W] at sigma [B] in the denoiser's scale; both denoised predictions [B, C, H, W]; the guidance
    scale. ``number`` counts the evaluations of the run from 0, whatever their noise levels. ``predict`` gives the
    denoised prediction at the same x and sigma under another conditioning (batch 1 or B): one more evaluation.
    """

    x: Tensor
    sigma: Tensor
    conditional: Tensor
    unconditional: Tensor
    scale: float
    number: int
    predict: Callable[[Conditioning], Tensor]

    @property
    def plain(self) -> Tensor:
        """The guided prediction of a run without a rule."""
        return guided(self.conditional, self.unconditional, self.scale)

    @property
    def predictions(self) -> Predictions:
        return Predictions(self.conditional, self.unconditional, self.sigma)


class GuidanceRule(Protocol):
    """Made anew for each run, and asked once an evaluation, in order."""

    def __call__(self, step: GuidedStep) -> Tensor:
        """The guided denoised prediction [B, C, H, W]. Where the rule has nothing to say it is ``step.plain``."""
        ...


class OfImages:
    """A rule for some images [B] of a batch; the others go on under plain guidance, to the bit."""

    def __init__(self, images: Tensor, make: Callable[[], GuidanceRule]) -> None:
        self._images, self._rule = images, make()

    def __call__(self, step: GuidedStep) -> Tensor:
        """Raises ValueError in a run of another number of images."""
        if len(step.x) != len(self._images):
            raise ValueError(f"this rule was made for {len(self._images)} images, and the run has {len(step.x)}")
        return torch.where(self._images.to(step.x.device)[:, None, None, None], self._rule(step), step.plain)


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """D_u + s (D_c - D_u); ``scale`` is one number, or one an image [B].

    >>> guided(torch.tensor([3.0]), torch.tensor([1.0]), 7.5)  # 1 + 7.5 * 2
    tensor([16.])
    """
    strength = over_pixels(scale) if isinstance(scale, Tensor) else scale
    return unconditional + strength * (conditional - unconditional)
