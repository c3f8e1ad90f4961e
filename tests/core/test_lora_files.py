"""LoRA files of every kind: by formulas worked by hand here, by lycoris-lora where it is installed, on whole models."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_dejavu.hosts.diffusers import ModelError, lora
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.kept.foreign import Unreadable
from sd_dejavu.training.lora_files import (
    Places,
    changed,
    changed_bias,
    fits,
    holds_lora,
    modules_of,
    read,
)

KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + KEY.replace(".", "_")
RNG = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG) * 0.3


def result(tensors: dict[str, Tensor], weight: Tensor, strength: float = 1.0) -> Tensor:
    contents = modules_of({f"m.{name}": tensor for name, tensor in tensors.items()})
    assert not contents.unknown
    (module,) = contents.modules
    assert fits(weight, module)
    return changed(weight, module, strength)


def near(found: Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float32), atol=2e-6, rtol=2e-5)


# ------------------------------------------------------------------------------- formulas, worked by hand


def test_a_plain_lora_of_rank_one():
    """up (2, 0) and down (1, 3) make ((2, 6), (0, 0)); alpha 1/2 of rank 1 halves it, strength 2 doubles it."""
    tensors = {
        "lora_down.weight": torch.tensor([[1.0, 3.0]]),
        "lora_up.weight": torch.tensor([[2.0], [0.0]]),
        "alpha": torch.tensor(0.5),
    }
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    near(result(tensors, weight), [[2.0, 4.0], [1.0, 1.0]])
    near(result(tensors, weight, 2.0), [[3.0, 7.0], [1.0, 1.0]])
    del tensors["alpha"]
    near(result(tensors, weight), [[3.0, 7.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    "names",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ],
)
def test_other_names_of_a_plain_lora(names: tuple[str, str]):
    weight, down, up = randn(4, 3), randn(2, 3), randn(4, 2)
    near(result(dict(zip(names, (down, up), strict=True)), weight), weight + up @ down)


def test_a_lora_of_a_convolution_and_one_with_a_middle():
    """Sums over all indices, by loops."""
    weight, up = randn(4, 3, 2, 2), randn(4, 2, 1, 1)
    down = randn(2, 3, 2, 2)
    wanted = weight.clone()
    for o, i, y, x, r in np.ndindex(4, 3, 2, 2, 2):
        wanted[o, i, y, x] += up[o, r, 0, 0] * down[r, i, y, x] * 3 / 2
    near(result({"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}, weight), wanted)
    narrow, mid = randn(2, 3, 1, 1), randn(2, 2, 2, 2)
    wanted = weight.clone()
    for o, i, y, x, p, q in np.ndindex(4, 3, 2, 2, 2, 2):
        wanted[o, i, y, x] += up[o, p, 0, 0] * mid[p, q, y, x] * narrow[q, i, 0, 0]
    near(result({"lora_down.weight": narrow, "lora_up.weight": up, "lora_mid.weight": mid}, weight), wanted)


def test_loha_is_a_product_element_by_element():
    weight, a1, b1, a2, b2 = randn(4, 3), randn(4, 2), randn(2, 3), randn(4, 2), randn(2, 3)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    wanted = weight.clone()
    for o, i in np.ndindex(4, 3):
        first = sum(a1[o, r] * b1[r, i] for r in range(2))
        wanted[o, i] += first * sum(a2[o, r] * b2[r, i] for r in range(2)) / 2
    near(result(tensors, weight), wanted)


def test_loha_of_a_convolution_with_cores():
    weight = randn(4, 3, 2, 2)
    a, b, t = [randn(2, 4), randn(2, 4)], [randn(2, 3), randn(2, 3)], [randn(2, 2, 2, 2), randn(2, 2, 2, 2)]
    tensors = {f"hada_w{n + 1}_{x}": m[n] for n in range(2) for x, m in (("a", a), ("b", b))}
    tensors |= {"hada_t1": t[0], "hada_t2": t[1]}
    halves = [torch.zeros_like(weight), torch.zeros_like(weight)]
    for n, o, i, y, x, p, q in np.ndindex(2, 4, 3, 2, 2, 2, 2):
        halves[n][o, i, y, x] += t[n][p, q, y, x] * a[n][p, o] * b[n][q, i]
    near(result(tensors, weight), weight + halves[0] * halves[1])


@pytest.mark.parametrize("first", ["whole", "in two"])
@pytest.mark.parametrize("second", ["whole", "in two"])
def test_lokr_is_kroneckers_product(first: str, second: str):
    """Weight [6, 8] of w1 [2, 4] and w2 [3, 2]; alpha / rank only where one of them is a product."""
    weight, parts, w, rank = randn(6, 8), {"alpha": torch.tensor(1.0)}, [], 2
    for number, (way, out, into) in enumerate(((first, 2, 4), (second, 3, 2)), 1):
        if way == "whole":
            parts[f"lokr_w{number}"] = whole = randn(out, into)
        else:
            parts[f"lokr_w{number}_a"], parts[f"lokr_w{number}_b"] = randn(out, rank), randn(rank, into)
            whole = parts[f"lokr_w{number}_a"] @ parts[f"lokr_w{number}_b"]
        w.append(whole)
    scale = 1.0 if first == second == "whole" else 1 / rank
    wanted = weight.clone()
    for o, i in np.ndindex(6, 8):
        wanted[o, i] += w[0][o // 3, i // 2] * w[1][o % 3, i % 2] * scale
    near(result(parts, weight), wanted)


@pytest.mark.parametrize("way", ["core", "flat", "spatial"])
def test_lokr_of_a_convolution(way: str):
    """Weight [4, 6, 2, 2] of w1 [2, 3] and w2 [2, 2, 2, 2], which is a core, or a product with the kernel in it."""
    weight, w1 = randn(4, 6, 2, 2), randn(2, 3)
    w2 = torch.zeros(2, 2, 2, 2)
    if way == "core":
        a, b, t = randn(3, 2), randn(3, 2), randn(3, 3, 2, 2)
        for o, i, y, x, p, q in np.ndindex(2, 2, 2, 2, 3, 3):
            w2[o, i, y, x] += t[p, q, y, x] * a[p, o] * b[q, i]
        parts = {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    else:
        a, b = randn(2, 3), randn(3, 2, 2, 2)
        for o, i, y, x, r in np.ndindex(2, 2, 2, 2, 3):
            w2[o, i, y, x] += a[o, r] * b[r, i, y, x]
        parts = {"lokr_w2_a": a, "lokr_w2_b": b.flatten(1) if way == "flat" else b}
    wanted = weight.clone()
    for o, i in np.ndindex(4, 6):
        wanted[o, i] += w1[o // 2, i // 2] * w2[o % 2, i % 2]
    near(result({"lokr_w1": w1, **parts}, weight), wanted)


def test_oft_turns_the_outputs():
    """A block of two with B = ((0, b), (0, 0)) is a rotation whose half angle has the tangent b; no length changes."""
    b = 0.5
    weight = randn(4, 3)
    blocks = torch.zeros(2, 2, 2)
    blocks[1, 0, 1] = b
    angle = 2 * np.arctan(b)
    wanted = weight.clone()
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    wanted[2], wanted[3] = cos * weight[2] - sin * weight[3], sin * weight[2] + cos * weight[3]
    near(result({"oft_blocks": blocks}, weight), wanted)
    near(result({"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, weight), wanted)
    lengths = torch.tensor([1.0, 1.0, 2.0, 3.0])
    near(result({"oft_blocks": blocks, "rescale": lengths[:, None]}, weight), wanted * lengths[:, None])
    # the constraint: alpha times the outputs bounds the length of Q, here b times the root of 2
    bound = 0.1
    small = 2 * np.arctan(bound * 4 / np.sqrt(2))
    cos, sin = float(np.cos(small)), float(np.sin(small))
    wanted[2], wanted[3] = cos * weight[2] - sin * weight[3], sin * weight[2] + cos * weight[3]
    near(result({"oft_blocks": blocks, "alpha": torch.tensor(bound)}, weight), wanted)
    turn = torch.eye(2).repeat(2, 1, 1)
    turn[1] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # the rotations themselves, as older files have them
    near(result({"oft_diag": turn}, weight), torch.stack([weight[0], weight[1], -weight[3], weight[2]]))


def test_boft_turns_near_rows_then_far_ones():
    """Four outputs, blocks of two, two stages: rows 0-1 and 2-3, then 0-2 and 1-3."""
    weight, blocks = randn(4, 3), torch.zeros(2, 2, 2, 2)
    tangents = [[0.1, 0.2], [0.3, -0.4]]
    for stage, block in np.ndindex(2, 2):
        blocks[stage, block, 0, 1] = tangents[stage][block]
    wanted = weight.clone()
    for stage, pairs in enumerate((((0, 1), (2, 3)), ((0, 2), (1, 3)))):
        for block, (p, q) in enumerate(pairs):
            angle = 2 * np.arctan(tangents[stage][block])
            cos, sin = float(np.cos(angle)), float(np.sin(angle))
            upper, lower = wanted[p].clone(), wanted[q].clone()
            wanted[p], wanted[q] = cos * upper + sin * lower, cos * lower - sin * upper
    near(result({"oft_blocks": blocks}, weight), wanted)
    near(result({"oft_blocks": blocks}, weight, 0.5), (weight + wanted) / 2)


def test_full_differences_and_of_the_bias():
    weight, bias, diff, of_bias = randn(4, 3), randn(4), randn(4, 3), randn(4)
    (module,) = modules_of({"m.diff": diff, "m.diff_b": of_bias}).modules
    assert fits(weight, module, bias) and not fits(weight, module)
    near(changed(weight, module, 0.5), weight + diff / 2)
    near(changed_bias(bias, module, 0.5), bias + of_bias / 2)
    (alone,) = modules_of({"m.diff_b": of_bias}).modules
    near(changed(weight, alone), weight)
    (norm,) = modules_of({"m.w_norm": bias, "m.b_norm": of_bias}).modules
    near(changed(torch.ones(4), norm), 1 + bias)


@pytest.mark.parametrize("on_input", [True, False])
def test_ia3_has_a_number_for_each_output_or_input(on_input: bool):
    weight, by = randn(4, 3), randn(3 if on_input else 4)
    wanted = weight * (1 + by) if on_input else weight * (1 + by)[:, None]
    near(result({"weight": by, "on_input": torch.tensor(on_input)}, weight), wanted)


@pytest.mark.parametrize("way", ["outputs", "inputs", "peft"])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_a_dora_has_lengths_of_its_own(way: str, kernel: tuple[int, ...]):
    """As many outputs as inputs, where the shape of the lengths alone tells."""
    weight, down, up = randn(3, 3, *kernel), randn(2, 3, *kernel), randn(3, 2, *[1] * len(kernel))
    moved, lengths = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape), torch.tensor([1.0, 2.0, 3.0])
    wanted = moved.clone()
    for number in range(3):
        one = moved[:, number] if way == "inputs" else moved[number]
        scale = float(lengths[number] / one.square().sum().sqrt())
        (wanted[:, number] if way == "inputs" else wanted[number]).mul_(scale)
    ones = [1] * len(kernel)
    shape = {"outputs": (3, 1, *ones), "inputs": (1, 3, *ones), "peft": (1, 3, *ones) if kernel else (3,)}[way]
    name = "lora_magnitude_vector" if way == "peft" else "dora_scale"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, name: lengths.reshape(shape)}
    near(result(tensors, weight), wanted)
    near(result(tensors, weight, 0.25), weight + (wanted - weight) / 4)


def test_a_dtype_is_kept_and_computed_in_full():
    weight, down, up = randn(4, 3).half(), randn(2, 3).half(), randn(4, 2).half()
    found = result({"lora_down.weight": down, "lora_up.weight": up}, weight)
    assert found.dtype == torch.float16
    assert torch.equal(found, (weight.float() + up.float() @ down.float()).half())


# ------------------------------------------------------------------------------------------ lycoris-lora


LYCORIS = [
    (kind, kernel, dora, tucker)
    for kind in ("locon", "loha", "lokr", "diag-oft", "boft")
    for kernel in ((), (3, 3))
    for dora in ((False, True) if kind in ("locon", "loha", "lokr") else (False,))
    for tucker in ((False, True) if kernel else (False,))
]


@pytest.mark.parametrize(("kind", "kernel", "decomposed", "tucker"), LYCORIS)
def test_equal_to_lycoris(kind: str, kernel: tuple[int, ...], decomposed: bool, tucker: bool):
    lycoris = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(16, 32, kernel, bias=False) if kernel else torch.nn.Linear(16, 32, bias=False)
    alpha = 4.0 if kind == "loha" else 2.0  # LyCORIS 4.1.3 merges a LoHa with alpha / rank squared, and runs it without
    options = {"use_tucker": tucker, "weight_decompose": decomposed, "constraint": 0.01, "rescaled": True}
    made = {
        "locon": lycoris.locon.LoConModule,
        "loha": lycoris.loha.LohaModule,
        "lokr": lycoris.lokr.LokrModule,
        "diag-oft": lycoris.diag_oft.DiagOFTModule,
        "boft": lycoris.boft.ButterflyOFTModule,
    }[kind]("m", layer, 1.0, lora_dim=4, alpha=alpha, decompose_both=True, factor=4, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tensors = {key: value.detach().clone() for key, value in made.state_dict().items()}
    found = result(tensors, layer.weight.detach())
    torch.testing.assert_close(found, made.get_merged_weight(1.0, layer.weight.shape)[0].detach(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, layer.weight, atol=1e-3)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    [
        KOHYA,
        f"lycoris_{KEY.replace('.', '_')}",
        f"unet.{KEY}",
        f"unet.base_model.model.{KEY}",
        f"base_model.model.{KEY}",
        f"unet.{KEY.replace('attn2.to_k', 'attn2.processor.to_k')}",
        KEY,
    ],
)
def test_names_of_trainers(name: str):
    places = Places("unet", {"unet": [KEY, "conv_in"], "text_encoder": ["text_model.encoder.layers.0.mlp.fc1"]})
    assert places.of(name) == ("unet", KEY)
    assert places.of(name + "_x") is None


@pytest.mark.parametrize("there", ["text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"])
def test_names_of_text_encoders(there: str):
    """With and without the 'text_model.' that newer versions of transformers leave out."""
    encoders = {part: [there] for part in ("text_encoder", "text_encoder_2")}
    places = Places("unet", {"unet": [KEY], **encoders})
    layer = "encoder_layers_0_self_attn_q_proj"
    for first in (f"lora_te_text_model_{layer}", f"lora_te1_text_model_{layer}", f"lora_te_{layer}"):
        assert places.of(first) == ("text_encoder", there)
    dotted = "text_model.encoder.layers.0.self_attn"
    assert places.of(f"text_encoder.{dotted}.q_proj") == ("text_encoder", there)
    assert places.of(f"text_encoder.{dotted}.to_q") == ("text_encoder", there)
    assert places.of(f"lora_te2_text_model_{layer}") == ("text_encoder_2", there)
    assert places.of(f"text_encoder_2.{dotted}.q_proj") == ("text_encoder_2", there)
    assert places.of("lora_te2_text_model_encoder_layers_1_self_attn_q_proj") is None


def test_names_of_a_transformer():
    key = "transformer_blocks.3.attn.to_out.0"
    places = Places(
        "transformer", {"transformer": [key], "text_encoder_2": ["encoder.block.0.layer.0.SelfAttention.q"]}
    )
    flat = key.replace(".", "_")
    for name in (f"transformer.{key}", f"lora_transformer_{flat}", f"base_model.model.{key}", f"lycoris_{flat}"):
        assert places.of(name) == ("transformer", key)
    assert places.of("transformer.transformer_blocks.3.attn.to_out") == ("transformer", key)
    t5 = "encoder_block_0_layer_0_SelfAttention_q"
    assert places.of(f"lora_te3_{t5}") == ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")


def test_names_in_stable_diffusions_own_layout():
    """Those of a checkpoint file, as published and as diffusers reads it: every weight has the same name in both."""
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    unet = UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16,
        **sizes,
    )
    names = lora._ldm_names(unet)
    wanted = {
        "input_blocks.0.0": "conv_in",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.2.0.in_layers.2": "down_blocks.0.resnets.1.conv1",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.skip_connection": None,  # as many channels before as after
        "input_blocks.7.0.skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "input_blocks.4.1.transformer_blocks.1.attn1.to_out.0": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0",
        "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
        "output_blocks.1.1.transformer_blocks.0.attn2.to_k": "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.8.0.emb_layers.1": "up_blocks.2.resnets.2.time_emb_proj",
        "out.2": "conv_out",
    }
    for ldm, diffusers in wanted.items():
        assert names.get(ldm) == diffusers, ldm
    assert sorted(names.values()) == sorted({name for name, _ in lora._modules(unet)})


# ------------------------------------------------------------------------------------------ whole models


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    lora._tell.cache_clear()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    lora.log.addHandler(handler)
    yield messages
    lora.log.removeHandler(handler)


def plain(name: str = KOHYA, rank: int = 2, into: int = 128, out: int = 128) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": randn(rank, into),
        f"{name}.lora_up.weight": randn(out, rank),
        f"{name}.alpha": torch.tensor(1.0),
    }


def merged(tensors: dict[str, Tensor], path: Path, strength: float = 1.0, **metadata: str) -> Any:
    save_file(tensors, path / "one.safetensors", metadata)
    return load(lora=str(path / "one.safetensors"), lora_strength=strength).pipeline


def test_a_lora_for_all_parts_is_merged(tmp_path: Path, told: list[str]):
    """An attention by a DoRA, a convolution of the UNet by a LoHa, its bias, and the text encoder."""
    conv, text = "down_blocks.0.resnets.0.conv1", "text_model_encoder_layers_0_mlp_fc1"
    kohya = "lora_unet_" + conv.replace(".", "_")
    a, b = [randn(64, 2), randn(64, 2)], [randn(2, 64 * 9), randn(2, 64 * 9)]
    tensors = plain() | plain(f"lora_te_{text}", out=512) | {f"{KOHYA}.dora_scale": torch.full((1, 128), 2.0)}
    tensors |= {f"{kohya}.hada_w{n}_a": a[n - 1] for n in (1, 2)} | {f"{kohya}.hada_w{n}_b": b[n - 1] for n in (1, 2)}
    tensors |= {f"{kohya}.diff_b": randn(64)}
    base, made = load().pipeline, merged(tensors, tmp_path)
    assert told == []
    old, new = base.unet.state_dict(), made.unet.state_dict()
    assert sorted(old) == sorted(new)
    moved = old[f"{KEY}.weight"] + tensors[f"{KOHYA}.lora_up.weight"] @ tensors[f"{KOHYA}.lora_down.weight"] / 2
    near(new[f"{KEY}.weight"], moved / moved.norm(dim=0, keepdim=True) * 2)
    near(new[f"{conv}.weight"], old[f"{conv}.weight"] + ((a[0] @ b[0]) * (a[1] @ b[1])).reshape(64, 64, 3, 3))
    near(new[f"{conv}.bias"], old[f"{conv}.bias"] + tensors[f"{kohya}.diff_b"])
    changed_ones = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed_ones == {f"{KEY}.weight", f"{conv}.weight", f"{conv}.bias"}
    old, new = base.text_encoder.state_dict(), made.text_encoder.state_dict()
    (key,) = [key for key in old if not torch.equal(old[key], new[key])]
    assert key.endswith("encoder.layers.0.mlp.fc1.weight")
    of_text = [tensors[f"lora_te_{text}.lora_{x}.weight"] for x in ("up", "down")]
    near(new[key], old[key] + of_text[0] @ of_text[1] / 2)


def test_keys_that_fit_nothing_are_told_once(tmp_path: Path, told: list[str]):
    strange = plain("lora_unet_not_there") | {"other": torch.zeros(1)}
    tensors = plain() | plain(KOHYA.replace("to_k", "to_v")) | strange
    merged(tensors, tmp_path)
    merged(tensors, tmp_path, 0.5)
    assert len(told) == 1
    assert "one.safetensors: 6 of 10 keys used, not the others, such as lora_unet_not_there" in told[0]


def test_a_lora_of_another_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"does not fit bundled model \(3 of 9 keys used"):
        merged(plain() | plain("lora_unet_a") | plain("lora_unet_b"), tmp_path)
    with pytest.raises(ModelError, match="holds nothing for bundled model"):  # of the right name, but larger
        merged(plain(into=768, out=320), tmp_path)
    with pytest.raises(ModelError, match=r"cannot be merged .* NaN or infinity in lora_unet"):
        merged({**plain(), f"{KOHYA}.lora_up.weight": torch.full((128, 2), float("nan"))}, tmp_path)


def test_a_product_that_would_not_fit_memory_is_not_computed(tmp_path: Path):
    """Two tensors of a megabyte whose product would take four terabytes."""
    big = torch.zeros(1_000_000, 1)
    with pytest.raises(ModelError, match="holds nothing"):
        merged({f"{KOHYA}.lokr_w1": big, f"{KOHYA}.lokr_w2": big.T.clone()}, tmp_path)


def test_alphas_that_diffusers_notes_for_a_whole_file(tmp_path: Path):
    down, up = randn(4, 128), randn(128, 4)
    noted = json.dumps({"unet.lora_alpha": 8, "unet.r": 4})
    tensors = {f"unet.{KEY}.lora_A.weight": down, f"unet.{KEY}.lora_B.weight": up}
    made = merged(tensors, tmp_path, lora_adapter_metadata=noted)
    old = load().pipeline.unet.state_dict()[f"{KEY}.weight"]
    near(made.unet.state_dict()[f"{KEY}.weight"], old + 2 * up @ down)


def test_a_lora_that_kohya_trained_for_flux():
    """Its three projections in one tensor, parted by diffusers' own converter."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    axes = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4), "in_channels": 4}
    transformer = FluxTransformer2DModel(patch_size=1, **sizes, **axes)
    pipeline = FluxPipeline(None, None, None, None, None, None, transformer)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = plain(name, into=16, out=48)
    contents, places = lora.placed(pipeline, "transformer", [], modules_of(tensors))
    found = {}
    for module in contents.modules:
        weight = places[module.name].weight.detach()
        found[module.name.removeprefix("transformer.")] = changed(weight, module) - weight
    whole = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / 2
    attention = "transformer_blocks.0.attn.to_"
    assert sorted(found) == [f"{attention}{x}" for x in "kqv"]
    near(torch.cat([found[f"{attention}{x}"] for x in "qkv"]), whole)


