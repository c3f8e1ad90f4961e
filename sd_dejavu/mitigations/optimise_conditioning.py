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

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Model
from ..core.gradients import LossScale, value_and_gradients, with_gradients
from ..core.settings import option, validate
from . import Mitigation, Outcome, Start

LEARNING_RATE = 0.05  # the paper's


@dataclass(frozen=True)
class Settings:
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

    def __post_init__(self) -> None:
        validate(self)


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
) -> Optimised:
    """x [B, C, H, W] at sigma [B]; ``unconditional`` is the denoised prediction there without the prompt.

    At most ``batch_size`` images share a pass. Returns the conditioning at which the worst image scores lowest.
    Raises ValueError when a loss is not finite or the target is not positive.
    """
    start = conditioning.rows.detach().float()
    # Where the tokens are unknown: every chunk of 77 rows begins with a start token in all these text encoders.
    fixed = conditioning.row_mask("start") if conditioning.tokens else torch.arange(start.shape[1]) % 77 == 0
    free = ~fixed.to(start.device)[None, :, None]
    leaf = Leaf(start, free, settings.learning_rate or LEARNING_RATE)

    def rebuild(moved: Sequence[Tensor]) -> Conditioning:
        return conditioning.with_rows(moved[0])

    return descend(
        denoiser,
        x,
        sigma,
        conditioning,
        unconditional,
        target,
        [leaf],
        rebuild,
        settings.iterations,
        on_iteration,
        batch_size,
    )


def descend(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    target: float,
    leaves: Sequence[Leaf],
    rebuild: Callable[[Sequence[Tensor]], Conditioning],
    iterations: int,
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    batch_size: int | None = None,
) -> Optimised:
    """The loop itself, over any embeddings from which ``rebuild`` makes a conditioning; see :func:`optimise`."""
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
    for iteration in range(iterations + 1):
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
        if worst[-1] <= target or iteration == iterations:
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


def outcome_of(found: Optimised) -> Outcome:
    details = {"losses": found.losses, "moved": found.moved, "reached": found.reached, "target": found.target}
    return Outcome(found.conditioning, *found.scores, details)


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    def work() -> Outcome:
        given = (model, start.x, start.sigma, conditioning, start.base, start.target, settings)
        return outcome_of(optimise(*given, batch_size=start.batch_size))

    return with_gradients(model, work, settings.checkpointing)


MITIGATIONS = (
    Mitigation(
        "optimise-conditioning",
        "move the encoder's output rows until the first step's magnitude is ordinary (as published)",
        touches="conditioning",
        cost="one forward and backward pass an iteration",
        settings=Settings,
        work=_apply,
        release=(0, 1),
    ),
)
