"""Miniature checkpoints which a host's stock loaders take for Stable Diffusion, with random weights made from a seed.

The UNet keeps what the loaders look at (320 channels, 768 wide conditionings, convolutional projections) and
leaves out all levels but one. CLIP-L cannot be made smaller, so its layers and token embeddings share storage.
A hand-made path through the UNet carries its input to its output, as in a trained one, so that latents stay in
range; the random rest depends on the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from block_vae import SCALE, block_vae
from safetensors.torch import save_file
from torch import Tensor, nn

SD15 = "mini-sd15.ckpt"
SD15_EVERYWHERE = "mini-sd15-everywhere.ckpt"
SDXL_EVERYWHERE = "mini-sdxl-everywhere.ckpt"
SD3 = "mini-sd3.ckpt"
UNET_FP16 = "mini-sd15-fp16.safetensors"
UNET_FP8 = "mini-sd15-fp8.safetensors"
UNET_SCALED_FP8 = "mini-sd15-scaled-fp8.safetensors"
LORA = "mini-lora.safetensors"

_CHANNELS, _CONTEXT, _TIME = 320, 768, 1280  # fixed by the format
_G_WIDTH, _G_LAYERS = 1280, 32  # of SDXL's second text encoder
_XL_CONTEXT, _XL_VECTOR = _CONTEXT + _G_WIDTH, _G_WIDTH + 6 * 256
_XL_DEPTHS = (0, 2, 5)  # transformer blocks of each level: those of KOALA, the smallest of SDXL's kind
_VOCABULARY, _TOKENS = 49408, 77
_GROUP = _CHANNELS // 32  # channels a group of the norms
_SD3_WIDTH, _SD3_PATCHES = 64, 64  # one block; images of up to 1024 pixels a side
_FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def write_all(models: Path, seed: int = 0) -> Path:
    """All files, below the host's ``models`` folder; returns it."""
    checkpoints, unets, loras = (models / name for name in ("checkpoints", "diffusion_models", "loras"))
    for folder in (checkpoints, unets, loras):
        folder.mkdir(parents=True, exist_ok=True)
    unet = sd15_unet(seed)
    write_checkpoint(checkpoints / SD15, unet, text_encoder(seed), taesd(seed + 2, 4, 0.18215, 0.0))
    save_file({name: tensor.half() for name, tensor in unet.items()}, unets / UNET_FP16)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in unet.items()}, unets / UNET_FP8)
    save_file(scaled_fp8(unet), unets / UNET_SCALED_FP8)
    save_file(lora(seed + 3), loras / LORA)
    encoder = clip_l(seed + 5, "text_encoders.clip_l.")
    write_checkpoint(checkpoints / SD3, sd3_transformer(seed + 4), encoder, taesd(seed + 6, 16, 1.5305, 0.0609))
    return models


def write_checkpoint(
    path: Path, denoiser: dict[str, Tensor], encoder: dict[str, Tensor], vae: dict[str, Tensor]
) -> None:
    """One file as published: torch-saved, which keeps shared storage shared, all below 'state_dict'.

    In the format before the zip files: a host that inspects a file for malicious code knows no newer parts of those.
    """
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in denoiser.items()} | encoder
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)


def write_sd15_everywhere(path: Path, unet: dict[str, Tensor] | None = None, seed: int = 0) -> Path:
    """A checkpoint that ComfyUI, A1111 and Forge all load, with the configuration next to it that A1111 needs.

    Without a ``unet`` the miniature's. A1111 and Forge build the full autoencoder and a middle block whatever is in
    the file, A1111 a transformer at every place of a level that has any: these are there and do nothing. Returns
    ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    denoiser = (unet if unet is not None else sd15_unet(seed)) | _idle_blocks()
    write_checkpoint(path, denoiser, text_encoder(seed), block_vae())
    # a file in JSON is one in YAML
    path.with_suffix(".yaml").write_text(json.dumps(_A1111_MODEL, indent=1), encoding="utf-8")
    return path


def write_sdxl_everywhere(path: Path, seed: int = 0) -> Path:
    """The same for SDXL: a UNet of KOALA's shape with all levels as narrow as the first, and both text encoders.

    In float16; a host that computes in full precision takes 3 GB of memory for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoders = clip_l(seed + 1, "conditioner.embedders.0.") | clip_g(seed + 2, "conditioner.embedders.1.model.")
    unet = {name: tensor.half() for name, tensor in sdxl_unet(seed).items()}
    write_checkpoint(path, unet | _idle_middle_block_of_sdxl(), encoders, block_vae())
    path.with_suffix(".yaml").write_text(json.dumps(_A1111_SDXL, indent=1), encoding="utf-8")
    return path


