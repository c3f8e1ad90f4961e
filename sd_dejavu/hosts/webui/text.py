"""Prompts in Automatic1111 and Forge: the tokens their engines make of a text, and a way back for gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.conditioning import Conditioning, EncoderInput, Reencoding, rows_of_chunks
from ...core.prompt_weights import parse, words_as_typed
from .hosted import Checkpoint, Chunk, Engine


def as_typed(caption: str) -> str:
    """A training caption knows no syntax of the hosts': what would be read as weights, joins or networks is text.

    The words that join prompts do so in capitals only, which CLIP does not tell apart.
    """
    joined = re.sub(r"\b(AND|BREAK)\b", lambda word: word[0].lower(), caption)
    return re.sub(r"([\\()\[\]])", r"\\\1", re.sub(r"<(?=\w+:)", "< ", joined))


def engines_of(sd_model: Checkpoint) -> list[Engine]:
    """The text engines of a loaded model in the order of their columns; empty where it has others than CLIP."""
    names = ("text_processing_engine", "text_processing_engine_l", "text_processing_engine_g")
    found = [engine for name in names if (engine := getattr(sd_model, name, None)) is not None]
    if not found:
        embedders = getattr(getattr(sd_model, "conditioner", None), "embedders", None)
        found = [e for e in embedders or [getattr(sd_model, "cond_stage_model", None)] if hasattr(e, "process_texts")]
    return [] if any(not hasattr(engine, "id_end") for engine in found) else found


def modules_of(engine: Any) -> torch.nn.Module:
    """The network of an engine: in Automatic1111 the engine itself, in Forge its encoder."""
    network: torch.nn.Module = getattr(engine, "text_encoder", engine)
    return network


def encode(sd_model: Checkpoint, text: str, vector: Tensor | None = None) -> Conditioning:
    """The conditioning of one text, as the host's engines make it, with its words and its way back.

    ``vector`` is one that the host made for this run (SDXL): its numbers for the size are kept. Raises
    ValueError where the model's text encoders are not CLIP's.
    """
    engines = engines_of(sd_model)
    if not engines:
        raise ValueError("the words of this model's text encoder cannot be read")
    plain = parse(text).text
    pieces = [[_named(engine, chunk) for chunk in _chunks(engine, text)] for engine in engines]
    tokens = [
        rows_of_chunks(plain, chunks, _pieces(engine, [engine.id_end])[0])
        for engine, chunks in zip(engines, pieces, strict=True)
    ]

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        found = [engine([text]) for engine in engines]
        rows = torch.cat([f[0] if isinstance(f, tuple) else f for f in found], dim=2)
        if vector is None:
            return rows, {}
        pooled = next(f[1] for f in reversed(found) if isinstance(f, tuple))
        return rows, {"vector": torch.cat([pooled, vector[:1, pooled.shape[1] :].to(pooled)], dim=1)}

    def encode_from(embeddings: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with ExitStack() as hooks:
            for engine, given in zip(engines, embeddings, strict=True):
                hooks.enter_context(_replaced(engine, given))
            return run()

    with torch.no_grad():
        embeddings = [[] for _ in engines]  # type: list[list[Tensor]]
        with ExitStack() as hooks:
            for engine, seen in zip(engines, embeddings, strict=True):
                hooks.enter_context(_listening(engine, seen))
            rows, extras = run()
    inputs = tuple(
        EncoderInput(torch.cat([s[0] for s in seen[: len(chunks)]]).float(), known)
        for seen, known, chunks in zip(embeddings, tokens, pieces, strict=True)
    )
    # An inversion's vectors are put in by the table itself, so what it gives is complete.
    known = tokens[0] if len(tokens[0]) == rows.shape[1] else ()
    return Conditioning(rows, extras, text, words_as_typed(text), known, Reencoding(inputs, encode_from))


def _chunks(engine: Engine, text: str) -> list[Chunk]:
    batches, _ = engine.process_texts([text])
    chunks: list[Chunk] = batches[0]
    return chunks


def _named(engine: Engine, chunk: Chunk) -> list[str]:
    """The pieces of a chunk; a textual inversion's vectors are called by its name, which stands at the last of them."""
    pieces = _pieces(engine, chunk.tokens)
    for offset, embedding in chunk.fixes:
        places = range(offset + 1, min(offset + 1 + int(embedding.vectors), len(pieces) - 1))
        for place in places:
            pieces[place] = embedding.name if place == places[-1] else ""
    return pieces


def _pieces(engine: Engine, numbers: Sequence[int]) -> list[str]:
    tokenizer = getattr(engine, "tokenizer", None)
    if tokenizer is not None and hasattr(tokenizer, "convert_ids_to_tokens"):
        pieces: list[str] = tokenizer.convert_ids_to_tokens(list(numbers))
        return pieces
    from modules.sd_hijack_open_clip import tokenizer as open_clip_tokenizer  # Automatic1111's, for OpenCLIP

    return [open_clip_tokenizer.decoder.get(number, "") for number in numbers]


def _table(engine: Engine) -> torch.nn.Module:
    """The token embedding, with whatever the host has put around it for textual inversions."""
    named = modules_of(engine).named_modules()
    return next(module for name, module in named if name.endswith("token_embedding"))


@contextmanager
def _listening(engine: Engine, seen: list[Tensor]) -> Iterator[None]:
    """While open, the table's outputs are kept; it is asked once a chunk."""
    handle = _table(engine).register_forward_hook(lambda module, given, output: seen.append(output.detach().clone()))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(engine: Engine, embeddings: Tensor) -> Iterator[None]:
    """While open, the table gives these [chunks * 77, d] instead."""
    parts = iter(embeddings.split(77))

    def give(module: torch.nn.Module, given: object, output: Tensor) -> Tensor:
        part = next(parts, None)
        return output if part is None else part[None].to(output)

    handle = _table(engine).register_forward_hook(give)
    try:
        yield
    finally:
        handle.remove()
