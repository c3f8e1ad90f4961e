"""The bundled model as ComfyUI's own MODEL, CLIP and VAE, for the nodes of the host to work on.

ComfyUI's loaders recognise models by their sizes, and this one is smaller than any of them, so it is put
together here from its diffusers folder. It computes in fp32 on every device, unless the host is started with a
precision of its own: it is small, and its calibration was measured so. Only a ComfyUI process can import this module.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import torch
from torch import Tensor, nn

from ...calibration.profile import Profile
from ...demo import bundled
from .api import CLIP, VAE, ModelPatcher
from .model import FINGERPRINT

BUNDLED = bundled.FOLDER
Config = dict[str, Any]  # one of a network, as its JSON file holds it
PIXELS_PER_LATENT = 4  # a side; the host's EmptyLatentImage counts 8, so it draws half the width it is asked for

_PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
}
_SCHEDULES = {"scaled_linear": "linear"}  # diffusers' name: the host's name


def load_demo_model(folder: Path = BUNDLED) -> tuple[ModelPatcher, CLIP, VAE]:
    """MODEL, CLIP and VAE from a diffusers folder of the bundled model's architecture."""
    model = _load_model(folder)
    model.set_attachments(FINGERPRINT, Profile.load(folder / bundled.CALIBRATION.name).setting.model)
    return model, _load_clip(folder), _load_vae(folder)


def empty_latent(batch: int, folder: Path = BUNDLED) -> Tensor:
    """Zeros [batch, channels, side, side] of the size the model was trained on."""
    unet = _config(folder, "unet")
    return torch.zeros(batch, unet["in_channels"], unet["sample_size"], unet["sample_size"])


def _config(folder: Path, part: str, name: str = "config.json") -> Config:
    return json.loads((folder / part / name).read_text(encoding="utf-8"))


def _weights(folder: Path, part: str, name: str = "diffusion_pytorch_model.safetensors") -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(str(folder / part / name), safe_load=True)


# -------------------------------------------------------------------------------------------- MODEL


class _Configuration(comfy.supported_models_base.BASE):
    unet_extra_config: ClassVar[Config] = {}
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.float32]
    memory_usage_factor = 1.0


class _LatentFormat(comfy.latent_formats.LatentFormat):
    """Between the autoencoder's latents and the diffusion model's, by the autoencoder's configuration."""

    spacial_downscale_ratio = 4

    def __init__(self, scale: float, shift: float) -> None:
        self.scale_factor, self.shift = scale, shift

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.shift) * self.scale_factor

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / self.scale_factor + self.shift


def _load_model(folder: Path) -> ModelPatcher:
    schedule, autoencoder = _config(folder, "scheduler", "scheduler_config.json"), _config(folder, "vae")
    weights = _weights(folder, "unet")
    configuration = _Configuration(_unet_config(_config(folder, "unet")))
    configuration.sampling_settings = {
        "beta_schedule": _SCHEDULES[schedule["beta_schedule"]],
        "linear_start": schedule["beta_start"],
        "linear_end": schedule["beta_end"],
        "timesteps": schedule["num_train_timesteps"],
        "zsnr": schedule["rescale_betas_zero_snr"],
    }
    configuration.latent_format = _LatentFormat(autoencoder["scaling_factor"], autoencoder.get("shift_factor") or 0.0)

    manager = comfy.model_management
    device, offload_device = manager.get_torch_device(), manager.unet_offload_device()
    allowed = configuration.supported_inference_dtypes
    dtype = manager.unet_dtype(model_params=comfy.utils.calculate_parameters(weights), supported_dtypes=allowed)
    configuration.set_inference_dtype(dtype, manager.unet_manual_cast(dtype, device, allowed))

    prediction = _PREDICTIONS[schedule["prediction_type"]]
    model = comfy.model_base.BaseModel(configuration, model_type=prediction, device=offload_device)
    names = comfy.utils.unet_to_diffusers(configuration.unet_config)
    model.diffusion_model.load_state_dict({names[key]: value for key, value in weights.items()}, strict=True)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=offload_device)


