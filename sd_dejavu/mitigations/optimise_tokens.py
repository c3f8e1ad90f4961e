"""Conditioning optimisation through the text encoder: move the input token embeddings.

The objective of :mod:`sd_dejavu.mitigations.optimise_conditioning` (Wen et al., ICLR 2024, section 4.3), but the
embeddings moved are those that enter the text encoder. Its output stays what the encoder can say, where free rows
leave it for places the model has never seen; and a word's few numbers are moved instead of all the rows it
spreads over, so fewer iterations reach the same loss. The start token stays fixed. Adam's learning rate counts
in units of the embeddings' root mean square, which differs from encoder to encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Model
from ..core.gradients import with_gradients
from . import Mitigation, Outcome, Start
from .optimise_conditioning import Leaf, Optimised, Settings, descend, outcome_of

LEARNING_RATE = 0.1  # of the embeddings' root mean square


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
    Raises ValueError when the conditioning carries no way back through its encoder, a loss is not finite or the target
    is not positive.
    """
    reencoding = conditioning.reencoding
    if reencoding is None:
        raise ValueError("the text encoder is not at hand for this conditioning; use optimise-conditioning")
    rate = settings.learning_rate or LEARNING_RATE
    leaves = []
    for given in reencoding.inputs:
        start = given.embeddings.detach().float()
        free = torch.tensor([token.role != "start" for token in given.tokens], device=start.device)[:, None]
        leaves.append(Leaf(start, free, rate * float(start.square().mean().sqrt())))

    def rebuild(moved: Sequence[Tensor]) -> Conditioning:
        return conditioning.with_rows(*reencoding.encode(moved))

    return descend(
        denoiser,
        x,
        sigma,
        conditioning,
        unconditional,
        target,
        leaves,
        rebuild,
        settings.iterations,
        on_iteration,
        batch_size,
    )


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    def work() -> Outcome:
        given = (model, start.x, start.sigma, conditioning, start.base, start.target, settings)
        return outcome_of(optimise(*given, batch_size=start.batch_size))

    return with_gradients(model, work, settings.checkpointing)


MITIGATIONS = (
    Mitigation(
        "optimise-tokens",
        "move the words' embeddings before the text encoder until the first step's magnitude is ordinary",
        touches="conditioning",
        cost="one forward and backward pass an iteration, text encoder included",
        settings=Settings,
        work=_apply,
        release=(0, 1),
    ),
)
