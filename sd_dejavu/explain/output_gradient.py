"""Token significance as published: the gradient at the text encoder's output rows.

Wen et al., ICLR 2024, section 4.2: a_i = || d L / d e_i ||_2 with L = || Delta ||_2 and e_i row i of the
conditional embedding. L here is the mean of the per-image norms (the reference code takes one norm
over the whole batch). Start, end and padding rows are left out; the rows of a word are added up.

A contextual encoder spreads a word over all later rows, so this view often misses a planted trigger;
:mod:`sd_dejavu.explain.input_gradient` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditioning import Conditioning, merge_by_word
from ..denoiser import Denoiser, Predictions
from ..detectors.magnitude import magnitude
from ..verdict import Explanation
from . import explanation


def row_gradient_norms(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Tensor
) -> Tensor:
    """a_i of every row, [N]. x [B, C, H, W], sigma [B], ``unconditional`` the denoised prediction without the prompt."""
    rows = conditioning.rows.detach().float().clone().requires_grad_(True)
    with torch.enable_grad():
        denoised = denoiser(x, sigma, conditioning.with_rows(rows))
        loss = magnitude(Predictions(denoised, unconditional, sigma)).mean()
        (gradient,) = torch.autograd.grad(loss, [rows])
    return gradient[0].norm(dim=1)


def explain(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning, unconditional: Tensor
) -> Explanation:
    """Raises ValueError when the tokens of the conditioning are not known."""
    if not conditioning.tokens:
        raise ValueError("the tokens of this conditioning are not known, so its rows cannot be given to words")
    norms = row_gradient_norms(denoiser, x, sigma, conditioning, unconditional)
    merged = merge_by_word(norms, conditioning.tokens, conditioning.words)
    return explanation("output gradient", conditioning.words, merged, "gradient norm at the encoder's output rows")
