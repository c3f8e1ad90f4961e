"""Prompts in ComfyUI: conditionings that keep their text, and the encoder with a way back for gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import comfy.sd1_clip
import folder_paths
import torch
from torch import Tensor

from ...core.conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, Word, rows_of_chunks
from ...core.prompt_weights import parse, words_as_typed
from .api import CLIP, Chunks, Entry, HostConditioning, TextModel

SOURCE = "dejavu_source"  # key in a conditioning's dict that holds its Source
# What the host's text encoders give with the rows, some of them for one prompt and not for the next. Everything else
# in a conditioning's dict (control nets, areas, ranges, hooks, guidance, sizes) belongs to the run.
OF_THE_PROMPT = frozenset(
    {
        "attention_mask",
        "attention_mask_img_shape",
        "attention_mask_mt5xl",
        "conditioning_byt5small",
        "conditioning_llama3",
        "conditioning_lyrics",
        "conditioning_mt5xl",
        "minimax_token_tags",
        "num_layers_stacked",
        "t5xxl_ids",
        "t5xxl_weights",
        "text_input_ids",
        "unprocessed_ltxav_embeds",
    }
)
CLIP_CHUNK, T5_WIDTH = 77, 4096  # rows that CLIP gives at a time, and the width by which T5's rows are told apart


@dataclass(frozen=True)
class Source:
    """Where a conditioning came from: the text, the encoder and the workflow's node; travels in its dict.

    ``clip`` is None where only the text is known, as read from the workflow.
    """

    clip: CLIP | None
    text: str
    node: str | None = None


def encode_text(clip: CLIP | None, text: str, node: str | None = None) -> HostConditioning:
    """What CLIPTextEncode gives, with the text and the encoder kept along. Raises ValueError without a CLIP."""
    if clip is None:
        raise ValueError("the CLIP input is empty: the checkpoint that was loaded may hold no text encoder")
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    for entry in encoded:
        entry[1][SOURCE] = Source(clip, text, node)
    empty_prompt(clip)  # while the encoder is loaded: a run may want it in its midst
    return encoded


_empty_prompts: WeakKeyDictionary[TextModel, dict[object, Conditioning]] = WeakKeyDictionary()


def empty_prompt(clip: CLIP) -> Conditioning:
    """What the empty prompt encodes to, kept for as long as the encoder and its patches are the same."""
    known = _empty_prompts.setdefault(clip.cond_stage_model, {})
    key = (clip.patcher.patches_uuid, clip.layer_idx)
    if key not in known:
        known[key] = replace(encode(clip, ""), reencoding=None)  # a way back would hold the encoder
    return known[key]


def conditioning_of(rows: Tensor, options: Entry) -> Conditioning:
    """One entry of a host's conditioning as the core's, with words and way back where the encoder is known.

    Without a source the tokens stay unknown: rows can be measured and optimised, words not named.
    """
    pooled = options.get("pooled_output")
    extras = {} if pooled is None else {"pooled_output": pooled}
    plain = Conditioning(rows, extras, host_values={k: v for k, v in options.items() if k in OF_THE_PROMPT})
    source: Source | None = options.get(SOURCE)
    if source is None:
        return plain
    if source.clip is None:
        words, tokens = _read_without_encoder(source.text, rows) if not plain.host_values else ((), ())
        return replace(plain, prompt=source.text if tokens else "", words=words, tokens=tokens)
    found = encode(source.clip, source.text)
    # The host may have changed the rows since (averaged, concatenated, zeroed): then the words no longer fit them.
    if found.rows.shape != rows.shape or not torch.allclose(found.rows.to(rows), rows, atol=1e-3, rtol=1e-3):
        return plain
    return replace(found, rows=rows, extras=extras, host_values=plain.host_values)


def options_with(options: Entry, conditioning: Conditioning) -> Entry:
    """A host's conditioning's dict with what belongs to another prompt in place of what belonged to its own."""
    kept = {name: value for name, value in options.items() if name not in OF_THE_PROMPT}
    return {**kept, **conditioning.extras, **conditioning.host_values}


def encode(clip: CLIP, text: str) -> Conditioning:
    """The conditioning of a text, encoded where the encoder's weights lie, or to where they are streamed.

    The host's own call would load the encoder first, which in the middle of a run may push the sampled model out.
    """
    tokens = clip.tokenize(text)
    with torch.no_grad():
        rows, extras, values = _run_encoder(clip, tokens)
    if not set(tokens) <= {"l", "g", "h"}:
        return Conditioning(rows, extras, text, host_values=values)
    encoders = [_Encoder(clip, name, tokens[name]) for name in sorted(tokens, key="lgh".index)]
    plain = parse(text).text
    rows_of = [encoder.token_rows(plain) for encoder in encoders]

    def encode_from(embeddings: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with ExitStack() as hooks:
            for encoder, given in zip(encoders, embeddings, strict=True):
                hooks.enter_context(encoder.replaced(given))
            return _run_encoder(clip, tokens)[:2]

    with torch.no_grad():
        reencoding = None
        if all(encoder.is_plain for encoder in encoders):
            inputs = (EncoderInput(e.embeddings(), r) for e, r in zip(encoders, rows_of, strict=True))
            reencoding = Reencoding(tuple(inputs), encode_from)
    known = rows_of[0] if len(rows_of[0]) == rows.shape[1] else ()
    return Conditioning(rows, extras, text, words_as_typed(text), known, reencoding, host_values=values)


def as_typed(caption: str) -> str:
    """A training caption knows no weights: its brackets are brackets."""
    return caption.replace("(", "\\(").replace(")", "\\)")


def _read_without_encoder(text: str, rows: Tensor) -> tuple[tuple[Word, ...], tuple[TokenRow, ...]]:
    """Words and tokens by CLIP's own tokenizer; both empty where the rows are not CLIP's."""
    if rows.shape[1] % CLIP_CHUNK or rows.shape[2] == T5_WIDTH:
        return (), ()
    tokenizer = _clip_tokenizer()
    tokens = _token_rows(tokenizer.tokenize_with_weights(text), tokenizer, parse(text).text)
    return (words_as_typed(text), tokens) if len(tokens) == rows.shape[1] else ((), ())


@cache
def _clip_tokenizer() -> Any:
    return comfy.sd1_clip.SDTokenizer(embedding_directory=folder_paths.get_folder_paths("embeddings"))


def _run_encoder(clip: CLIP, tokens: Mapping[str, Chunks]) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """(rows, the pooled vector where there is one, what else the encoder gives with them)."""
    encoder = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    if _is_streamed(clip):
        if encoder.current_weight_patches_uuid != clip.patcher.patches_uuid:
            with torch.inference_mode():  # as all that moves weights; this loads nothing yet, it names the patches
                clip.load_model()
        encoder.set_clip_options({"execution_device": clip.patcher.load_device})
    rows, pooled, *values = encoder.encode_token_weights(tokens)
    return rows, {} if pooled is None else {"pooled_output": pooled}, dict(values[0]) if values else {}


def lost_its_patches(clip: CLIP) -> bool:
    """Whether the encoder lies where it lies without its LoRAs, which the host takes off when it moves it out."""
    patcher, encoder = clip.patcher, clip.cond_stage_model
    patched = not patcher.patches or encoder.current_weight_patches_uuid == patcher.patches_uuid
    return not _is_streamed(clip) and not patched


def _is_streamed(clip: CLIP) -> bool:
    """Dynamic VRAM: the weights lie in main memory, and go to the card layer by layer."""
    return bool(getattr(clip.patcher, "is_dynamic", lambda: False)())


def _token_rows(chunks: Chunks, tokenizer: Any, text: str) -> tuple[TokenRow, ...]:
    """What each (token, weight) of the chunks stands for; ``text`` is the prompt without its weights."""
    names, end = tokenizer.inv_vocab, tokenizer.inv_vocab.get(tokenizer.end_token)
    pieces = [["" if isinstance(token, Tensor) else names.get(token, "") for token, *_ in chunk] for chunk in chunks]
    return rows_of_chunks(text, pieces, end)


class _Encoder:
    """One CLIP encoder of a host's text model, with the chunks of (token, weight) it is about to read."""

    def __init__(self, clip: CLIP, name: str, chunks: Chunks) -> None:
        self.chunks = chunks
        self._tokenizer = getattr(clip.tokenizer, f"clip_{name}")
        self._table = getattr(clip.cond_stage_model, f"clip_{name}").transformer.get_input_embeddings()
        self._device = clip.patcher.load_device if _is_streamed(clip) else self._table.weight.device

    @property
    def is_plain(self) -> bool:
        """No textual inversions: those are vectors, not tokens of the table."""
        return not any(isinstance(token, Tensor) for chunk in self.chunks for token, _ in chunk)

    def token_rows(self, text: str) -> tuple[TokenRow, ...]:
        return _token_rows(self.chunks, self._tokenizer, text)

    def embeddings(self) -> Tensor:
        """[chunks * tokens, d] of the tokens, as they enter the encoder."""
        numbers = torch.tensor([[token for token, _ in chunk] for chunk in self.chunks])
        return self._table(numbers.to(self._device), out_dtype=torch.float32).flatten(0, 1)

    @contextmanager
    def replaced(self, embeddings: Tensor) -> Iterator[None]:
        """While open, the table gives these instead; it is asked once a chunk, and then for the empty prompt."""
        parts = iter(embeddings.split([len(chunk) for chunk in self.chunks]))

        def give(module: object, arguments: object, output: Tensor) -> Tensor:
            part = next(parts, None)
            return output if part is None else part[None].to(output)

        handle = self._table.register_forward_hook(give)
        try:
            yield
        finally:
            handle.remove()
