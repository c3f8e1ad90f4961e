"""Conditioning optimisation through the text encoder: move the input token embeddings.

The objective of :mod:`sd_dejavu.mitigations.optimise_conditioning` (Wen et al., ICLR 2024, section 4.3), but the
embeddings moved are those that enter the text encoder. Its output stays what the encoder can say, where free rows
leave it for places the model has never seen; and a word's few numbers are moved instead of all the rows it
spreads over, so fewer iterations reach the same loss. The start token stays fixed. Adam's learning rate counts
in units of the embeddings' root mean square, which differs from encoder to encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..core.conditioning import Conditioning
from . import Mitigation, optimise_conditioning
from .optimise_conditioning import Leaf, Rebuild, Settings

LEARNING_RATE = 0.1  # of the embeddings' root mean square


def input_embeddings(conditioning: Conditioning, learning_rate: float | None) -> tuple[Sequence[Leaf], Rebuild]:
    """The embeddings that enter the text encoders, but for those of start tokens.

    Raises ValueError when the conditioning carries no way back through its encoder.
    """
    reencoding = conditioning.reencoding
    if reencoding is None:
        raise ValueError("the text encoder is not at hand for this conditioning; use optimise-conditioning")
    leaves = []
    for given in reencoding.inputs:
        start = given.embeddings.detach().float()
        free = torch.tensor([token.role != "start" for token in given.tokens], device=start.device)[:, None]
        leaves.append(Leaf(start, free, (learning_rate or LEARNING_RATE) * float(start.square().mean().sqrt())))
    return leaves, lambda moved: conditioning.with_rows(*reencoding.encode(moved))


optimise = partial(optimise_conditioning.optimise, movable=input_embeddings)


MITIGATIONS = (
    Mitigation(
        "optimise-tokens",
        "move the words' embeddings before the text encoder until the first step's magnitude is ordinary",
        touches="conditioning",
        cost="one forward and backward pass an iteration, text encoder included",
        settings=Settings,
        work=partial(optimise_conditioning.apply, input_embeddings),
        release=(0, 1),
    ),
)
