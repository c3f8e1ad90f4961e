"""Mitigations: what to sample with instead. One method a file; the folder is the register.

Whatever a method touches (the prompt's text, its conditioning, the noise a run starts from, guidance, or
attention), its answer is an :class:`Outcome`, and an outcome is sampled in one way: its conditioning, which
carries its attention rule, from its x_T, under a guidance rule made for the run.

A module of this folder that mitigates ends in ``MITIGATIONS``, a tuple of :class:`Mitigation`; nothing
else has to know of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from ..attention import AttentionRule
from ..conditioning import Conditioning
from ..denoiser import Denoiser, Model, Predictions, initial_latent
from ..detectors.magnitude import magnitude
from ..guidance import GuidanceRule
from ..sampling import levels_of, predict
from .guard import Guard

Touches = Literal["prompt", "conditioning", "noise", "guidance", "attention"]


@dataclass(frozen=True)
class Start:
    """Where a run begins: x_T [images, C, H, W] at sigma, what it is measured against, and the score aimed at.

    ``base`` is the denoised prediction there without the prompt, computed once. ``ordinary`` is the highest
    score that still counts as ordinary, for methods that stop there; the target where it is not known.
    ``unconditional`` is None where a host hands over its prediction only: methods that move x_T need it.
    ``guard`` holds the reference pictures of methods that compare with them.
    """

    x: Tensor
    sigma: Tensor
    noise: Tensor
    unconditional: Conditioning | None
    base: Tensor
    target: float
    seed: int = 0
    ordinary: float | None = None
    guard: Guard | None = None

    @property
    def acceptable(self) -> float:
        return self.target if self.ordinary is None else self.ordinary

    @classmethod
    def of(
        cls,
        model: Model,
        noise: Tensor,
        sigma: float,
        unconditional: Conditioning,
        target: float,
        seed: int = 0,
        ordinary: float | None = None,
        guard: Guard | None = None,
    ) -> Start:
        x = initial_latent(noise, sigma, model.prediction_type)
        levels = levels_of(x, sigma)
        base = predict(model, x, levels, unconditional)
        return cls(x, levels, noise, unconditional, base, target, seed, ordinary, guard)

    def moved(self, denoiser: Denoiser, x: Tensor) -> Start:
        """The same run from another x_T; one more evaluation without the prompt.

        Raises ValueError where the conditioning without the prompt is not at hand.
        """
        if self.unconditional is None:
            raise ValueError("the conditioning without the prompt is not at hand here, so the noise cannot be changed")
        return replace(self, x=x, base=predict(denoiser, x, self.sigma, self.unconditional))

    def score(self, denoiser: Denoiser, conditioning: Conditioning) -> float:
        """Mean first-step magnitude over the images, without gradients."""
        denoised = predict(denoiser, self.x, self.sigma, conditioning)
        return float(magnitude(Predictions(denoised, self.base, self.sigma)).mean())


@dataclass(frozen=True)
class Outcome:
    """What to go on with, the first-step score before and after, and how it was reached.

    ``x`` is the x_T [images, C, H, W] to sample from instead, at the noise level of the start; None leaves it.
    ``rule`` makes a guidance rule for one run; None leaves plain guidance. ``conditioning`` carries the attention
    rule where there is one.
    """

    conditioning: Conditioning
    score_before: float
    score_after: float
    details: dict[str, Any] = field(default_factory=dict)
    x: Tensor | None = None
    rule: Callable[[], GuidanceRule] | None = None

    @classmethod
    def unchanged(cls, conditioning: Conditioning, score: float) -> Outcome:
        """Nothing needs to be done: the run goes on as it came."""
        return cls(conditioning, score, score, {"reached": True})

    @property
    def attention(self) -> AttentionRule | None:
        return self.conditioning.attention


@dataclass(frozen=True)
class Mitigation:
    """``settings`` is the method's settings class; ``apply(model, conditioning, start, settings)`` does it."""

    name: str
    help: str
    touches: Touches
    cost: str
    settings: type
    apply: Callable[[Model, Conditioning, Start, Any], Outcome]
    needs_references: bool = False


def available() -> dict[str, Mitigation]:
    """All mitigations of this folder by name, in the order of their files."""
    found: dict[str, Mitigation] = {}
    for module in pkgutil.iter_modules(__path__):
        for method in getattr(importlib.import_module(f"{__name__}.{module.name}"), "MITIGATIONS", ()):
            found[method.name] = method
    return found
