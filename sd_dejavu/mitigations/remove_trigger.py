"""Trigger removal: drop the word that the explanation names, measure again, until the score is ordinary.

What a user would do by hand with the explanation of Wen et al. (ICLR 2024, section 4.2), done with the
gradient through the text encoder. It costs one backward pass and one evaluation a word, no iterations
over the embedding, and returns a prompt that can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core import prompt_weights
from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Model
from ..core.gradients import with_gradients
from ..core.settings import Checked, option
from ..explain import input_gradient, output_gradient
from ..explain.leave_one_out import drop_word
from . import Mitigation, Outcome, Start


@dataclass(frozen=True)
class Settings(Checked):
    max_words: int = option(3, "largest number of words to drop", minimum=1, maximum=100)
    keep: float = option(0.0, "weight the named word keeps: 0 drops it, 0.5 weakens it", minimum=0, maximum=0.95)


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
    settings: Settings = Settings(),
) -> Removed:
    """Drops (or weakens) up to ``max_words`` words, never the last one, until the score is ordinary.

    Uses the gradient at the encoder's output rows where the conditioning carries no encoder. ``denoiser``
    must be differentiable.
    """
    words: list[str] = []
    each, images = start.scores(denoiser, conditioning), len(start.x)
    # Where some images are ordinary already, the words that count are those of the worst one.
    worst, alike = int(each.argmax()), bool(start.to_change(each).all())
    together = alike or conditioning.images_at_once(images, 1) > 1
    part = slice(0, images) if together else slice(worst, worst + 1)
    scores = [float(each.max())]
    weakened: dict[int, float] = {}  # by the word's place in the prompt as given
    plain = conditioning
    while (
        scores[-1] > start.acceptable
        and len(words) < settings.max_words
        and len(conditioning.words) - len(weakened) > 1
    ):
        view = input_gradient if conditioning.reencoding else output_gradient
        given = (start.x[part], start.sigma[part], conditioning.of_images(part.start, part.stop, images))
        found = view.explain(denoiser, *given, start.base[part], start.batch_size)
        left = [i for i in range(len(found.words)) if i not in weakened]
        number = max(left, key=lambda i: found.words[i].raw)
        if settings.keep:
            weakened[number] = settings.keep
            weights = [weakened.get(i, 1.0) for i in range(len(plain.words))]
            weighed = prompt_weights.apply(plain, encode("").rows, weights)
            conditioning = replace(weighed, prompt=_marked(plain, weakened))
        else:
            shorter = drop_word(conditioning.prompt, conditioning.words[number])
            if not shorter:  # nothing but separators would be left
                break
            conditioning = encode(shorter)
        words.append(found.words[number].text)
        scores.append(start.score(denoiser, conditioning))
    return Removed(conditioning, tuple(words), tuple(scores), start.acceptable)


def _marked(conditioning: Conditioning, weights: dict[int, float]) -> str:
    """The prompt with '(word:0.5)' around each weighed word, to be read and typed."""
    text = conditioning.prompt
    for number in sorted(weights, reverse=True):
        word = conditioning.words[number]
        text = f"{text[: word.start]}({text[word.start : word.end]}:{weights[number]:g}){text[word.end :]}"
    return text


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    found = with_gradients(model, lambda: remove_trigger(model, model.encode, conditioning, start, settings))
    details = {"words": found.words, "scores": found.scores, "reached": found.reached, "target": found.target}
    return Outcome(found.conditioning, found.scores[0], found.scores[-1], details)


MITIGATIONS = (
    Mitigation(
        "remove-trigger",
        "drop the word that the explanation names, until the score is ordinary",
        touches="prompt",
        cost="one backward pass and one evaluation a word",
        settings=Settings,
        work=_apply,
        release=(0, 1),
    ),
)
