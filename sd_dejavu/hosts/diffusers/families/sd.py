"""Stable Diffusion 1.x and 2.x: one text encoder, whose last layer is the conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..unet import UNetFamily
from . import Shapes

_TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD = 0.09


class StableDiffusion(UNetFamily):
    name = "Stable Diffusion 1.x and 2.x"
    pipeline = "StableDiffusionPipeline"
    text_encoders = (("text_encoder", "CLIPTextModel"),)
    text_keys = "cond_stage_model."

    def files(self, shapes: Shapes) -> str | None:
        return {(320, 768): "sd1", (320, 1024): "sd2"}.get(self.widths(shapes))

    def tells(self, shapes: Shapes, tensor: Callable[[str], Tensor]) -> dict[str, dict[str, Any]]:
        """Files of 2.x do not name what they predict; ComfyUI tells it by this tensor's spread."""
        if self.files(shapes) != "sd2" or _TELLING not in shapes:
            return {}
        if float(tensor(_TELLING).float().std(correction=0)) > _SPREAD:
            return {"scheduler": {"prediction_type": "v_prediction"}, "unet": {"sample_size": 96}}
        return {}

    def conditioning(self, outputs: Sequence[Any], image_size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        return outputs[0].last_hidden_state, {}


FAMILY = StableDiffusion()
