"""Leave one word out: what the score would be without it.

No gradient: every word is dropped in turn and the first step measured again on the same noise, all
words in shared batches. The raw value of a word is the magnitude lost by dropping it; it is negative
where the prompt scores higher without the word. In a phrase that is memorised as a whole the loss of
any word breaks the memory, so this view tells what helps rather than what causes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.conditioning import Conditioning, Word
from ..core.denoiser import Denoiser, Predictions
from ..core.prompt_weights import drop_empty_groups
from ..core.sampling import first_step, predict
from ..core.verdict import Explanation
from ..detectors.magnitude import magnitude
from . import explanation


def drop_word(prompt: str, word: Word) -> str:
    """The prompt without one word; white space is closed up, emptied brackets and dangling separators go too.

    >>> drop_word("a (red:1.3) boat", Word("red", 3, 6))
    'a boat'
    """
    before, after = prompt[: word.start], prompt[word.end :]
    has_gap = not (before and after) or before[-1].isspace() or after[0].isspace()
    kept = drop_empty_groups(f"{before}{' ' if has_gap else ''}{after}", before=prompt)
    return " ".join(kept.split()).strip(" ,;|-")


def scores_without(
    denoiser: Denoiser,
    encode: Callable[[str], Conditioning],
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    sigma: float,
    batch_size: int = 32,
) -> Tensor:
    """First-step magnitude without each word: [number of words, images]. noise [images, C, H, W]."""
    without = [encode(drop_word(conditioning.prompt, word)) for word in conditioning.words]
    return first_step(denoiser, without, unconditional, noise, sigma, batch_size)


def explain(
    denoiser: Denoiser,
    encode: Callable[[str], Conditioning],
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    sigma: float,
    batch_size: int = 32,
) -> Explanation:
    full = first_step(denoiser, [conditioning], unconditional, noise, sigma, batch_size).mean()
    without = scores_without(denoiser, encode, conditioning, unconditional, noise, sigma, batch_size).mean(1)
    return explanation(
        "leave one out", conditioning.words, full - without, "fall of the score without the word", without
    )


def explain_at(
    denoiser: Denoiser,
    encode: Callable[[str], Conditioning],
    conditioning: Conditioning,
    x: Tensor,
    sigma: Tensor,
    unconditional: Tensor,
) -> Explanation:
    """The same at x [B, C, H, W], sigma [B] of a run, where ``unconditional`` is the prediction without the prompt."""

    def score(of: Conditioning) -> Tensor:
        denoised = predict(denoiser, x, sigma, of)
        return magnitude(Predictions(denoised, unconditional, sigma)).mean().cpu()

    if not conditioning.words:
        raise ValueError("the prompt has no words, so there is nothing to explain")
    without = torch.stack([score(encode(drop_word(conditioning.prompt, word))) for word in conditioning.words])
    lost = score(conditioning) - without
    return explanation("leave one out", conditioning.words, lost, "fall of the score without the word", without)
