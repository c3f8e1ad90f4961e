"""Mitigations: what to sample with instead. One method a file; the folder is the register.

Whatever a method touches (the prompt's text, its conditioning, the noise a run starts from, guidance, or
attention), its answer is an :class:`Outcome`, and an outcome is sampled in one way: its conditioning, which
carries its attention rule, from its x_T, under a guidance rule made for the run.

A module of this folder that mitigates ends in ``MITIGATIONS``, a tuple of :class:`Mitigation`; nothing
else has to know of it. What a method declares there about models is what refuses the others, and what
docs/mitigations.md shows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ..core.attention import AttentionRule
from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Model, Predictions, PredictionType, initial_latent
from ..core.guidance import GuidanceRule
from ..core.sampling import levels_of, predict
from ..detectors.magnitude import magnitude
from .guard import Guard

NEXT_RELEASE = (99, 0)  # of a method that no release has brought yet
Touches = Literal["prompt", "conditioning", "noise", "guidance", "attention"]


@dataclass(frozen=True)
class Start:
    """Where a run begins: x_T [images, C, H, W] at sigma, what it is measured against, and the score aimed at.

    ``base`` is the denoised prediction there without the prompt, computed once. ``ordinary`` is the highest
    score that still counts as ordinary, for methods that stop there; the target where it is not known.
    ``unconditional`` is None where a host hands over its prediction only: methods that move x_T need it.
    ``guard`` holds the reference images of methods that compare with them. At most ``batch_size`` images share an
    evaluation. ``guided`` is whether the run has classifier-free guidance: at a scale of 1, where distilled models are
    sampled, it has none.
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
    batch_size: int = 32
    guided: bool = True

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
        batch_size: int = 32,
        guided: bool = True,
    ) -> Start:
        x = initial_latent(noise, sigma, model.prediction_type)
        levels = levels_of(x, sigma)
        base = predict(model, x, levels, unconditional, batch_size)
        return cls(x, levels, noise, unconditional, base, target, seed, ordinary, guard, batch_size, guided)

    def moved(self, denoiser: Denoiser, x: Tensor) -> Start:
        """The same run from another x_T; one more evaluation without the prompt.

        Raises ValueError where the conditioning without the prompt is not at hand.
        """
        if self.unconditional is None:
            raise ValueError("the conditioning without the prompt is not at hand here, so the noise cannot be changed")
        base = predict(denoiser, x, self.sigma, self.unconditional, self.batch_size)
        return replace(self, x=x, base=base)

    def scores(self, denoiser: Denoiser, conditioning: Conditioning) -> Tensor:
        """First-step magnitude of each image, [images], without gradients."""
        denoised = predict(denoiser, self.x, self.sigma, conditioning, self.batch_size)
        return magnitude(Predictions(denoised, self.base, self.sigma))

    def score(self, denoiser: Denoiser, conditioning: Conditioning) -> float:
        """The highest first-step magnitude of the images: a batch is ordinary when its worst image is."""
        return float(self.scores(denoiser, conditioning).max())

    def to_change(self, scores: Tensor) -> Tensor:
        """Which images are not ordinary, [images] booleans: a method that can leave the others as they are does."""
        return scores > self.acceptable


@dataclass(frozen=True)
class Outcome:
    """What to go on with, the first-step score of the worst image before and after, and how it was reached.

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
    """``settings`` is the method's settings class; ``work(model, conditioning, start, settings)`` does it.

    ``prediction_types`` are those for which the method is what its paper says, ``needs_guidance`` tells that it has
    nothing to change in a run without classifier-free guidance. ``release`` is the one that brought it: saved workflows
    hold the values of widgets by their place, so newer methods stand behind older ones. ``why_not`` says why others are refused, and
    ``remark`` what is different on flow or distilled models; both are shown to users.
    """

    name: str
    help: str
    touches: Touches
    cost: str
    settings: type
    work: Callable[[Model, Conditioning, Start, Any], Outcome]
    needs_references: bool = False
    prediction_types: tuple[PredictionType, ...] = get_args(PredictionType)
    needs_guidance: bool = False
    why_not: str = ""
    remark: str = ""
    release: tuple[int, int] = NEXT_RELEASE

    def apply(self, model: Model, conditioning: Conditioning, start: Start, settings: Any) -> Outcome:
        """Raises ValueError for a model or a run that the method is not made for; see :meth:`refusal`."""
        if why := self.refusal(model.prediction_type, start.guided):
            raise ValueError(why)
        return self.work(model, conditioning, start, settings)

    def refusal(self, prediction_type: PredictionType, guided: bool = True) -> str | None:
        """Why this method is not done on such a model, or in a run without guidance; None where it is."""
        if prediction_type not in self.prediction_types:
            return f"{self.name} is not done on {KINDS[prediction_type]} models: {self.why_not}; choose another method"
        if self.needs_guidance and not guided:
            return (
                f"{self.name} changes guidance, and this run has none (a guidance scale of 1, as for distilled "
                "models): choose another method"
            )
        return None


KINDS: dict[PredictionType, str] = {"epsilon": "epsilon", "v_prediction": "v-prediction", "flow": "flow"}


def table() -> str:
    """What each released method does on each kind of model, as the Markdown table of docs/mitigations.md."""
    rows = [["method", *KINDS.values(), "distilled (guidance scale 1)", "remarks"]]
    for method in (method for method in available().values() if method.release != NEXT_RELEASE):
        asked = [method.refusal(kind) for kind in KINDS] + [method.refusal(method.prediction_types[0], guided=False)]
        said = "; ".join(part for part in (method.why_not, method.remark) if part)
        rows.append([method.name, *("refused" if why else "yes" for why in asked), said])
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def available() -> dict[str, Mitigation]:
    """All mitigations of this folder by name: by the release that brought them, then in the order of their files."""
    found: list[Mitigation] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "MITIGATIONS", ())
    return {method.name: method for method in sorted(found, key=lambda method: method.release)}
