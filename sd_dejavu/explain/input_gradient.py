"""Word significance taken through the text encoder: the gradient at the input token embeddings.

The measure of Wen et al., ICLR 2024 (section 4.2), || d L / d e_i ||_2 with L the mean of the per-image
|| Delta ||_2, but with e_i the embedding of input token i, so that the encoder belongs to what is
explained. On planted triggers this names the trigger where the gradient at the output rows does not.
With two text encoders the norms of both are added; so are the tokens of a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.conditioning import Conditioning, merge_by_word
from ..core.denoiser import Denoiser
from ..core.gradients import value_and_gradients
from ..core.verdict import Explanation
from . import explanation


def token_gradient_norms(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int | None = None,
) -> list[Tensor]:
    """|| d L / d e_i || of every input token, one [T] a text encoder.

    x [B, C, H, W], sigma [B], ``unconditional`` the denoised prediction without the prompt; at most ``batch_size``
    images share a pass. Raises ValueError when the conditioning carries no way back through its encoder.
    """
    if conditioning.reencoding is None:
        raise ValueError("the text encoder is not at hand for this conditioning; use the gradient at its output rows")
    encode = conditioning.reencoding.encode
    leaves = [i.embeddings.detach().float().clone().requires_grad_(True) for i in conditioning.reencoding.inputs]

    def rebuild(moved: Sequence[Tensor]) -> Conditioning:
        return conditioning.with_rows(*encode(moved))

    found = value_and_gradients(denoiser, x, sigma, unconditional, rebuild, leaves, batch_size)
    return [gradient.norm(dim=1) for gradient in found.gradients]


def explain(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int | None = None,
) -> Explanation:
    """Raises ValueError when the text encoder is not at hand."""
    norms = token_gradient_norms(denoiser, x, sigma, conditioning, unconditional, batch_size)
    assert conditioning.reencoding is not None  # token_gradient_norms has refused it
    merged = torch.stack(
        [
            merge_by_word(n, i.tokens, conditioning.words)
            for n, i in zip(norms, conditioning.reencoding.inputs, strict=True)
        ]
    ).sum(0)
    return explanation("input gradient", conditioning.words, merged, "slope of the score, at the tokens")
