"""Ordinary prompts in the style and vocabulary of given ones: their words in combinations that none of them has.

A p-value is only as good as the likeness of its ordinary prompts to the prompt in question. Prompts that a model does
not understand score higher than those it knows, and then no score of a known one stands out.

Each prompt is a given one in which every word, and every run of words, that stands in no other given prompt is replaced
or broken up, since it may be what brings that prompt's image back: words of it are drawn anew, one after the other, from
those that stand between the same two neighbours in the given prompts; where that is one word only, by the Markov chain
of their words. Length, punctuation and letter case are kept, and every word is one that two given prompts share.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

RUN = 4  # words in a row that tell one prompt from all others
_MENDINGS = 40  # words drawn anew to break up runs, before a prompt is given up
_MAX_FAILURES_IN_A_ROW = 200
# Scripts written without blanks give a word a character; elsewhere letters, digits and what joins them.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]")
_EDGE = ""


@dataclass(frozen=True)
class _Split:
    """A prompt as words (in small letters) and what stands between them; ``shapes`` are the words as written."""

    words: tuple[str, ...]
    shapes: tuple[str, ...]
    gaps: tuple[str, ...]

    @classmethod
    def of(cls, prompt: str) -> _Split:
        found = list(_WORD.finditer(prompt))
        shapes = tuple(match[0] for match in found)
        edges = [0, *(match.end() for match in found)]
        starts = [*(match.start() for match in found), len(prompt)]
        gaps = tuple(prompt[a:b] for a, b in zip(edges, starts, strict=True))
        return cls(tuple(shape.casefold() for shape in shapes), shapes, gaps)


def recombined(prompts: Sequence[str], count: int, seed: int = 0, at_least: int | None = None) -> list[str]:
    """``count`` distinct prompts in the style and vocabulary of the given ones, none of which is among them.

    The same arguments give the same prompts on every machine. Raises ValueError with a sentence where the given prompts
    hold too few words in common for so many, or for ``at_least`` so many: down to these, fewer are given then.

    >>> recombined(["red boat, calm lake", "blue boat, calm sea", "red hut, wild sea", "blue hut, wild lake"], 1)
    ['blue hut, calm lake']
    """
    if count < 0:
        raise ValueError(f"the number of prompts is {count}: give 0 or more")
    language = _Language(prompts)
    rng = Random(seed)
    found: dict[str, str] = {}
    failures = 0
    while len(found) < count:
        made = language.another(rng)
        if made is not None and made.casefold() not in found:
            found[made.casefold()] = made
            failures = 0
        elif (failures := failures + 1) > _MAX_FAILURES_IN_A_ROW:
            if at_least is not None and len(found) >= at_least:
                break
            raise ValueError(
                f"the {len(prompts):,} prompts given have too few words in common for {count:,} others like them "
                f"(enough for {len(found):,}): give more prompts, or ask for fewer"
            )
    return list(found.values())


class _Language:
    """What the given prompts say of how words follow one another."""

    def __init__(self, prompts: Iterable[str]) -> None:
        split = [_Split.of(prompt) for prompt in dict.fromkeys(prompts)]
        self.given = [one for one in split if any(map(_is_word, one.words))]
        if not self.given:
            raise ValueError("there are no words to recombine: give prompts of the kind that will be judged")
        self.templates = [one.words for one in self.given]
        self.frequency = Counter(word for template in self.templates for word in template)
        self.after: dict[str, Counter[str]] = defaultdict(Counter)
        self.before: dict[str, Counter[str]] = defaultdict(Counter)
        self.between: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        prompt_of: dict[tuple[str, ...], int | None] = {}
        for number, template in enumerate(self.templates):
            for left, right in zip((_EDGE, *template), (*template, _EDGE), strict=True):
                self.after[left][right] += 1
                self.before[right][left] += 1
            around = zip((_EDGE, *template), template, (*template[1:], _EDGE), strict=False)
            for left, word, right in around:
                self.between[left, right][word] += 1
            for run in _runs(template, min(RUN, len(template))):
                prompt_of[run] = number if prompt_of.get(run, number) == number else None
            for word in filter(_is_word, template):
                prompt_of[word,] = number if prompt_of.get((word,), number) == number else None
        self.telling = {run for run, number in prompt_of.items() if number is not None}
        self.whole = set(self.templates)

    def another(self, rng: Random) -> str | None:
        """A prompt like the given ones; None where it came out as one of them, or holds a run that tells one of them."""
        number = _below(len(self.given), rng)
        words = list(self.templates[number])
        for mending in range(_MENDINGS):
            run = self._telling_run(words)
            if run is None:
                return _written(words, self.given[number])
            if not run:
                break
            place = run[_below(len(run), rng)]
            words[place] = self._drawn(words, place, rng, widely=mending >= _MENDINGS // 2)
        return None

    def _drawn(self, words: Sequence[str], place: int, rng: Random, widely: bool = False) -> str:
        """A word for this place given its neighbours; ``widely``: another one that fits at least one side."""
        left = words[place - 1] if place else _EDGE
        right = words[place + 1] if place + 1 < len(words) else _EDGE
        after, before, between = self.after[left], self.before[right], self.between[left, right]
        fitting = self._shared(between)
        if len(fitting) > 1 and not widely:
            return _weighted({word: between[word] for word in fitting}, words[place], rng)
        possible = {*after, *before} - {words[place]} if widely else {*after} & {*before}
        weights = {
            word: after[word] + before[word] if widely else after[word] * before[word] / self.frequency[word]
            for word in self._shared(possible)
        }
        return _weighted(weights, words[place], rng)

    def _shared(self, words: Iterable[str]) -> list[str]:
        """Those that no given prompt has alone, in order, without punctuation."""
        return sorted(word for word in words if _is_word(word) and (word,) not in self.telling)

    def _telling_run(self, words: Sequence[str]) -> list[int] | None:
        """The places of the words of a run that stands in one given prompt alone, or of all where they are one."""
        for length in range(1, RUN + 1):
            for start in range(len(words) - length + 1):
                if tuple(words[start : start + length]) in self.telling:
                    return [place for place in range(start, start + length) if _is_word(words[place])]
        return [place for place, word in enumerate(words) if _is_word(word)] if tuple(words) in self.whole else None


def _runs(words: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    return {words[start : start + length] for start in range(len(words) - length + 1)}


def _is_word(word: str) -> bool:
    """Not punctuation, which stays in its place, nor the edge of a prompt."""
    return word.isalnum()


def _written(words: Sequence[str], template: _Split) -> str:
    parts = [template.gaps[0]]
    for word, shape, gap in zip(words, template.shapes, template.gaps[1:], strict=True):
        parts += [_in_the_case_of(shape, word), gap]
    return "".join(parts)


def _in_the_case_of(shape: str, word: str) -> str:
    if shape[:1].isupper():
        return word.upper() if len(shape) > 1 and shape.isupper() else word[:1].upper() + word[1:]
    return word


# Python promises the same stream for random() alone.
def _below(count: int, rng: Random) -> int:
    return int(rng.random() * count)


def _weighted(weights: dict[str, float], otherwise: str, rng: Random) -> str:
    """One of the words with a probability proportional to its weight."""
    left, chosen = rng.random() * sum(weights.values()), otherwise
    for chosen, weight in weights.items():  # noqa: B007
        left -= weight
        if left < 0:
            break
    return chosen
