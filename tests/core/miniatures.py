"""Stable Diffusion in miniature: the real formats with random weights, made from a seed.

Folders are laid out as on the hub (tokenizers as vocabulary and merges, schedulers as published);
:func:`write_single_file` renames a folder's tensors as the original checkpoints name them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WORDS = (
    "a",
    "the",
    "of",
    "red",
    "green",
    "fox",
    "river",
    "lighthouse",
    "painting",
    "under",
    "old",
    "oak",
    "at",
    "dawn",
)
SIDE = 8  # of the latents
SD2_WIDTH = 40  # of the text encoder, told from 1.x by it
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "steps_offset": 1,
}
_PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
_DDIM = {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
    "prediction_type": "epsilon",
}


def write_sd1(folder: Path, seed: int = 0) -> Path:
    """Epsilon-prediction, one text encoder, projections by convolution; returns ``folder``."""
    torch.manual_seed(seed)
    vocabulary = _write_tokenizer(folder / "tokenizer", WORDS)
    _unet(cross_attention_dim=32, attention_head_dim=4).save_pretrained(folder / "unet")
    _vae(0.18215).save_pretrained(folder / "vae")
    _save_text_encoder(folder / "text_encoder", vocabulary, 32, "quick_gelu")
    _write(folder / "scheduler" / "scheduler_config.json", _PNDM | _SCHEDULE)
    _write_index(folder, "StableDiffusionPipeline", "PNDMScheduler", ["unet", "vae", "text_encoder", "tokenizer"])
    return folder


def write_sd2(folder: Path, seed: int = 1) -> Path:
    """v-prediction, linear projections, tokens padded with '!'; returns ``folder``."""
    torch.manual_seed(seed)
    vocabulary = _write_tokenizer(folder / "tokenizer", WORDS, pad="!")
    _unet(cross_attention_dim=SD2_WIDTH, attention_head_dim=(2, 4, 4), use_linear_projection=True).save_pretrained(
        folder / "unet"
    )
    _vae(0.18215).save_pretrained(folder / "vae")
    _save_text_encoder(folder / "text_encoder", vocabulary, SD2_WIDTH, "gelu")
    _write(folder / "scheduler" / "scheduler_config.json", _DDIM | _SCHEDULE | {"prediction_type": "v_prediction"})
    _write_index(folder, "StableDiffusionPipeline", "DDIMScheduler", ["unet", "vae", "text_encoder", "tokenizer"])
    return folder


def write_sdxl(folder: Path, seed: int = 2) -> Path:
    """Two text encoders of different width; the second tokenizer knows no merges and pads with '!'."""
    torch.manual_seed(seed)
    vocabulary = _write_tokenizer(folder / "tokenizer", WORDS)
    letters = _write_tokenizer(folder / "tokenizer_2", [], pad="!")
    unet = _unet(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=32 + 40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    unet.save_pretrained(folder / "unet")
    _vae(0.13025, force_upcast=True).save_pretrained(folder / "vae")
    _save_text_encoder(folder / "text_encoder", vocabulary, 32, "quick_gelu")
    _save_text_encoder(folder / "text_encoder_2", letters, 40, "gelu", projection=24)
    _write(folder / "scheduler" / "scheduler_config.json", _EULER | _SCHEDULE)
    parts = ["unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    _write_index(folder, "StableDiffusionXLPipeline", "EulerDiscreteScheduler", parts)
    return folder


# ---------------------------------------------------------------------------------------------- parts


def _unet(**options: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    shape = {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(sample_size=SIDE, layers_per_block=1, **(shape | options))
    with torch.no_grad():  # the text must move the prediction of a random network too
        for name, parameter in unet.named_parameters():
            if re.search(r"attn2\.to_(q|k|v|out\.0)\.weight|proj_out\.weight", name):
                parameter *= 3
    return unet


def _vae(scaling_factor: float, **options: Any) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=2 * SIDE,
        scaling_factor=scaling_factor,
        **options,
    )


def _save_text_encoder(folder: Path, vocabulary: int, width: int, act: str, projection: int | None = None) -> None:
    """With the token numbers of the published configurations, wrong as they are, and their names of the tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    encoder = (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)
    with torch.no_grad():  # far enough apart for attention to tell tokens from each other
        for name, parameter in encoder.named_parameters():
            if "embedding" in name or name.endswith(("q_proj.weight", "k_proj.weight", "text_projection.weight")):
                parameter *= 20
    encoder.save_pretrained(folder)
    name_as_published(folder / "model.safetensors")


