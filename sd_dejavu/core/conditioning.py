"""Conditioning: what the text encoder hands to the model, and the words it came from.

A prompt is split into words as the user typed them, each word into tokens, and every token gives one
row of the conditioning. Gradients and attention arrive per row; people read words. This module keeps
the way back: rows -> tokens -> words -> characters of the prompt.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from .attention import AttentionRule

Role = Literal["start", "word", "end"]  # 'end' is the end token and all padding behind it
Baseline = Literal["empty prompt", "negative prompt"]  # what a user may ask to measure against
Unconditional = Literal["empty prompt", "negative prompt", "zeroed prompt", "prompt left out"]  # what a host may have


@dataclass(frozen=True)
class Word:
    """One word of the prompt: its text as typed and its place ``prompt[start:end]``."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class TokenRow:
    """What one row of a conditioning stands for; ``word`` indexes the words of the prompt."""

    text: str
    role: Role
    word: int | None = None


@dataclass(frozen=True)
class EncoderInput:
    """The input token embeddings [T, d] of one text encoder, and what each of the T tokens stands for."""

    embeddings: Tensor
    tokens: tuple[TokenRow, ...]


@dataclass(frozen=True)
class Reencoding:
    """A differentiable way from input token embeddings to the conditioning.

    ``inputs`` holds one entry a text encoder. ``encode`` takes tensors in their place (same order and
    shapes, any of them requiring gradients) and returns the conditioning's rows [1, N, D] and extras.
    """

    inputs: tuple[EncoderInput, ...]
    encode: Callable[[Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Conditioning:
    """Embedding rows [B, N, D] with B = 1 for a single prompt, or one entry an image of a batch.

    ``extras`` are further tensors the model takes with the rows ([B, ...]: pooled vector, size
    numbers). ``host_values`` is what else a host keeps with this one prompt (masks, lengths, token numbers): for
    the host alone to read, it belongs to no batch of several prompts. ``tokens`` has N entries where the tokens are
    known and is empty where they are not.
    ``attention`` is how the model shall attend to the N rows, where that is not as usual. ``images`` is (first,
    one past the last) of those of a batch that it is about to be evaluated for; None for all of them: hosts keep more
    with an image than its latent.
    """

    rows: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    prompt: str = ""
    words: tuple[Word, ...] = ()
    tokens: tuple[TokenRow, ...] = ()
    reencoding: Reencoding | None = None
    attention: AttentionRule | None = None
    host_values: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.rows.ndim != 3:
            raise ValueError(f"conditioning rows must have shape [batch, tokens, width], not {list(self.rows.shape)}")
        if self.tokens and len(self.tokens) != self.rows.shape[1]:
            raise ValueError(f"{len(self.tokens)} tokens were given for {self.rows.shape[1]} conditioning rows")
        if self.attention is not None and len(self.attention.keep) != self.rows.shape[1]:
            raise ValueError(
                f"an attention rule for {len(self.attention.keep)} tokens was given for {self.rows.shape[1]} rows"
            )

    def with_rows(self, rows: Tensor, extras: Mapping[str, Tensor] | None = None) -> Conditioning:
        """The same prompt with other rows; the way back through the encoder no longer holds and is dropped."""
        return replace(self, rows=rows, extras=self.extras if extras is None else extras, reencoding=None)

    def repeat(self, count: int) -> Conditioning:
        """Each entry ``count`` times in a row: [B, N, D] -> [B * count, N, D]."""
        extras = {k: v.repeat_interleave(count, 0) for k, v in self.extras.items()}
        return replace(self, rows=self.rows.repeat_interleave(count, 0), extras=extras)

    def of_images(self, start: int, stop: int, count: int) -> Conditioning:
        """What belongs to images ``start`` to ``stop`` of a batch of ``count``; a single prompt belongs to all."""
        if (start, stop) == (0, count):
            return self
        if self.rows.shape[0] != count:
            return replace(self, images=(start, stop))
        extras = {k: v[start:stop] if v.shape[0] == count else v for k, v in self.extras.items()}
        return replace(self, rows=self.rows[start:stop], extras=extras, images=(start, stop))

    def images_at_once(self, count: int, at_once: int) -> int:
        """How many images of a batch of ``count`` can share an evaluation: all, where entries stand for several."""
        return at_once if self.rows.shape[0] in (1, count) else count

    def row_mask(self, *roles: Role) -> Tensor:
        """[N] booleans: rows whose role is one of ``roles``. Raises ValueError when the tokens are unknown."""
        if not self.tokens:
            raise ValueError("the tokens of this conditioning are not known, so its rows cannot be told apart")
        return torch.tensor([t.role in roles for t in self.tokens], device=self.rows.device)


def stack(conditionings: Sequence[Conditioning]) -> Conditioning:
    """One batch from several prompts of equal length; words and tokens do not survive.

    Raises ValueError for different lengths, or where one of them is attended to in a way of its own, or where the
    host keeps values with them and they are not all the same prompt.
    """
    values = conditionings[0].host_values
    if any(c.host_values is not values for c in conditionings if c.host_values or values):
        raise ValueError("prompts with which the host keeps masks or lengths cannot share a batch")
    if any(c.attention is not None for c in conditionings):
        raise ValueError("a prompt with an attention rule cannot share a batch with others")
    lengths = {c.rows.shape[1] for c in conditionings}
    if len(lengths) != 1:
        raise ValueError(f"conditionings of different lengths cannot share a batch: {sorted(lengths)} rows")
    extras = {k: torch.cat([c.extras[k] for c in conditionings]) for k in conditionings[0].extras}
    return Conditioning(torch.cat([c.rows for c in conditionings]), extras, host_values=values)


def sharing(conditionings: Sequence[Conditioning]) -> list[tuple[int, int]]:
    """A key for each prompt: those of one key may share a batch. They have one length, and no values of the host's."""
    return [(c.rows.shape[1], number if c.host_values else -1) for number, c in enumerate(conditionings)]


# --------------------------------------------------------------------- tokens back to words


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's and CLIP's printable stand-ins for bytes, read backwards (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    hidden = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for, without its end-of-word mark: 'caf', 'Ã©</w>' -> b'caf', b'\\xc3\\xa9'."""
    table = _byte_of_character()
    text = token.removesuffix("</w>")
    if all(c in table for c in text):
        return bytes(table[c] for c in text)
    return text.encode()


_SEPARATORS = frozenset(",;，、；。")


def split_words(prompt: str) -> tuple[Word, ...]:
    """Words at white space, after commas and semicolons, and in scripts that leave none between words.

    Punctuation stays with its word: 'a river,blue' has the words 'a', 'river,' and 'blue'. Every Chinese character is
    a word, and so is a row of Hiragana or of Katakana.

    >>> [word.text for word in split_words("a river,blue")]
    ['a', 'river,', 'blue']
    """
    words, start = [], None
    for i, character in enumerate(prompt + " "):
        if start is not None and (character.isspace() or _parts(prompt, i)):
            words.append(Word(prompt[start:i], start, i))
            start = None
        if start is None and not character.isspace():
            start = i
    return tuple(words)


def _parts(prompt: str, i: int) -> bool:
    """Whether a word ends before the character at ``i``, though no white space does."""
    before, here = prompt[i - 1], prompt[i]
    if before in _SEPARATORS:
        is_number = i > 1 and before == "," and prompt[i - 2].isdigit() and here.isdigit()
        return here not in _SEPARATORS and not is_number
    scripts = _unspaced(before), _unspaced(here)
    if scripts == (None, None) or unicodedata.category(before) in ("Ps", "Pi"):
        return False  # an opening bracket stays with what follows it
    if scripts[1] is None:
        return here.isalnum() or unicodedata.category(here) in ("Ps", "Pi")
    return scripts[0] != scripts[1] or scripts[1] == "Han"


def _unspaced(character: str) -> str | None:
    """The script of a character, where it is one that is written without spaces."""
    if "\u3041" <= character <= "\u309f":
        return "Hiragana"
    if "\u30a1" <= character <= "\u30ff":
        return "Katakana"
    code = ord(character)
    is_han = 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF
    return "Han" if is_han else None


def align(prompt: str, tokens: Sequence[str]) -> tuple[tuple[Word, ...], tuple[int | None, ...]]:
    """Words as typed, and for each byte-level token the word it belongs to.

    The tokens' bytes are matched in order with the prompt's, letter case and white space aside. A
    tokenizer may drop or change characters (unicode normalisation): what cannot be matched any more
    is counted to the word reached last, so that no token is lost. None only for an empty prompt.

    >>> words, owners = align("a river", ["a</w>", "riv", "er</w>"])
    >>> owners
    (0, 1, 1)
    """
    words = split_words(prompt)
    if not words:
        return words, tuple(None for _ in tokens)
    # For each byte of the lower-cased prompt without white space, the word it lies in. Composed and lower-cased
    # character by character, as CLIP's tokenizer does (str.lower of a whole word knows the final sigma).
    flat = bytearray()
    owner: list[int] = []
    for number, word in enumerate(words):
        encoded = "".join(map(str.lower, unicodedata.normalize("NFC", word.text))).encode()
        flat += encoded
        owner += [number] * len(encoded)
    position, found = 0, []
    for token in tokens:
        piece = token_bytes(token).lower()
        at = flat.find(piece, position, position + len(piece) + 24) if piece else -1
        if at >= 0:
            found.append(owner[at])
            position = at + len(piece)
        else:
            found.append(owner[min(position, len(owner) - 1)])
            position = min(position + len(piece), len(owner) - 1)
    return words, tuple(found)


def merge_by_word(values: Tensor, tokens: Sequence[TokenRow], words: Sequence[Word]) -> Tensor:
    """Token values [N] summed over each word's real tokens: [number of words].

    >>> tokens = [TokenRow("<start>", "start"), TokenRow("riv", "word", 0), TokenRow("er</w>", "word", 0)]
    >>> merge_by_word(torch.tensor([9.0, 1.0, 2.0]), tokens, split_words("river"))
    tensor([3.])
    """
    merged = torch.zeros(len(words), dtype=values.dtype)
    for value, token in zip(values.detach().cpu(), tokens, strict=True):
        if token.role == "word" and token.word is not None:
            merged[token.word] += value
    return merged


def rows_of_chunks(text: str, chunks: Sequence[Sequence[str]], end: str) -> tuple[TokenRow, ...]:
    """What the tokens of each chunk stand for: a start token, byte-level words of ``text``, then ``end`` and padding.

    >>> [row.role for row in rows_of_chunks("a", [["<start>", "a</w>", "<end>", "<end>"]], "<end>")]
    ['start', 'word', 'end', 'end']
    """
    pieces: list[str] = []
    roles: list[Role] = []
    for chunk in chunks:
        ended = False
        for number, piece in enumerate(chunk):
            ended = ended or (number > 0 and piece == end)
            roles.append("start" if number == 0 else "end" if ended else "word")
            pieces.append(piece)
    _, owners = align(text, [p for p, role in zip(pieces, roles, strict=True) if role == "word"])
    place = iter(owners)
    return tuple(
        TokenRow(piece, role, next(place) if role == "word" else None)
        for piece, role in zip(pieces, roles, strict=True)
    )


def by_position(conditioning: Conditioning) -> Conditioning:
    """The same rows with a word for each, called by its place: for prompts whose text is not known."""
    count = conditioning.rows.shape[1]
    words = tuple(Word(f"token {number}", 0, 0) for number in range(count))
    tokens = tuple(TokenRow(word.text, "word", number) for number, word in enumerate(words))
    return replace(conditioning, prompt="", words=words, tokens=tokens)
