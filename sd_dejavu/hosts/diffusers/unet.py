"""What the families with a UNet and CLIP's text encoders have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.denoiser import PredictionType, model_input
from ...core.schedule import Schedule
from . import ModelError, clip
from .families import Family, Shapes, takes_images

LARGEST_SIDE = 1024  # of a latent, in latent pixels
_NETWORK, _ATTENDED = "model.diffusion_model.", "attn2.to_k.weight"
_FIRST = f"{_NETWORK}input_blocks.0.0.weight"


class UNetFamily(Family):
    network = "unet"
    blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    evaluation_bytes = 16_000  # 15,000 in SD1.5, 9,500 in SDXL
    text_keys: str  # what the names of the last text encoder's tensors begin with in a single file

    def holds(self, shapes: Shapes) -> bool:
        return _FIRST in shapes and any(key.startswith(self.text_keys) for key in shapes)

    def takes_images(self, shapes: Shapes) -> bool:
        return shapes[_FIRST][1] != 4

    def widths(self, shapes: Shapes) -> tuple[int, int]:
        """(channels of the first layer, width of the conditioning's rows); 0 where a checkpoint has none."""
        rows = (shape[1] for key, shape in shapes.items() if key.startswith(_NETWORK) and key.endswith(_ATTENDED))
        return shapes[_FIRST][0], next(rows, 0)

    def prediction_type(self, pipeline: Any, name: str) -> PredictionType:
        match pipeline.scheduler.config.get("prediction_type", "epsilon"):
            case "epsilon" | "v_prediction" as known:
                return known
            case other:
                raise ModelError(
                    f"{name} predicts {other!r}; only epsilon and v_prediction models can be measured here"
                )

    def schedule(self, pipeline: Any) -> Schedule:
        """The schedule that a DDIM scheduler builds from the configuration of the pipeline's own."""
        from diffusers import DDIMScheduler

        return Schedule(DDIMScheduler.from_config(dict(pipeline.scheduler.config)).alphas_cumprod.float())

    def latent_shape(self, pipeline: Any, name: str) -> tuple[int, int, int]:
        config = pipeline.unet.config
        if config.in_channels != config.out_channels:
            raise takes_images(name)
        sides = (
            tuple(config.sample_size) if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
        )
        if len(sides) != 2 or not all(type(one) is int and 1 <= one <= LARGEST_SIDE for one in sides):
            raise ModelError(
                f"{name} does not say what size it draws: the sample_size of its UNet is {config.sample_size!r} and must "
                f"be a whole number between 1 and {LARGEST_SIDE}"
            )
        return int(config.in_channels), *sides

    def output(
        self, network: Any, x: Tensor, sigma: Tensor, timestep: Tensor, rows: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        given = model_input(x, sigma).to(network.dtype)
        return network(
            given, timestep, encoder_hidden_states=rows, added_cond_kwargs=extras or None, return_dict=False
        )[0]

    def encode(self, prompt: str, encoders: Sequence[tuple[Any, Any]], image_size: tuple[int, int]) -> Conditioning:
        return clip.encode(prompt, encoders, lambda outputs: self.conditioning(outputs, image_size))

    @abstractmethod
    def conditioning(self, outputs: Sequence[Any], image_size: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows [chunks, 77, D] and extras from what the text encoders put out, with all their hidden states."""
