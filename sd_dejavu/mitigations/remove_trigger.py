"""Trigger removal: drop the word that the explanation names, measure again, until the score is ordinary.

What a user would do by hand with the explanation of Wen et al. (ICLR 2024, section 4.2), done with the
gradient through the text encoder. It costs one backward pass and one evaluation a word, no iterations
over the embedding, and returns a prompt that can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..conditioning import Conditioning
from ..denoiser import Denoiser, Model
from ..explain import input_gradient, output_gradient
from ..explain.leave_one_out import drop_word
from ..settings import option, validate
from . import Mitigation, Outcome, Start


@dataclass(frozen=True)
class Settings:
    max_words: int = option(3, "largest number of words to drop", minimum=1, maximum=100)

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Removed:
    """``words`` in the order they went; ``scores`` before the first and after each of them."""

    conditioning: Conditioning
    words: tuple[str, ...]
    scores: tuple[float, ...]
    target: float

    @property
    def reached(self) -> bool:
        return self.scores[-1] <= self.target


def remove_trigger(
    denoiser: Denoiser,
    encode: Callable[[str], Conditioning],
    conditioning: Conditioning,
    start: Start,
    max_words: int = 3,
) -> Removed:
    """Drops up to ``max_words`` words, never the last one, until the score is at most ``start.target``.

    Uses the gradient at the encoder's output rows where the conditioning carries no encoder. ``denoiser``
    must be differentiable.
    """
    words: list[str] = []
    scores = [start.score(denoiser, conditioning)]
    while scores[-1] > start.target and len(words) < max_words and len(conditioning.words) > 1:
        view = input_gradient if conditioning.reencoding else output_gradient
        top = view.explain(denoiser, start.x, start.sigma, conditioning, start.base).top
        place = next(w for w in conditioning.words if w.start == top.start)
        conditioning = encode(drop_word(conditioning.prompt, place))
        words.append(top.text)
        scores.append(start.score(denoiser, conditioning))
    return Removed(conditioning, tuple(words), tuple(scores), start.target)


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    with model.differentiable():
        found = remove_trigger(model, model.encode, conditioning, start, settings.max_words)
    details = {"words": found.words, "scores": found.scores, "reached": found.reached, "target": found.target}
    return Outcome(found.conditioning, found.scores[0], found.scores[-1], details)


MITIGATIONS = (
    Mitigation(
        "remove-trigger",
        "drop the word that the explanation names, until the score is ordinary",
        touches="prompt",
        cost="one backward pass and one evaluation a word",
        settings=Settings,
        apply=_apply,
    ),
)
