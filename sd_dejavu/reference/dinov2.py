"""DINOv2 as one file of weights: Oquab et al., *DINOv2: Learning Robust Visual Features without Supervision*, TMLR 2024.

Computed by transformers' own classes. A safetensors file alone has no configuration: it is told from the shapes. Known are
the names of transformers (``facebook/dinov2-*``) and those of the authors' repository (``dinov2_vits14_pretrain``), with
registers or without. The authors' heads have 64 values each, in every size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..quiet import quiet

_HEAD = 64  # values of one attention head
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_INSIDE = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def as_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names, in float32, without heads that classify."""
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key.removeprefix("dinov2_with_registers.").removeprefix("dinov2.")
        if name.startswith(("classifier.", "head.")):
            continue
        block = _BLOCK.fullmatch(name)
        if block is None:
            found[_renamed(name, _EMBEDDINGS)] = value.float()
        elif block[2].startswith("attn.qkv."):
            for part, third in zip(("query", "key", "value"), value.float().chunk(3), strict=True):
                ending = block[2].removeprefix("attn.qkv.")
                found[f"encoder.layer.{block[1]}.attention.attention.{part}.{ending}"] = third
        else:
            found[f"encoder.layer.{block[1]}.{_renamed(block[2], _INSIDE)}"] = value.float()
    return found


def configuration(weights: Mapping[str, Tensor]) -> Any:
    """transformers' configuration of weights under its names. Raises KeyError or ValueError where they are others."""
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    projection = weights["embeddings.patch_embeddings.projection.weight"]
    hidden, patch = projection.shape[0], projection.shape[-1]
    side = round(max(0, weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    if hidden % _HEAD:
        raise ValueError(f"a width of {hidden} is no multiple of {_HEAD}")
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    gated = "encoder.layer.0.mlp.weights_in.weight" in weights
    known: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden // _HEAD,
        "mlp_ratio": 4 if gated else weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        "use_swiglu_ffn": gated,
        "image_size": side * patch,
        "patch_size": patch,
    }
    registers = weights.get("embeddings.register_tokens")
    if registers is None:
        return Dinov2Config(**known)
    return Dinov2WithRegistersConfig(**known, num_register_tokens=registers.shape[1])


def network(weights: Mapping[str, Tensor]) -> nn.Module:
    """transformers' model of the weights of one file. Raises ValueError with a sentence where they are of another network."""
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    try:
        named = as_transformers(weights)
        config = configuration(named)
        loader: Any = Dinov2Model if config.model_type == "dinov2" else Dinov2WithRegistersModel
        named.setdefault("embeddings.mask_token", named["embeddings.cls_token"][0] * 0)  # not used but in training
        with quiet():
            module, told = loader.from_pretrained(None, config=config, state_dict=named, output_loading_info=True)
    except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"its tensors are not those of a DINOv2 network ({_said(error)})") from error
    if wrong := sorted(told["missing_keys"]) or sorted(told["unexpected_keys"]):
        kind = "it lacks" if told["missing_keys"] else "unknown are"
        raise ValueError(f"its tensors are not those of a DINOv2 network ({kind} {', '.join(wrong[:3])})")
    found: nn.Module = module
    return found


def _renamed(name: str, names: Mapping[str, str]) -> str:
    if name in names:
        return names[name]
    stem, _, last = name.rpartition(".")
    return f"{names.get(stem, stem)}.{last}" if stem else name


def _said(error: Exception) -> str:
    return f"it lacks {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
