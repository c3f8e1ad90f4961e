"""Prompt weights: '(word:1.3)', '(word)' = 1.1, '[word]' = 1 / 1.1, '\\\\(' for a bracket that is meant.

The syntax is Automatic1111's; rows are weighted as in ComfyUI, z = z_empty + w (z - z_empty), which leaves
the conditioning as it is at weight 1. Words keep their places in the text as typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .conditioning import Conditioning, Reencoding, TokenRow, Word, split_words

ROUND, SQUARE = 1.1, 1 / 1.1
_WEIGHT = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)")
_EMPTY_GROUP = re.compile(r"\(\s*(?::\s*[+-]?[\d.]+\s*)?\)|\[\s*\]")


@dataclass(frozen=True)
class Weighted:
    """The text without its brackets, and for each of its characters the weight and the place as typed."""

    text: str
    weights: tuple[float, ...]
    places: tuple[int, ...]


def parse(prompt: str) -> Weighted:
    """Read the brackets. One that is never closed weighs all that follows; one never opened is a character.

    >>> read = parse("a (red:1.3) boat")
    >>> read.text, read.weights[2], read.places[2]
    ('a red boat', 1.3, 3)
    """
    text: list[str] = []
    places: list[int] = []
    open_groups: list[tuple[str, int]] = []  # bracket, and where its text begins
    # By where a group's text begins: where it ends and its factor, inner groups first.
    closed: dict[int, list[tuple[int, float]]] = {}

    def close(factor: float | None = None) -> None:
        bracket, since = open_groups.pop()
        weight = factor if factor is not None else ROUND if bracket == "(" else SQUARE
        closed.setdefault(since, []).append((len(text), weight))

    at = 0
    while at < len(prompt):
        character = prompt[at]
        weight = _WEIGHT.match(prompt, at) if open_groups and open_groups[-1][0] == "(" else None
        if character == "\\" and prompt[at + 1 : at + 2] in ("(", ")", "[", "]", "\\"):
            at += 1
        elif character in "([":
            open_groups.append((character, len(text)))
            at += 1
            continue
        elif weight:
            close(float(weight[1]))
            at = weight.end()
            continue
        elif (character == ")" and open_groups and open_groups[-1][0] == "(") or (
            character == "]" and open_groups and open_groups[-1][0] == "["
        ):
            close()
            at += 1
            continue
        text.append(prompt[at])
        places.append(at)
        at += 1
    while open_groups:
        close()
    return Weighted("".join(text), tuple(_products(closed, len(text))), tuple(places))


def _products(groups: dict[int, list[tuple[int, float]]], count: int) -> Iterator[float]:
    """The product of the factors of all groups around each of so many characters; each group is looked at once."""
    around = [(count, 1.0)]  # ends, and the product up to there, from the outermost on
    for place in range(count):
        while around[-1][0] <= place:
            around.pop()
        for end, factor in reversed(groups.get(place, [])):
            if end > place:
                around.append((end, around[-1][1] * factor))
        yield around[-1][1]


def words_as_typed(prompt: str) -> tuple[Word, ...]:
    """The words of the text without its brackets, at their places in the prompt with them.

    >>> words_as_typed("(red:1.3) boat")[1]
    Word(text='boat', start=10, end=14)
    """
    read = parse(prompt)
    return tuple(replace(w, start=read.places[w.start], end=read.places[w.end - 1] + 1) for w in split_words(read.text))


def encode_weighted(encode: Callable[[str], Conditioning], prompt: str) -> Conditioning:
    """The conditioning of a prompt with brackets; ``encode`` encodes plain text."""
    read = parse(prompt)
    plain = encode(read.text)
    weights = [read.weights[word.start] for word in plain.words]
    typed = words_as_typed(prompt)
    if all(weight == 1 for weight in weights):
        return replace(plain, prompt=prompt, words=typed)
    return replace(apply(plain, encode("").rows, weights), prompt=prompt, words=typed)


def apply(conditioning: Conditioning, empty: Tensor, weights: Sequence[float]) -> Conditioning:
    """Weigh the rows of each word; ``empty`` are the rows [1, M, D] of the empty prompt, one weight a word.

    The way back through the encoder weighs along. Raises ValueError when the tokens are not known.
    """
    if not conditioning.tokens:
        raise ValueError("the tokens of this conditioning are not known, so its words cannot be weighed")
    factors = torch.tensor([_weight(token, weights) for token in conditioning.tokens], device=conditioning.rows.device)
    base = empty.repeat(1, -(-conditioning.rows.shape[1] // empty.shape[1]), 1)[:, : conditioning.rows.shape[1]]

    def weigh(rows: Tensor) -> Tensor:
        return base + factors[None, :, None] * (rows - base)

    plain = conditioning.reencoding
    reencoding = None
    if plain is not None:

        def encode_from(embeddings: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            rows, extras = plain.encode(embeddings)
            return weigh(rows), extras

        reencoding = Reencoding(plain.inputs, encode_from)
    return replace(conditioning, rows=weigh(conditioning.rows), reencoding=reencoding)


def drop_empty_groups(prompt: str, before: str) -> str:
    """'a (:1.3) boat' -> 'a  boat': what dropping a weighted word leaves behind.

    Nothing is dropped where the prompt ``before`` held an empty pair of brackets of its own.
    """
    if _EMPTY_GROUP.search(before):
        return prompt
    while (shorter := _EMPTY_GROUP.sub("", prompt)) != prompt:
        prompt = shorter
    return prompt


def _weight(token: TokenRow, weights: Sequence[float]) -> float:
    return 1.0 if token.role != "word" or token.word is None else weights[token.word]
