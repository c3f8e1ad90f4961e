"""Stable Diffusion XL: two text encoders beside each other, a vector of the whole prompt, and the image's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ModelError
from ..unet import UNetFamily
from . import Shapes


class StableDiffusionXL(UNetFamily):
    name = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    text_encoders = (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection"))
    text_keys = "conditioner.embedders.1."

    def files(self, shapes: Shapes) -> str | None:
        return {(320, 2048): "sdxl"}.get(self.widths(shapes))

    def tells(self, shapes: Shapes, tensor: Callable[[str], Tensor]) -> dict[str, dict[str, Any]]:
        """Empty tensors name what the network was trained to predict."""
        if foreign := next((key for key in shapes if key.startswith("edm_")), None):
            raise ModelError(f"it has noise levels of its own ({foreign}), which cannot be measured here")
        if "v_pred" not in shapes:
            return {}
        return {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in shapes}}

    def conditioning(self, outputs: Sequence[Any], image_size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The last layers but one; the vector is the second encoder's for the first chunk."""
        rows = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
        height, width = image_size
        size = torch.tensor([[height, width, 0, 0, height, width]], device=rows.device, dtype=torch.float32)
        return rows, {"text_embeds": outputs[1].text_embeds[:1].float(), "time_ids": size}


FAMILY = StableDiffusionXL()
