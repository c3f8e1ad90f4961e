"""Who a network is: by its weights, whatever a host calls them and however it holds them."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from torch import Tensor, nn

from sd_dejavu.weights import (
    Identity,
    digest,
    fingerprint,
    named,
    of_module,
    of_text_encoder,
    sampled,
    unpatched,
)

GENERATOR = torch.Generator().manual_seed(0)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


STATE = {"in.weight": some(8, 4, 3, 3), "proj.weight": some(8, 8, 1, 1), "proj.bias": some(8), "norm.weight": some(8)}
NAMES = {"in.weight": "conv_in.weight", "proj.weight": "z.proj.weight", "proj.bias": "z.proj.bias", "norm.weight": "a"}


def told(state: dict[str, Tensor], prediction_type: str = "epsilon", dtype: torch.dtype | None = None) -> str:
    return fingerprint(sampled((name, value, dtype) for name, value in state.items()), prediction_type)


def held_otherwise() -> dict[str, dict[str, Tensor]]:
    with torch.inference_mode():
        inference = {name: value.clone() for name, value in STATE.items()}
    return {
        "renamed": {NAMES[name]: value for name, value in STATE.items()},
        "in another order": dict(reversed(STATE.items())),
        "a linear layer": {**STATE, "proj.weight": STATE["proj.weight"].reshape(8, 8)},
        "channels last": {**STATE, "in.weight": STATE["in.weight"].to(memory_format=torch.channels_last)},
        "a view": {**STATE, "norm.weight": torch.stack([STATE["norm.weight"], torch.ones(8)], 1)[:, 0]},
        "float16": {name: value.half() for name, value in STATE.items()},
        "float16 and back": {name: value.half().float() for name, value in STATE.items()},
        "partly float16": {**STATE, "in.weight": STATE["in.weight"].half()},
        "parameters": {name: nn.Parameter(value) for name, value in STATE.items()},
        "inference tensors": inference,
    }


@pytest.mark.parametrize("way", held_otherwise())
def test_the_same_weights_are_the_same_model(way: str) -> None:
    assert told(held_otherwise()[way]) == told(STATE)


def with_value(place: int, value: float) -> Tensor:
    changed = STATE["norm.weight"].clone()
    changed[place] = value
    return changed


OTHERS = {
    "one value": {**STATE, "norm.weight": with_value(3, 2.0)},
    "two values changed places": {**STATE, "norm.weight": STATE["norm.weight"][[1, 0, 2, 3, 4, 5, 6, 7]]},
    "a layer less": {name: value for name, value in STATE.items() if name != "norm.weight"},
    "a layer more": {**STATE, "more": torch.zeros(8)},
    "another shape": {**STATE, "proj.weight": STATE["proj.weight"].reshape(4, 16)},
    "a step of float16": {**STATE, "norm.weight": with_value(3, float(STATE["norm.weight"][3]) * (1 + 2**-10))},
    "bfloat16": {name: value.bfloat16() for name, value in STATE.items()},
    "fp8": {name: value.to(torch.float8_e4m3fn) for name, value in STATE.items()},
}


def test_other_weights_are_other_models_all_of_them() -> None:
    found = [told(STATE), told(STATE, "v_prediction"), *(told(state) for state in OTHERS.values())]
    assert len(set(found)) == len(found) == len(OTHERS) + 2
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in found)


def test_weights_count_in_the_precision_that_they_are_used_in() -> None:
    assert told(STATE, dtype=torch.float8_e4m3fn) == told(OTHERS["fp8"])
    assert told(STATE, dtype=torch.float16) == told(STATE)


def test_a_few_values_of_each_tensor_are_read_evenly_spaced() -> None:
    (long, short) = sampled([("long", torch.arange(1000.0), None), ("short", torch.arange(6.0).view(2, 3), None)])
    assert long.values.tolist() == [15.0 * n for n in range(64)]  # every 1000 // 64th
    assert (short.name, short.shape, short.values.tolist()) == ("short", (2, 3), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert sampled([]) == []


def test_the_digits_are_those_of_the_formula() -> None:
    """Written out: the prediction type, then for each tensor its sides but those of 1, and its values in float16."""
    state = {"b": torch.tensor([[[1.5]], [[-2.0]]]), "a": torch.tensor([[0.25]])}
    one, two = b"[2]\x00\x3e\x00\xc0", b"[]\x00\x34"  # 1.5 = 0x3e00, -2 = 0xc000, 0.25 = 0x3400; little-endian
    assert told(state, "flow") == hashlib.sha256(b"flow" + one + two).hexdigest()[:16]
    full = torch.tensor([0.25]).numpy().tobytes()
    both = torch.tensor([1.5, -2.0]).numpy().tobytes()
    samples = sampled((name, value, None) for name, value in state.items())
    assert named(samples) == b"a(1, 1)" + full + b"b(2, 1, 1)" + both
    assert digest(b"a", b"b") == hashlib.sha256(b"ab").hexdigest()[:16]


def test_what_a_host_has_kept_of_patched_weights_counts() -> None:
    module = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    plain = fingerprint(sampled(of_module(module)))
    with torch.no_grad():
        module.weight += 1.0
    assert fingerprint(sampled(of_module(module))) != plain
    assert fingerprint(sampled(unpatched(of_module(module), {"weight": before["weight"]}.get))) == plain


def encoder(layers: int) -> dict[str, Tensor]:
    """A text encoder in CLIP's names; the first layers are the same for every number of them."""
    generator = torch.Generator().manual_seed(5)
    state = {"text_model.embeddings.token_embedding.weight": torch.randn(20, 4, generator=generator)}
    state["text_model.final_layer_norm.weight"] = torch.randn(4, generator=generator)
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            state[f"text_model.encoder.layers.{layer}.self_attn.{name}.weight"] = torch.randn(4, 4, generator=generator)
    return state


def encoder_told(state: dict[str, Tensor]) -> str:
    return fingerprint(sampled(of_text_encoder((name, value, None) for name, value in state.items())))


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in OpenCLIP's manner."""
    made = {name: value for name, value in state.items() if "self_attn" not in name}
    layers = sum("q_proj" in name for name in state)
    for layer in range(layers):
        parts = [state[f"text_model.encoder.layers.{layer}.self_attn.{p}_proj.weight"] for p in "qkv"]
        made[f"model.transformer.resblocks.{layer}.attn.in_proj_weight"] = torch.cat(parts)
    return made


def test_a_text_encoder_is_the_same_in_openclips_names_and_with_what_only_some_hosts_have() -> None:
    plain = encoder_told(encoder(23))
    more = {"logit_scale": torch.tensor(4.6), "text_projection.weight": some(4, 4), "position_ids": torch.arange(77)}
    assert encoder_told({**encoder(23), **more}) == plain
    assert encoder_told(fused(encoder(23))) == plain
    assert encoder_told(fused(encoder(24))) == plain  # the last of 24 is never used
    assert encoder_told(encoder(22)) != plain
    changed = fused(encoder(23))
    changed["model.transformer.resblocks.7.attn.in_proj_weight"][5, 0] += 1.0  # of the keys
    assert encoder_told(changed) != plain


def test_an_identity_is_its_digits() -> None:
    identity = Identity("0123456789abcdef", "old")
    assert identity == "0123456789abcdef" and {identity: 1}["0123456789abcdef"] == 1
    assert json.dumps(identity) == '"0123456789abcdef"' and identity.former == "old"
    assert copy.deepcopy(identity).former == "old" and Identity("ab").former == ""