def text_encoder(seed: int = 0) -> dict[str, Tensor]:
    """That of every SD1.5 miniature of this seed."""
    return clip_l(seed + 1, "cond_stage_model.")


def sd15_unet(seed: int) -> dict[str, Tensor]:
    """Epsilon-prediction, 13.6 M parameters: one level of one residual block and one transformer, no middle."""
    w = _Weights(seed)
    w.linear("time_embed.0", _TIME, _CHANNELS)
    w.linear("time_embed.2", _TIME, _TIME)
    w.conv("input_blocks.0.0", _CHANNELS, 4, 3)
    _residual_block(w, "input_blocks.1.0.", _CHANNELS)
    _transformer(w, "input_blocks.1.1.")
    _residual_block(w, "output_blocks.0.0.", 2 * _CHANNELS)
    _residual_block(w, "output_blocks.1.0.", 2 * _CHANNELS)
    w.norm("out.0", _CHANNELS)
    w.conv("out.2", 4, _CHANNELS, 3, gain=0.07)
    _carry_the_input(w.tensors)
    return w.tensors


def sdxl_unet(seed: int) -> dict[str, Tensor]:
    """Epsilon prediction: 320 channels at three levels, conditionings of 2048, a vector of 2816."""
    w = _Weights(seed)
    for name, inputs in (("time_embed", _CHANNELS), ("label_emb.0", _XL_VECTOR)):
        w.linear(f"{name}.0", _TIME, inputs)
        w.linear(f"{name}.2", _TIME, _TIME)
    w.conv("input_blocks.0.0", _CHANNELS, 4, 3)
    for level, depth in enumerate(_XL_DEPTHS):
        _level(w, f"input_blocks.{2 * level + 1}.", _CHANNELS, depth)
        if level < 2:
            w.conv(f"input_blocks.{2 * level + 2}.0.op", _CHANNELS, _CHANNELS, 3)
    for number in range(6):
        depth = _XL_DEPTHS[2 - number // 2]
        _level(w, f"output_blocks.{number}.", 2 * _CHANNELS, depth)
        if number in (1, 3):
            w.conv(f"output_blocks.{number}.{2 if depth else 1}.conv", _CHANNELS, _CHANNELS, 3)
    w.norm("out.0", _CHANNELS)
    w.conv("out.2", 4, _CHANNELS, 3, gain=0.07)
    _carry_the_input(w.tensors, last="output_blocks.5.0")
    return w.tensors


def clip_g(seed: int, prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's bigG, fp16, in its own names: all layers on the storage of one, token embeddings that overlap."""
    w = _Weights(seed)
    w.norm("ln_1", _G_WIDTH)
    w.norm("ln_2", _G_WIDTH)
    w.linear("attn.in_proj", 3 * _G_WIDTH, _G_WIDTH)
    w.linear("attn.out_proj", _G_WIDTH, _G_WIDTH, gain=0.5)
    w.linear("mlp.c_fc", 4 * _G_WIDTH, _G_WIDTH)
    w.linear("mlp.c_proj", _G_WIDTH, 4 * _G_WIDTH, gain=0.3)
    layer = {name.replace("in_proj.", "in_proj_"): tensor.half() for name, tensor in w.tensors.items()}
    tokens = w.randn((_VOCABULARY - 1) * 16 + _G_WIDTH).half().as_strided((_VOCABULARY, _G_WIDTH), (16, 1))
    tensors = {
        "token_embedding.weight": tokens,
        "positional_embedding": (0.2 * w.randn(_TOKENS, _G_WIDTH)).half(),
        "ln_final.weight": torch.ones(_G_WIDTH).half(),
        "ln_final.bias": (0.1 + 0.1 * w.randn(_G_WIDTH)).half(),
        "text_projection": (w.randn(_G_WIDTH, _G_WIDTH) / _G_WIDTH**0.5).half(),
        "logit_scale": torch.tensor(4.6).half(),
    }
    tensors |= {f"transformer.resblocks.{i}.{n}": t for i in range(_G_LAYERS) for n, t in layer.items()}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def sd3_transformer(seed: int) -> dict[str, Tensor]:
    """Flow prediction: the MMDiT of SD3 with one block, hence 64 wide."""
    width = _SD3_WIDTH
    w = _Weights(seed)
    w.conv("x_embedder.proj", width, 16, 2)
    w.tensors["pos_embed"] = 0.5 * w.randn(1, _SD3_PATCHES**2, width)
    for name, inputs in (("t_embedder", 256), ("y_embedder", 2048)):
        w.linear(f"{name}.mlp.0", width, inputs)
        w.linear(f"{name}.mlp.2", width, width)
    w.linear("context_embedder", width, 4096, gain=2.0)
    w.linear("joint_blocks.0.context_block.attn.qkv", 3 * width, width)
    w.linear("joint_blocks.0.context_block.adaLN_modulation.1", 2 * width, width)
    w.linear("joint_blocks.0.x_block.attn.qkv", 3 * width, width)
    w.linear("joint_blocks.0.x_block.attn.proj", width, width, gain=2.0)
    w.linear("joint_blocks.0.x_block.mlp.fc1", 4 * width, width)
    w.linear("joint_blocks.0.x_block.mlp.fc2", width, 4 * width)
    w.linear("joint_blocks.0.x_block.adaLN_modulation.1", 6 * width, width)
    w.linear("final_layer.linear", 2 * 2 * 16, width)
    w.linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return w.tensors


def clip_l(seed: int, prefix: str) -> dict[str, Tensor]:
    """The text encoder, fp16: twelve layers on the storage of one, token embeddings that overlap in memory."""
    w = _Weights(seed)
    w.norm("layer_norm1", _CONTEXT)
    w.norm("layer_norm2", _CONTEXT)
    for name, gain in (("q_proj", 1.5), ("k_proj", 1.5), ("v_proj", 1.0), ("out_proj", 0.7)):
        w.linear(f"self_attn.{name}", _CONTEXT, _CONTEXT, gain)
    w.linear("mlp.fc1", 4 * _CONTEXT, _CONTEXT)
    w.linear("mlp.fc2", _CONTEXT, 4 * _CONTEXT, gain=0.5)
    layer = {name: tensor.half() for name, tensor in w.tensors.items()}
    stride = 16
    tokens = w.randn((_VOCABULARY - 1) * stride + _CONTEXT).half().as_strided((_VOCABULARY, _CONTEXT), (stride, 1))
    tensors = {
        "embeddings.token_embedding.weight": tokens,
        "embeddings.position_embedding.weight": (0.2 * w.randn(_TOKENS, _CONTEXT)).half(),
        "final_layer_norm.weight": torch.ones(_CONTEXT).half(),
        # of a mean that is not zero: hosts that restore the mean after weighting divide by it
        "final_layer_norm.bias": (0.1 + 0.1 * w.randn(_CONTEXT)).half(),
    }
    tensors |= {f"encoder.layers.{i}.{name}": tensor for i in range(12) for name, tensor in layer.items()}
    return {f"{prefix}transformer.text_model.{name}": tensor for name, tensor in tensors.items()}


def taesd(seed: int, channels: int, scale: float, shift: float) -> dict[str, Tensor]:
    """A tiny autoencoder for latents of so many channels; they are in range after ``(x - shift) * scale``."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        encoder, decoder = _encoder(channels), _decoder(channels)
        for module in (*encoder.modules(), *decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        _fit_the_output(encoder, torch.rand(1, 3, 128, 128), mean=0.0, std=1.0)
        _fit_the_output(decoder, torch.randn(1, channels, 16, 16), mean=0.5, std=0.15)
    tensors = {f"taesd_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {f"taesd_decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    return tensors | {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}


def lora(seed: int, rank: int = 4, strength: float = 1.0) -> dict[str, Tensor]:
    """For the SD1.5 UNet's cross-attention and the text encoder's first layer, named as kohya's trainer does."""
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    text = "lora_te_text_model_encoder_layers_0_self_attn_"
    sizes = {f"{unet}q": _CHANNELS, f"{unet}k": _CONTEXT, f"{unet}v": _CONTEXT}
    shapes = {name: (_CHANNELS, inputs) for name, inputs in sizes.items()}
    shapes |= {f"{text}{name}": (_CONTEXT, _CONTEXT) for name in ("q_proj", "v_proj")}
    w = _Weights(seed)
    for name, (outputs, inputs) in shapes.items():
        w.tensors[f"{name}.lora_down.weight"] = w.randn(rank, inputs) / inputs**0.5
        w.tensors[f"{name}.lora_up.weight"] = strength * w.randn(outputs, rank) / rank**0.5
        w.tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    return w.tensors


def scaled_fp8(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """Linear weights as fp8 with a scale each, the way ComfyUI's scaled fp8 files have them; the rest fp16."""
    tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}  # two elements: multiplied in full precision
    for name, tensor in unet.items():
        if tensor.dim() == 2:
            scale = tensor.abs().max() / _FP8_LARGEST
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            tensors[name] = tensor.half()
    return tensors


# ---------------------------------------------------------------------------------------------- parts

_AUTOENCODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
_A1111_MODEL = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "timesteps": 1000,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "conditioning_key": "crossattn",
            "image_size": 64,
            "channels": 4,
            "scale_factor": SCALE,
            "use_ema": False,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 32,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": _CHANNELS,
                    "attention_resolutions": [1],
                    "num_res_blocks": 1,
                    "channel_mult": [1],
                    "num_heads": 8,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": _CONTEXT,
                    "use_checkpoint": False,
                    "legacy": False,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": _AUTOENCODER,
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}


_XL_SIZE = {"target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND", "params": {"outdim": 256}}
_A1111_SDXL = {
    "model": {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 0.13025,
            "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": 1000,
                    "weighting_config": {"target": "sgm.modules.diffusionmodules.denoiser_weighting.EpsWeighting"},
                    "scaling_config": {"target": "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling"},
                    "discretization_config": {
                        "target": "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"
                    },
                },
            },
            "network_config": {
                "target": "sgm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "adm_in_channels": _XL_VECTOR,
                    "num_classes": "sequential",
                    "use_checkpoint": False,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": _CHANNELS,
                    "attention_resolutions": [4, 2],
                    "num_res_blocks": 1,
                    "channel_mult": [1, 1, 1],
                    "num_head_channels": 64,
                    "use_spatial_transformer": True,
                    "use_linear_in_transformer": True,
                    "transformer_depth": list(_XL_DEPTHS),
                    "transformer_depth_middle": 1,
                    "context_dim": _XL_CONTEXT,
                    "spatial_transformer_attn_type": "softmax",
                    "legacy": False,
                },
            },
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {
                    "emb_models": [
                        {
                            "is_trainable": False,
                            "input_key": "txt",
                            "target": "sgm.modules.encoders.modules.FrozenCLIPEmbedder",
                            "params": {"layer": "hidden", "layer_idx": 11},
                        },
                        {
                            "is_trainable": False,
                            "input_key": "txt",
                            "target": "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder2",
                            "params": {
                                "arch": "ViT-bigG-14",
                                "version": "laion2b_s39b_b160k",
                                "freeze": True,
                                "layer": "penultimate",
                                "always_return_pooled": True,
                                "legacy": False,
                            },
                        },
                        *(
                            {"is_trainable": False, "input_key": key, **_XL_SIZE}
                            for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
                        ),
                    ]
                },
            },
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
                "params": {
                    "embed_dim": 4,
                    "monitor": "val/rec_loss",
                    "ddconfig": {"attn_type": "vanilla", **_AUTOENCODER},
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
        },
    }
}