def _unet_config(config: Config) -> Config:
    """diffusers' configuration of the UNet in the words of the original one, depths level by level."""
    widths, blocks, depth = config["block_out_channels"], config["layers_per_block"], 1
    down = [depth if "CrossAttn" in name else 0 for name in config["down_block_types"]]
    up = [depth if "CrossAttn" in name else 0 for name in reversed(config["up_block_types"])]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * len(widths),
        "transformer_depth": [d for d in down for _ in range(blocks)],
        "transformer_depth_middle": depth,
        "transformer_depth_output": [d for d in up for _ in range(blocks + 1)],
        "context_dim": config["cross_attention_dim"],
        "num_heads": config["attention_head_dim"],  # diffusers kept the wrong name: this is their number
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "adm_in_channels": None,
        "legacy": False,
    }


# --------------------------------------------------------------------------------------------- CLIP


class _TextTransformer(comfy.clip_model.CLIPTextModel):
    """The host's, with a vocabulary of the configuration's size (the host's own takes CLIP's 49408 for granted)."""

    def __init__(self, config: Config, dtype: torch.dtype | None, device: object, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        table = operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device)
        self.set_input_embeddings(table)


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    """The last layer's rows after the final layer norm, as Stable Diffusion 1.x reads them."""

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(
            textmodel_json_config=dict(config),
            model_class=_TextTransformer,
            special_tokens={
                "start": config["bos_token_id"],
                "end": config["eos_token_id"],
                "pad": config["pad_token_id"],
            },
            return_projected_pooled=False,
            **options,
        )


def _load_clip(folder: Path) -> CLIP:
    config = _config(folder, "text_encoder")
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(folder / "tokenizer"),
        max_length=config["max_position_embeddings"],
        embedding_size=config["hidden_size"],
        pad_token=config["pad_token_id"],
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=partial(_TextEncoder, config)),
    )
    weights = _weights(folder, "text_encoder", "model.safetensors")
    named = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
    # Stable Diffusion 1.x has no projection, and none is used; the host's layer would hold whatever lay in memory.
    named["text_projection.weight"] = torch.eye(config["hidden_size"])
    clip = comfy.sd.CLIP(target, parameters=comfy.utils.calculate_parameters(weights))
    missing, unexpected = clip.load_sd(named)
    missing = [key for key in missing if not key.endswith("position_ids")]
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    if missing or unexpected:
        raise ValueError(f"the text encoder in {folder} does not fit: {', '.join([*missing, *unexpected])}")
    return clip


# ---------------------------------------------------------------------------------------------- VAE


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Autoencoder(nn.Module):
    """diffusers' AutoencoderTiny by its arithmetic and its weights' names; images lie in -1..1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        latent = config["latent_channels"]
        encoder_widths, decoder_widths = config["encoder_block_out_channels"], config["decoder_block_out_channels"]

        down: list[nn.Module] = []
        for level, (width, blocks) in enumerate(zip(encoder_widths, config["num_encoder_blocks"], strict=True)):
            if level == 0:
                down.append(_conv(config["in_channels"], width))
            else:
                down.append(_conv(width, width, stride=2, bias=False))
            down += [_Block(width) for _ in range(blocks)]
        self.encoder = _Layers(*down, _conv(encoder_widths[-1], latent))

        up: list[nn.Module] = [_conv(latent, decoder_widths[0]), nn.ReLU()]
        last = len(decoder_widths) - 1
        for level, (width, blocks) in enumerate(zip(decoder_widths, config["num_decoder_blocks"], strict=True)):
            up += [_Block(width) for _ in range(blocks)]
            if level < last:
                up += [nn.Upsample(scale_factor=config["upsampling_scaling_factor"]), _conv(width, width, bias=False)]
        self.decoder = _Layers(*up, _conv(decoder_widths[last], config["out_channels"]))

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder((images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(torch.tanh(latents / 3) * 3) * 2 - 1


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Module:
    return comfy.ops.disable_weight_init.Conv2d(inputs, outputs, 3, padding=1, **options)


def _load_vae(folder: Path) -> VAE:
    """The host's VAE around our network: made for the host's own tiny autoencoder, which is then replaced."""
    config = _config(folder, "vae")
    network = _Autoencoder(config)
    network.load_state_dict(_weights(folder, "vae"), strict=True)
    stand_in = comfy.taesd.taesd.TAESD(latent_channels=config["latent_channels"])
    vae = comfy.sd.VAE(sd=stand_in.state_dict(), dtype=torch.float32)
    vae.first_stage_model = network.eval().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.downscale_ratio = vae.upscale_ratio = PIXELS_PER_LATENT
    return vae