def name_as_published(weights: Path) -> None:
    """Give a saved CLIP text encoder's tensors the names that published files have; newer libraries leave a part out."""
    renamed = {
        k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v
        for k, v in load_file(weights).items()
    }
    save_file(renamed, weights, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, words: Iterable[str], pad: str = "<|endoftext|>") -> int:
    """CLIP's byte-level tokenizer with the merges that make ``words`` one token each; returns the vocabulary's size."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces[:2] = ["".join(pieces[:2])]
    tokens = characters + [f"{c}</w>" for c in characters] + list(dict.fromkeys("".join(m) for m in merges))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    _write(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    _write(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write(folder / "tokenizer_config.json", special | config | {"errors": "replace", "add_prefix_space": False})
    return len(tokens)


def _write_index(folder: Path, pipeline: str, scheduler: str, parts: Iterable[str]) -> None:
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    index = {"_class_name": pipeline, "_diffusers_version": "0.6.0", "scheduler": ["diffusers", scheduler]}
    if pipeline == "StableDiffusionPipeline":
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = [None, None]
    else:
        index["force_zeros_for_empty_prompt"] = True
    _write(folder / "model_index.json", index | {part: classes[part] for part in parts})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# ---------------------------------------------------------------------------------------- single file


def original_names(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder under the names, and in the shapes, of the original checkpoints of its family."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    state = {f"model.diffusion_model.{_unet_name(k, unet)}": v for k, v in unet.items()}
    for key, value in vae.items():
        name = _vae_name(key, levels)
        # The original autoencoder projects by 1x1 convolutions where diffusers has linear layers.
        is_projection = ".attn_1." in name and name.endswith("weight") and value.ndim == 2
        state[f"first_stage_model.{name}"] = value[:, :, None, None] if is_projection else value
    second = folder / "text_encoder_2" / "model.safetensors"
    if second.is_file():
        state |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in text.items()}
        state |= _open_clip(load_file(second), "conditioner.embedders.1.model.")
    elif json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_act"] == "gelu":
        width = text["text_model.final_layer_norm.weight"].shape[0]
        text["text_projection.weight"] = torch.eye(width)  # there, but used by no one
        state |= _open_clip(text, "cond_stage_model.model.")
    else:
        state |= {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.linspace(0.85**0.5, 0.5, 1000)  # the trainer's tables lie beside the weights
    return {k: v.contiguous() for k, v in state.items()}


def write_single_file(folder: Path, path: Path) -> Path:
    """A folder as one .safetensors, or as one .ckpt of a state_dict with training counters; returns ``path``."""
    state = original_names(folder)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 840000, "epoch": 0}, path)
    return path


def _unet_name(key: str, keys: Iterable[str]) -> str:
    """down_blocks.0.resnets.0.conv1 -> input_blocks.1.0.in_layers.2 and so on, one resnet a block (two going up)."""
    start = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for old, new in start.items():
        if key.startswith(old):
            return key.replace(old, new, 1)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{_resnet_name(match[3])}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert match is not None, key
    block, kind, number, rest = int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{2 * block + 2}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # behind the attention, in the blocks that have one
        place = 2 if any(k.startswith(f"up_blocks.{block}.attentions") for k in keys) else 1
        return f"output_blocks.{2 * block + 1}.{place}.{rest}"
    side, number = ("input", number + 1) if match[1] == "down" else ("output", number)
    return f"{side}_blocks.{2 * block + number}.{int(kind == 'attentions')}.{_resnet_name(rest)}"


def _open_clip(text: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """CLIP as OpenCLIP names it: query, key and value in one matrix, the projection on the other side."""
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.": "",
        "text_model.final_layer_norm": "ln_final",
        "text_model.encoder.layers.": "transformer.resblocks.",
        ".layer_norm": ".ln_",
        ".mlp.fc1": ".mlp.c_fc",
        ".mlp.fc2": ".mlp.c_proj",
        ".self_attn.": ".attn.",
    }
    state = {}
    for key, value in text.items():
        if key == "text_projection.weight":
            state[f"{prefix}text_projection"] = value.T
            continue
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            value = torch.cat([text[key.replace("q_proj", f"{which}_proj")] for which in "qkv"])
            key = key.replace("q_proj.", "in_proj_")
        for old, new in names.items():
            key = key.replace(old, new)
        state[prefix + key] = value
    return state


def _resnet_name(rest: str) -> str:
    names = {
        "norm1.": "in_layers.0.",
        "conv1.": "in_layers.2.",
        "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.",
        "conv2.": "out_layers.3.",
        "conv_shortcut.": "skip_connection.",
    }
    for old, new in names.items():
        if rest.startswith(old):
            return rest.replace(old, new, 1)
    return rest  # a transformer's names are the same on both sides


def _vae_name(key: str, levels: int) -> str:
    """decoder.up_blocks.0.resnets.1.conv1 -> decoder.up.1.block.1.conv1 and so on; going up, levels count down."""
    key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
    renames = [
        (r"down_blocks\.", "down."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"\.resnets\.", ".block."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm\.", "norm."),
        (r"to_(q|k|v)\.", r"\1."),
        (r"to_out\.0\.", "proj_out."),
    ]
    for old, new in renames:
        key = re.sub(old, new, key)
    return key
