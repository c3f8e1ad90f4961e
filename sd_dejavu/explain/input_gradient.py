"""Word significance taken through the text encoder: the gradient at the input token embeddings.

The measure of Wen et al., ICLR 2024 (section 4.2), || d L / d e_i ||_2 with L the mean of the per-image
|| Delta ||_2, but with e_i the embedding of input token i, so that the encoder belongs to what is
explained. On planted triggers this names the trigger where the gradient at the output rows does not.
With two text encoders the norms of both are added; so are the tokens of a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditioning import Conditioning, merge_by_word
from ..denoiser import Denoiser, Predictions
from ..detectors.magnitude import magnitude
from ..verdict import Explanation
from . import explanation


def token_gradient_norms(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Tensor
) -> list[Tensor]:
    """|| d L / d e_i || of every input token, one [T] a text encoder.

    x [B, C, H, W], sigma [B], ``unconditional`` the denoised prediction without the prompt. Raises
    ValueError when the conditioning carries no way back through its encoder.
    """
    if conditioning.reencoding is None:
        raise ValueError("the text encoder is not at hand for this conditioning; use the gradient at its output rows")
    leaves = [i.embeddings.detach().clone().requires_grad_(True) for i in conditioning.reencoding.inputs]
    with torch.enable_grad():
        rows, extras = conditioning.reencoding.encode(leaves)
        denoised = denoiser(x, sigma, conditioning.with_rows(rows, extras))
        loss = magnitude(Predictions(denoised, unconditional, sigma)).mean()
        gradients = torch.autograd.grad(loss, leaves)
    return [g.float().norm(dim=1) for g in gradients]


def explain(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Tensor
) -> Explanation:
    """Raises ValueError when the text encoder is not at hand."""
    norms = token_gradient_norms(denoiser, x, sigma, conditioning, unconditional)
    assert conditioning.reencoding is not None  # token_gradient_norms has refused it
    merged = torch.stack(
        [
            merge_by_word(n, i.tokens, conditioning.words)
            for n, i in zip(norms, conditioning.reencoding.inputs, strict=True)
        ]
    ).sum(0)
    return explanation("input gradient", conditioning.words, merged, "gradient norm at the input token embeddings")