# ------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "keys",
    [
        ["a.lora_down.weight"],
        ["unet.a.lora_A.weight"],
        ["a.hada_w1_a"],
        ["a.lokr_w2"],
        ["a.oft_blocks"],
        ["a.diff"],
        ["a.diff_b"],
        ["a.weight", "a.on_input"],
    ],
)
def test_every_kind_is_seen_to_be_a_lora(keys: list[str], tmp_path: Path):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "a.safetensors")
    assert holds_lora(tmp_path / "a.safetensors")


def test_what_is_no_lora(tmp_path: Path):
    save_file(
        {"model.diffusion_model.out.2.weight": torch.zeros(1), "a.alpha": torch.zeros(1)}, tmp_path / "a.safetensors"
    )
    (tmp_path / "b.safetensors").write_bytes(b"\0" * 20)
    assert not holds_lora(tmp_path / "a.safetensors")
    assert not holds_lora(tmp_path / "b.safetensors")
    assert not holds_lora(tmp_path / "gone.safetensors")
    with pytest.raises(Unreadable, match="broken"):
        read(tmp_path / "b.safetensors")


def test_parts_that_are_not_whole_are_unknown():
    contents = modules_of(
        {"m.lora_up.weight": torch.zeros(1, 1), "n.hada_w1_a": torch.zeros(1, 1), "o.x": torch.zeros(1)}
    )
    assert contents.modules == ()
    assert sorted(contents.unknown) == ["m.lora_up.weight", "n.hada_w1_a", "o.x"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.lora_down.weight": torch.zeros(0, 3), "a.lora_up.weight": torch.zeros(4, 0), "a.alpha": torch.tensor(1.0)},
        {"a.lora_down.weight": torch.tensor(1.0), "a.lora_up.weight": torch.zeros(4, 1)},
        {"a.lokr_w1": torch.tensor(1.0), "a.lokr_w2": torch.tensor(1.0)},
        {"a.weight": torch.ones(4), "a.on_input": torch.zeros(0)},
        {"a.weight": torch.ones(4), "a.on_input": torch.ones(1)},
    ],
    ids=["rank 0", "no dimensions", "products of no dimensions", "no side", "another side"],
)
def test_parts_of_no_size_or_another_fit_nothing(tensors: dict[str, Tensor]):
    (module,) = modules_of(tensors).modules
    assert not fits(torch.ones(4, 3), module)


def test_two_numbers_in_one_byte_are_told(tmp_path: Path):
    header = json.dumps({"a.diff": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(Unreadable):
        read(tmp_path / "x.safetensors")
