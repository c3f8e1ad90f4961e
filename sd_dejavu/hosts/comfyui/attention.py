"""Attention rules in ComfyUI: the host lets a patch change the keys' context of every cross-attention apart from the values'."""

from __future__ import annotations

import uuid

import comfy.patcher_extension
import torch
from torch import Tensor

from ...core.attention import AttentionRule
from .api import Executor, ModelPatcher, Options

POSITIVE = 0  # the host's number for the prompt among the conditionings of a batch
RULE = "dejavu_attention"  # key in a conditioning's dict that holds the rule by which it is attended to


def attending(options: Options, rule: AttentionRule | None) -> Options:
    """The host's options of an evaluation, in which the prompt is attended to by ``rule``."""
    if rule is None:
        return options
    transformer = options.get("transformer_options", {})
    patches = transformer.get("patches", {})
    factors = rule.kept_factors

    def scale(n: Tensor, context: Tensor, values: Tensor, extra: Options) -> tuple[Tensor, Tensor, Tensor]:
        # The keys are linear in the context and have no bias: scaling a row scales its logits.
        times, rest = divmod(context.shape[1], len(factors))
        which = extra["cond_or_uncond"]
        if rest or not times:
            return n, context, values
        prompts = torch.tensor([kind == POSITIVE for kind in which], device=context.device)
        prompts = prompts.repeat_interleave(context.shape[0] // len(which))
        scaled = context * factors.repeat(times).to(context)[None, :, None]
        return n, torch.where(prompts[:, None, None], scaled, context), values

    known = [*patches.get("attn2_patch", []), scale]
    return {**options, "transformer_options": {**transformer, "patches": {**patches, "attn2_patch": known}}}


def heeding(patcher: ModelPatcher) -> ModelPatcher:
    """A clone of the model whose runs attend to their prompt by the rule that its conditioning carries, if it does."""

    def predict_noise(
        executor: Executor, x: Tensor, timestep: Tensor, options: Options | None = None, seed: object = None
    ) -> Tensor:
        positive = executor.class_obj.conds.get("positive") or []
        rule = positive[0].get(RULE) if len(positive) == 1 else None
        return executor(x, timestep, attending(options or {}, rule), seed)

    clone = patcher.clone()
    key = f"dejavu-attention-{uuid.uuid4().hex[:8]}"
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, key, predict_noise)
    return clone
