"""Token significance as published: the gradient at the text encoder's output rows.

Wen et al., ICLR 2024, section 4.2: a_i = || d L / d e_i ||_2 with L = || Delta ||_2 and e_i row i of the
conditional embedding. L here is the mean of the per-image norms (the reference code takes one norm
over the whole batch). Start, end and padding rows are left out; the rows of a word are added up.

A contextual encoder spreads a word over all later rows, so this view often misses a planted trigger;
:mod:`sd_dejavu.explain.input_gradient` does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.conditioning import Conditioning, merge_by_word
from ..core.denoiser import Denoiser
from ..core.gradients import value_and_gradients
from ..core.verdict import Explanation
from . import explanation


def row_gradient_norms(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int | None = None,
) -> Tensor:
    """a_i of every row, [N]. x [B, C, H, W], sigma [B], ``unconditional`` the denoised prediction without the prompt;
    at most ``batch_size`` images share a pass."""
    rows = conditioning.rows.detach().float().clone().requires_grad_(True)

    def rebuild(moved: Sequence[Tensor]) -> Conditioning:
        return conditioning.with_rows(moved[0])

    (gradient,) = value_and_gradients(denoiser, x, sigma, unconditional, rebuild, [rows], batch_size).gradients
    lengths: Tensor = gradient[0].norm(dim=1)
    return lengths


def explain(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int | None = None,
) -> Explanation:
    """Raises ValueError when the tokens of the conditioning are not known."""
    if not conditioning.tokens:
        raise ValueError("the tokens of this conditioning are not known, so its rows cannot be given to words")
    norms = row_gradient_norms(denoiser, x, sigma, conditioning, unconditional, batch_size)
    merged = merge_by_word(norms, conditioning.tokens, conditioning.words)
    return explanation("output gradient", conditioning.words, merged, "slope of the score, at the encoder's output")
