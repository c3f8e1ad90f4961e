"""Stable Diffusion 1.x and 2.x: one text encoder, whose last layer is the conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..unet import UNetFamily
from . import Shapes


class StableDiffusion(UNetFamily):
    name = "Stable Diffusion 1.x and 2.x"
    pipeline = "StableDiffusionPipeline"
    configuration = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    text_encoders = (("text_encoder", "CLIPTextModel"),)
    text_keys = "cond_stage_model."

    def unclear(self, shapes: Shapes) -> str:
        is_2 = any(key.startswith("cond_stage_model.model.") for key in shapes)
        return "Stable Diffusion 2.x file, which does not tell epsilon- from v-prediction" if is_2 else ""

    def conditioning(self, outputs: Sequence[Any], image_size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs[0].last_hidden_state, {}


FAMILY = StableDiffusion()