def _idle_blocks() -> dict[str, Tensor]:
    """A middle block, and transformers on the way up, that add zero; they take hardly any room in the file.

    Whole, as a host fills with random numbers what it builds and does not find.
    """
    w = _Weights(0)
    for prefix in ("middle_block.0.", "middle_block.2."):
        _residual_block(w, prefix, _CHANNELS)
    for prefix in ("middle_block.1.", "output_blocks.0.1.", "output_blocks.1.1."):
        _transformer(w, prefix)
    return _zeros_like(w)


def _idle_middle_block_of_sdxl() -> dict[str, Tensor]:
    w = _Weights(0)
    for prefix in ("middle_block.0.", "middle_block.2."):
        _residual_block(w, prefix, _CHANNELS)
    _linear_transformer(w, "middle_block.1.", 1)
    return _zeros_like(w)


def _zeros_like(w: _Weights) -> dict[str, Tensor]:
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in w.tensors.items()}


class _Weights:
    """Tensors by name, drawn one after the other; a gain of 1 keeps the variance of what goes through."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def linear(self, name: str, outputs: int, inputs: int, gain: float = 1.0, bias: bool = True) -> None:
        self._add(name, (outputs, inputs), gain, bias)

    def conv(self, name: str, outputs: int, inputs: int, size: int, gain: float = 1.0) -> None:
        self._add(name, (outputs, inputs, size, size), gain, bias=True)

    def norm(self, name: str, channels: int) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(channels)
        self.tensors[f"{name}.bias"] = torch.zeros(channels)

    def _add(self, name: str, shape: tuple[int, ...], gain: float, bias: bool) -> None:
        fan_in = torch.Size(shape[1:]).numel()
        self.tensors[f"{name}.weight"] = self.randn(*shape).mul_(gain / fan_in**0.5)
        if bias:
            self.tensors[f"{name}.bias"] = 0.02 * self.randn(shape[0])


def _residual_block(w: _Weights, prefix: str, inputs: int) -> None:
    w.norm(f"{prefix}in_layers.0", inputs)
    w.conv(f"{prefix}in_layers.2", _CHANNELS, inputs, 3)
    w.linear(f"{prefix}emb_layers.1", _CHANNELS, _TIME)
    w.norm(f"{prefix}out_layers.0", _CHANNELS)
    w.conv(f"{prefix}out_layers.3", _CHANNELS, _CHANNELS, 3)
    if inputs != _CHANNELS:
        w.conv(f"{prefix}skip_connection", _CHANNELS, inputs, 1)


def _transformer(w: _Weights, prefix: str) -> None:
    w.norm(f"{prefix}norm", _CHANNELS)
    w.conv(f"{prefix}proj_in", _CHANNELS, _CHANNELS, 1)
    _transformer_block(w, f"{prefix}transformer_blocks.0.", _CONTEXT)
    w.conv(f"{prefix}proj_out", _CHANNELS, _CHANNELS, 1)


def _linear_transformer(w: _Weights, prefix: str, depth: int) -> None:
    w.norm(f"{prefix}norm", _CHANNELS)
    w.linear(f"{prefix}proj_in", _CHANNELS, _CHANNELS)
    for number in range(depth):
        _transformer_block(w, f"{prefix}transformer_blocks.{number}.", _XL_CONTEXT)
    w.linear(f"{prefix}proj_out", _CHANNELS, _CHANNELS)


def _transformer_block(w: _Weights, block: str, context: int) -> None:
    for attention, inputs, gain in (("attn1", _CHANNELS, 1.0), ("attn2", context, 2.0)):
        w.linear(f"{block}{attention}.to_q", _CHANNELS, _CHANNELS, gain, bias=False)
        w.linear(f"{block}{attention}.to_k", _CHANNELS, inputs, gain, bias=False)
        w.linear(f"{block}{attention}.to_v", _CHANNELS, inputs, gain, bias=False)
        w.linear(f"{block}{attention}.to_out.0", _CHANNELS, _CHANNELS, gain)
    w.linear(f"{block}ff.net.0.proj", 8 * _CHANNELS, _CHANNELS)
    w.linear(f"{block}ff.net.2", _CHANNELS, 4 * _CHANNELS)
    for i in (1, 2, 3):
        w.norm(f"{block}norm{i}", _CHANNELS)


def _level(w: _Weights, prefix: str, inputs: int, depth: int) -> None:
    """A residual block of SDXL's, and so many transformer blocks."""
    _residual_block(w, f"{prefix}0.", inputs)
    if depth:
        _linear_transformer(w, f"{prefix}1.", depth)


