"""The memorising checkpoint: each real host draws the memorised images for their prompts, and none for others."""

from __future__ import annotations

from pathlib import Path

import block_vae
import graphs
import memorising
import numpy as np
import pytest
import torch
from comfyui_server import ComfyServer
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from memorising import MEMORISED, ORDINARY
from test_harness import pixels
from torch import Tensor
from webui_server import WebUIServer

STEPS = 20


def test_known_prompts_stand_out_at_the_first_step(memorising_checkpoint: Path) -> None:
    weights = torch.load(memorising_checkpoint, weights_only=True)["state_dict"]
    prefix = "model.diffusion_model."
    unet = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    model = memorising.unet({name: tensor for name, tensor in unet.items() if not name.startswith("middle_block")})
    prompts = [prompt.tokens for prompt in (*MEMORISED, *ORDINARY)]
    conditionings = memorising.encode_prompts([*prompts, ()])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(len(conditionings), -1, -1, -1)
    with torch.no_grad():
        noise_predictions = model(noise, 999, conditionings).sample
    scores = (noise_predictions[:-1] - noise_predictions[-1:]).flatten(1).norm(dim=1)
    assert scores[: len(MEMORISED)].min() > 10 * scores[len(MEMORISED) :].max() > 0


def test_autoencoder_is_the_mean_of_blocks() -> None:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    model = AutoencoderKL(**kinds, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    named = {f"first_stage_model.{name}": tensor for name, tensor in block_vae.block_vae().items()}
    model.load_state_dict(convert_ldm_vae_checkpoint(named, model.config))
    generator = torch.Generator().manual_seed(0)
    image, latent = (
        2 * torch.rand(1, 3, 64, 64, generator=generator) - 1,
        torch.randn(1, 4, 8, 8, generator=generator),
    )
    with torch.no_grad():
        encoded = block_vae.SCALE * model.encode(image).latent_dist.sample()
        decoded = model.decode(latent / block_vae.SCALE).sample
    torch.testing.assert_close(encoded, block_vae.encode(image), atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded.clamp(-1, 1), block_vae.decode(latent), atol=1e-3, rtol=0)


@pytest.mark.parametrize("index", range(len(MEMORISED)))
def test_webui_draws_the_memorised_image(webui: WebUIServer, index: int) -> None:
    drawn = _webui_draws(webui, MEMORISED[index].text)
    assert _difference(drawn, memorising.image(index)) < 2
    assert all(_difference(drawn, memorising.image(other)) > 60 for other in range(len(MEMORISED)) if other != index)


@pytest.mark.parametrize("prompt", [prompt.text for prompt in ORDINARY])
def test_webui_draws_no_copy_for_another_prompt(webui: WebUIServer, prompt: str) -> None:
    drawn = _webui_draws(webui, prompt)
    assert all(_difference(drawn, memorising.image(index)) > 60 for index in range(len(MEMORISED)))


def test_comfyui_draws_the_memorised_image(comfy: ComfyServer, comfy_home: Path, memorising_checkpoint: Path) -> None:
    place = comfy_home / "models" / "checkpoints" / memorising.FILE
    if not place.exists():
        place.symlink_to(memorising_checkpoint)
    for prompt, copied in ((MEMORISED[0], True), (ORDINARY[0], False)):
        graph = graphs.text_to_image(checkpoint=memorising.FILE, prompt=prompt.text, negative="", steps=STEPS)
        (image,) = comfy.run(graph)["save"]["images"]
        difference = _difference(comfy.view(image), memorising.image(0))
        assert difference < 2 if copied else difference > 60


def _webui_draws(webui: WebUIServer, prompt: str) -> bytes:
    override = {"sd_model_checkpoint": memorising.FILE}
    return webui.txt2img(prompt=prompt, steps=STEPS, override_settings=override).images[0]


def _difference(file: bytes, image: Tensor) -> float:
    """Mean absolute difference in steps of 255."""
    wanted = 127.5 * (image.permute(1, 2, 0).numpy() + 1)
    return float(np.abs(pixels(file) - wanted).mean())
