"""Stable Diffusion XL: two text encoders beside each other, a vector of the whole prompt, and the image's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..unet import UNetFamily


class StableDiffusionXL(UNetFamily):
    name = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    configuration = "stabilityai/stable-diffusion-xl-base-1.0"
    text_encoders = (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection"))
    text_keys = "conditioner.embedders.1."

    def conditioning(self, outputs: Sequence[Any], image_size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The last layers but one; the vector is the second encoder's for the first chunk."""
        rows = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
        height, width = image_size
        size = torch.tensor([[height, width, 0, 0, height, width]], device=rows.device, dtype=torch.float32)
        return rows, {"text_embeds": outputs[1].text_embeds[:1].float(), "time_ids": size}


FAMILY = StableDiffusionXL()
