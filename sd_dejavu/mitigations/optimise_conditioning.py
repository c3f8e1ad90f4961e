"""Conditioning optimisation: move the embedding until the first step's magnitude is ordinary.

Wen et al., ICLR 2024, section 4.3: minimise L = || Delta ||_2 at the x_T that will be sampled, over the
conditional embedding; Adam, learning rate 0.05, at most 10 iterations (here 25), stop at L <= target. The start
token's row stays fixed, end and padding rows are learned. Against the published code: L is the mean of
the per-image norms, the optimisation runs in fp32 whatever the model's dtype (in fp16 Adam's epsilon
underflows and the start row turns NaN), and the unconditional prediction, which does not depend on the
embedding, is computed once instead of in every iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..denoiser import Denoiser, Model, Predictions
from ..detectors.magnitude import magnitude
from ..settings import option, validate
from . import Mitigation, Outcome, Start


@dataclass(frozen=True)
class Settings:
    """The paper's learning rate; its 10 iterations do not always reach the median of ordinary prompts, 25 do."""

    iterations: int = option(25, "largest number of updates; it stops at the target", minimum=1, maximum=1000)
    learning_rate: float = option(0.05, "Adam's learning rate", minimum=0, maximum=10, exclusive=True)
    checkpointing: bool = option(False, "recompute activations: less memory, more time")

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Optimised:
    """``losses`` holds L before each update and at the end; ``moved`` is || new - old || / || old || of the rows."""

    conditioning: Conditioning
    losses: tuple[float, ...]
    target: float
    moved: float

    @property
    def reached(self) -> bool:
        return self.losses[-1] <= self.target


def optimise(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    target: float,
    settings: Settings = Settings(),
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
) -> Optimised:
    """x [B, C, H, W] at sigma [B]; ``unconditional`` is the denoised prediction there without the prompt.

    Returns the conditioning with the lowest loss seen. Raises ValueError when a loss is not finite or
    the target is not positive.
    """
    if not target > 0:
        raise ValueError(f"the target magnitude must be positive, not {target:g}")
    start = conditioning.rows.detach().float()
    # Where the tokens are unknown: every chunk of 77 rows begins with a start token in all these text encoders.
    fixed = conditioning.row_mask("start") if conditioning.tokens else torch.arange(start.shape[1]) % 77 == 0
    free = ~fixed.to(start.device)[None, :, None]
    rows = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=settings.learning_rate)
    losses: list[float] = []
    best, best_rows = float("inf"), start
    for iteration in range(settings.iterations + 1):
        with torch.enable_grad():
            mixed = torch.where(free, rows, start)
            denoised = denoiser(x, sigma, conditioning.with_rows(mixed))
            loss = magnitude(Predictions(denoised, unconditional, sigma)).mean()
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss became {losses[-1]} at iteration {iteration}: the model's weights may be broken"
            )
        if losses[-1] < best:
            best, best_rows = losses[-1], mixed.detach().clone()
        on_iteration(iteration, losses[-1])
        if losses[-1] <= target or iteration == settings.iterations:
            break
        (rows.grad,) = torch.autograd.grad(loss, [rows])
        optimizer.step()
    if losses[-1] > best:
        losses.append(best)
    moved = float((best_rows - start).norm() / start.norm())
    return Optimised(conditioning.with_rows(best_rows.to(conditioning.rows.dtype)), tuple(losses), target, moved)


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    with model.differentiable(settings.checkpointing):
        found = optimise(model, start.x, start.sigma, conditioning, start.base, start.target, settings)
    details = {"losses": found.losses, "moved": found.moved, "reached": found.reached, "target": found.target}
    return Outcome(found.conditioning, found.losses[0], min(found.losses), details)


MITIGATIONS = (
    Mitigation(
        "optimise-conditioning",
        "move the embedding until the first step's magnitude is ordinary",
        touches="conditioning",
        cost="one forward and backward pass an iteration",
        settings=Settings,
        apply=_apply,
    ),
)