def _carry_the_input(unet: dict[str, Tensor], share: float = 0.9, last: str = "output_blocks.1.0") -> None:
    """Let the first group of channels hold x and -x from end to end: silu(x) - silu(-x) is x again."""
    first = slice(0, _GROUP)
    for name in ("input_blocks.0.0", f"{last}.out_layers.3", f"{last}.skip_connection"):
        unet[f"{name}.weight"][first] = 0.0
        unet[f"{name}.bias"][first] = 0.0
    unet["out.2.weight"][:, first] = 0.0
    for i in range(_GROUP):
        unet[f"{last}.skip_connection.weight"][i, _CHANNELS + i] = 1.0
    normed = (_GROUP / 8) ** 0.5  # what the last norm makes of x: two of the group's ten channels are empty
    for c in range(4):
        for channel, sign in ((c, 1.0), (4 + c, -1.0)):
            unet["input_blocks.0.0.weight"][channel, c, 1, 1] = sign
            unet["out.2.weight"][c, channel, 1, 1] = sign * share / normed


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _encoder(channels: int) -> nn.Sequential:
    def halve() -> list[nn.Module]:
        return [_conv(64, 64, stride=2, bias=False), _Block(), _Block(), _Block()]

    return nn.Sequential(_conv(3, 64), _Block(), *halve(), *halve(), *halve(), _conv(64, channels))


def _decoder(channels: int) -> nn.Sequential:
    def double() -> list[nn.Module]:
        return [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _conv(64, 64, bias=False)]

    return nn.Sequential(
        _Clamp(), _conv(channels, 64), nn.ReLU(), *double(), *double(), *double(), _Block(), _conv(64, 3)
    )


def _fit_the_output(network: nn.Sequential, x: Tensor, mean: float, std: float) -> None:
    """Scale and shift the last convolution so that each channel comes out with this mean and deviation."""
    out = network(x)
    gain = std / out.std(dim=(0, 2, 3))
    shift = mean - gain * out.mean(dim=(0, 2, 3))
    weights = dict(network[-1].named_parameters())
    weights["weight"].mul_(gain[:, None, None, None])
    weights["bias"].mul_(gain).add_(shift)
