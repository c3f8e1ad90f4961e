"""The input gradient, confirmed by blanking the word where it stands.

The gradient through the text encoder (:mod:`sd_dejavu.explain.input_gradient`) says what the score reacts to,
but a neighbour of the trigger can have the larger gradient although the memory survives without it. So each
word is blanked in turn: its input token embeddings become zeros at their places (an ablation). Unlike leaving
the word out of the prompt, which moves all later words and breaks many a memory by that alone, this keeps every
position. The raw value is the product, gradient norm times magnitude lost, 0 where the score does not fall.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Predictions
from ..core.sampling import predict
from ..core.verdict import Explanation
from ..detectors.magnitude import magnitude
from . import explanation, input_gradient


def magnitudes_blanked(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int = 32,
) -> Tensor:
    """Mean first-step magnitude with each word blanked, [number of words].

    x [B, C, H, W], sigma [B], ``unconditional`` the denoised prediction without the prompt; at most ``batch_size``
    images share an evaluation. Raises ValueError when the conditioning carries no way back through its encoder.
    """
    return torch.stack(
        [
            _score(denoiser, x, sigma, _blanked(conditioning, number), unconditional, batch_size)
            for number in range(len(conditioning.words))
        ]
    )


def explain(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int = 32,
) -> Explanation:
    """Raises ValueError when the text encoder is not at hand."""
    gradient = input_gradient.explain(denoiser, x, sigma, conditioning, unconditional, batch_size)
    blanked = magnitudes_blanked(denoiser, x, sigma, conditioning, unconditional, batch_size)
    lost = (_score(denoiser, x, sigma, conditioning, unconditional, batch_size) - blanked).clamp_min(0)
    product = torch.tensor([word.raw for word in gradient.words]) * lost
    return explanation("confirmed gradient", conditioning.words, product, "slope times fall of the score", blanked)


def _blanked(conditioning: Conditioning, word: int) -> Conditioning:
    if conditioning.reencoding is None:
        raise ValueError("the text encoder is not at hand for this conditioning; use the gradient at its output rows")
    embeddings: Sequence[Tensor] = [
        torch.where(
            torch.tensor([token.word == word for token in given.tokens], device=given.embeddings.device)[:, None],
            torch.zeros_like(given.embeddings),
            given.embeddings,
        )
        for given in conditioning.reencoding.inputs
    ]
    with torch.no_grad():
        return conditioning.with_rows(*conditioning.reencoding.encode(embeddings))


def _score(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Tensor,
    batch_size: int,
) -> Tensor:
    denoised = predict(denoiser, x, sigma, conditioning, batch_size)
    return magnitude(Predictions(denoised, unconditional, sigma)).mean().cpu()
