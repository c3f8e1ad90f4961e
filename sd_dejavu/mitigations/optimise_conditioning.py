"""Conditioning optimisation: move the embedding until the first step's magnitude is ordinary.

Wen et al., ICLR 2024, section 4.3: minimise L = || Delta ||_2 at the x_T that will be sampled, over the
conditional embedding; Adam, learning rate 0.05, at most 10 iterations (here 25), stop at L <= target. The start
token's row stays fixed, end and padding rows are learned. Against the published code: L is the mean of
the per-image norms, rows and optimiser are fp32 whatever the model's dtype (in fp16 Adam's epsilon
underflows and the start row turns NaN), an image that has reached the target adds nothing to the gradient and the loop
ends when the worst image has, and the unconditional prediction, which does not depend on the
embedding, is computed once instead of in every iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Model
from ..core.gradients import LossScale, value_and_gradients, with_gradients
from ..core.settings import Checked, option
from . import Mitigation, Outcome, Start

LEARNING_RATE = 0.05  # the paper's


@dataclass(frozen=True)
class Settings(Checked):
    """The paper's 10 iterations do not always reach the median of ordinary prompts, 25 do."""

    iterations: int = option(25, "largest number of updates; it stops at the target", minimum=1, maximum=1000)
    learning_rate: float | None = option(
        None,
        "Adam's learning rate (default: the method's own)",
        kind=float,
        minimum=0,
        maximum=10,
        exclusive=True,
    )
    checkpointing: bool = option(False, "recompute activations: less memory, more time")


@dataclass(frozen=True)
class Optimised:
    """``losses`` holds L before each update and at the end, and after those that of the best where it was an earlier one.

    ``scores`` are the worst image's before and after: the best is the one with the lowest of these; ``moved`` is || new - old || / || old || of the rows.
    """

    conditioning: Conditioning
    losses: tuple[float, ...]
    target: float
    moved: float
    scores: tuple[float, float]

    @property
    def reached(self) -> bool:
        return self.scores[1] <= self.target


@dataclass(frozen=True)
class Leaf:
    """An embedding to move: its start values, the mask of what may move (broadcasts), Adam's learning rate."""

    start: Tensor
    free: Tensor
    learning_rate: float


Rebuild = Callable[[Sequence[Tensor]], Conditioning]
"""Makes a conditioning from moved embeddings."""

Movable = Callable[[Conditioning, float | None], tuple[Sequence[Leaf], Rebuild]]
"""(conditioning, learning rate or None for the method's own) -> the embeddings to move, and the way back from them."""


def output_rows(conditioning: Conditioning, learning_rate: float | None) -> tuple[Sequence[Leaf], Rebuild]:
    """The rows that the text encoder puts out, but for those of start tokens."""
    start = conditioning.rows.detach().float()
    # Where the tokens are unknown: every chunk of 77 rows begins with a start token in all these text encoders.
    fixed = conditioning.row_mask("start") if conditioning.tokens else torch.arange(start.shape[1]) % 77 == 0
    free = ~fixed.to(start.device)[None, :, None]
    return [Leaf(start, free, learning_rate or LEARNING_RATE)], lambda moved: conditioning.with_rows(moved[0])


def optimise(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    target: float,
    settings: Settings = Settings(),
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    batch_size: int | None = None,
    movable: Movable = output_rows,
) -> Optimised:
    """x [B, C, H, W] at sigma [B]; ``unconditional`` is the denoised prediction there without the prompt.

    At most ``batch_size`` images share a pass. Returns the conditioning at which the worst image scores lowest.
    Raises ValueError when a loss is not finite or the target is not positive.
    """
    leaves, rebuild = movable(conditioning, settings.learning_rate)
    if not target > 0:
        raise ValueError(f"the target magnitude must be positive, not {target:g}")
    moving = [leaf.start.clone().requires_grad_(True) for leaf in leaves]
    optimizer = torch.optim.Adam(
        [{"params": [tensor], "lr": leaf.learning_rate} for tensor, leaf in zip(moving, leaves, strict=True)]
    )

    def mixed(moved: Sequence[Tensor]) -> Conditioning:
        return rebuild([torch.where(leaf.free, tensor, leaf.start) for tensor, leaf in zip(moved, leaves, strict=True)])

    losses: list[float] = []
    worst: list[float] = []
    best, found, scale = 0, conditioning, LossScale()
    for iteration in range(settings.iterations + 1):
        taken = value_and_gradients(denoiser, x, sigma, unconditional, mixed, moving, batch_size, scale, target)
        losses.append(taken.loss)
        worst.append(float(taken.magnitudes.max()))
        if not math.isfinite(taken.loss):
            raise ValueError(
                f"the loss became {losses[-1]} at iteration {iteration}: the model's weights may be broken"
            )
        if iteration == 0 or worst[-1] < worst[best]:
            best, found = iteration, taken.conditioning
        on_iteration(iteration, losses[-1])
        if worst[-1] <= target or iteration == settings.iterations:
            break
        for tensor, gradient in zip(moving, taken.gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
    if best < len(losses) - 1:
        losses.append(losses[best])
    before = conditioning.rows.detach().float()
    moved = float((found.rows - before).norm() / before.norm())
    rows = found.rows.to(conditioning.rows.dtype)
    return Optimised(conditioning.with_rows(rows, found.extras), tuple(losses), target, moved, (worst[0], worst[best]))


def apply(movable: Movable, model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    """The mitigation that moves these embeddings."""

    def work() -> Optimised:
        given = (model, start.x, start.sigma, conditioning, start.base, start.target, settings)
        return optimise(*given, batch_size=start.batch_size, movable=movable)

    found = with_gradients(model, work, settings.checkpointing)
    details = {"losses": found.losses, "moved": found.moved, "reached": found.reached, "target": found.target}
    return Outcome(found.conditioning, *found.scores, details)


MITIGATIONS = (
    Mitigation(
        "optimise-conditioning",
        "move the encoder's output rows until the first step's magnitude is ordinary (as published)",
        touches="conditioning",
        cost="one forward and backward pass an iteration",
        settings=Settings,
        work=partial(apply, output_rows),
        release=(0, 1),
    ),
)
