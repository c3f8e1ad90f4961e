"""Prompts as CLIP's text encoders read them: in chunks of 75 tokens, with the way back from rows to words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, align
from ...core.denoiser import PromptTooLong

CHUNK = 75
MAX_CHUNKS = 8
MAX_CHARACTERS = 100_000  # of a prompt: tokenizers take memory by them, and 600 tokens are far fewer
_WORDS_READ_BACK = 50  # of a tokenizer's own vocabulary, to see whether it can read

Encoders = Sequence[tuple[Any, Any]]
Joined = Callable[[Sequence[Any]], tuple[Tensor, dict[str, Tensor]]]


def encode(prompt: str, encoders: Encoders, joined: Joined) -> Conditioning:
    """The conditioning of a prompt under each (tokenizer, text encoder), shorter ones filled up with empty chunks.

    ``joined`` makes rows [chunks, 77, D] and extras of what the text encoders put out. Raises PromptTooLong for a
    prompt of more than 8 chunks.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise PromptTooLong(
            f"the prompt is too long: {len(prompt):,} characters, at most {MAX_CHARACTERS:,} can be read; shorten it"
        )
    chunked = [_chunks(tokenizer, prompt) for tokenizer, _ in encoders]
    count = max(len(chunks) for chunks in chunked)
    if count > MAX_CHUNKS:
        total = sum(len(c) for c in max(chunked, key=len))
        raise PromptTooLong(
            f"the prompt is too long: {total} tokens, at most {MAX_CHUNKS * CHUNK} can be read; shorten it"
        )
    inputs, ids = [], []
    words, _ = align(prompt, [])
    for (tokenizer, encoder), chunks in zip(encoders, chunked, strict=True):
        chunks = chunks + [[]] * (count - len(chunks))
        pieces = [tokenizer.convert_ids_to_tokens(chunk) for chunk in chunks]
        _, owners = align(prompt, [piece for chunk in pieces for piece in chunk])
        tokens, place = [], iter(owners)
        for chunk in pieces:
            tokens.append(TokenRow(tokenizer.bos_token, "start"))
            tokens += [TokenRow(piece, "word", next(place)) for piece in chunk]
            tokens += [TokenRow(tokenizer.eos_token, "end")] * (CHUNK + 1 - len(chunk))
        numbers = torch.tensor([_padded(tokenizer, chunk) for chunk in chunks], device=encoder.device)
        ids.append(numbers)
        table = encoder.get_input_embeddings()
        inputs.append(EncoderInput(table(numbers).flatten(0, 1).detach().float(), tuple(tokens)))

    def encoded(embeddings: Sequence[Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
        """From token embeddings put in place of the encoders' own; None for their own."""
        outputs = []
        for numbers, (_, encoder), given in zip(ids, encoders, embeddings, strict=True):
            with _replaced_embeddings(encoder, given):
                outputs.append(encoder(numbers, output_hidden_states=True))
        rows, extras = joined(outputs)
        return rows.float().flatten(0, 1)[None], extras

    with torch.no_grad():
        rows, extras = encoded([None] * len(ids))
    return Conditioning(rows, extras, prompt, words, inputs[0].tokens, Reencoding(tuple(inputs), encoded))


def misfit(tokenizer: Any, embeddings: int) -> str:
    """Why a tokenizer is not that of a text encoder with so many embeddings; empty where it may well be.

    transformers makes up a vocabulary where it finds none, under which every prompt reads alike.
    """
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    if highest >= embeddings or len(vocabulary) < 0.95 * embeddings:
        return f"does not fit its text encoder: {len(vocabulary):,} tokens for {embeddings:,} embeddings"
    whole = sorted(token[: -len("</w>")] for token in vocabulary if token.endswith("</w>") and len(token) > 5)
    words = [word for word in whole if word.isascii() and word.isalpha() and word.islower()]
    asked = words[:: max(1, len(words) // _WORDS_READ_BACK)]
    read = [tokenizer(word, add_special_tokens=False).input_ids for word in asked]
    known = sum(ids == [vocabulary[f"{word}</w>"]] for word, ids in zip(asked, read, strict=True))
    return "cannot read the words of its own vocabulary" if known < len(asked) / 2 else ""


@contextmanager
def _replaced_embeddings(encoder: torch.nn.Module, embeddings: Tensor | None) -> Iterator[None]:
    """While open, the token embedding gives ``embeddings`` [chunks * 77, d] in place of its own output."""
    if embeddings is None:
        yield
        return
    table = encoder.get_input_embeddings()  # type: ignore[operator]
    handle = table.register_forward_hook(lambda module, args, output: embeddings.reshape(output.shape).to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def _chunks(tokenizer: Any, prompt: str) -> list[list[int]]:
    """Token numbers without start and end, 75 a chunk; one empty chunk for the empty prompt."""
    # verbose=False: the tokenizer warns of more than 77 tokens, which are split into chunks here.
    numbers = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)] or [[]]


def _padded(tokenizer: Any, chunk: list[int]) -> list[int]:
    body = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
    return body + [tokenizer.pad_token_id] * (CHUNK + 2 - len(body))
