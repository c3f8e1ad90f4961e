"""Families of models: one a file; the folder is the register.

A module of this folder ends in ``FAMILY``, a :class:`Family`. Nothing else knows what families there are: loading asks
each whether a model is its own, and the adapter asks it for all that differs from family to family. Those with a UNet
and CLIP's text encoders share :mod:`sd_dejavu.hosts.diffusers.unet`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ....core.conditioning import Conditioning
from ....core.denoiser import PredictionType
from .. import ModelError

Shapes = Mapping[str, tuple[int, ...]]  # of a checkpoint's tensors, by name


class Levels(Protocol):
    """The noise levels of a model: sigma as the core has it, and the time that the network is given for it."""

    def timestep(self, sigma: Tensor) -> Tensor:
        """sigma [B] -> what the network is given in its place, [B]."""
        ...

    def sigmas(self, steps: int) -> list[float]:
        """Noise levels of a run of so many steps, first to last, then 0; raises ValueError where there are none such."""
        ...


class Family(ABC):
    """What one family of models has of its own. It keeps nothing of a model."""

    name: str  # as messages call it
    pipeline: str  # diffusers' class, as a folder's model_index.json names it
    text_encoders: tuple[tuple[str, str], ...]  # the pipeline's parts and their classes in transformers
    network: str  # the pipeline's part that denoises
    blocks: tuple[str, ...]  # diffusers' classes of what is recomputed where memory is short; none lies within another
    evaluation_bytes: int  # that a latent pixel takes in half precision while the network is evaluated

    # ----------------------------------------------------------------------------------- recognised

    @abstractmethod
    def holds(self, shapes: Shapes) -> bool:
        """Whether a single-file checkpoint is of this family, from the names and shapes of its tensors."""

    def takes_images(self, shapes: Shapes) -> bool:
        """Whether such a checkpoint takes an image beside the prompt (inpainting, editing)."""
        return False

    @abstractmethod
    def files(self, shapes: Shapes) -> str | None:
        """The folder below files/ that describes such a checkpoint; None for one of other sizes."""

    def tells(self, shapes: Shapes, tensor: Callable[[str], Tensor]) -> dict[str, dict[str, Any]]:
        """What the checkpoint itself says against its configuration, by the pipeline's parts.

        ``tensor`` gives the values of one of its tensors. Raises ModelError, without the model's name, for a kind that
        cannot be measured.
        """
        return {}

    # ------------------------------------------------------------------------------------ evaluated

    @abstractmethod
    def prediction_type(self, pipeline: Any, name: str) -> PredictionType:
        """What the network predicts. Raises ModelError, with the model's ``name``, for what cannot be measured."""

    @abstractmethod
    def schedule(self, pipeline: Any) -> Levels:
        """The model's noise levels."""

    @abstractmethod
    def latent_shape(self, pipeline: Any, name: str) -> tuple[int, int, int]:
        """(channels, height, width) of a latent as the core has it. Raises ModelError where the model does not tell."""

    @abstractmethod
    def output(
        self, network: Any, x: Tensor, sigma: Tensor, timestep: Tensor, rows: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        """What the network puts out, [B, C, H, W], in its own precision.

        ``x`` [B, C, H, W] and ``sigma`` [B] are the core's, ``timestep`` [B] is that of :meth:`schedule`; ``rows``
        [B, N, D] and ``extras`` are those of :meth:`encode`, for each of x, in the network's precision.
        """

    def for_autoencoder(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] of the network as its autoencoder has them."""
        return latents / getattr(vae.config, "scaling_factor", 1.0) + (getattr(vae.config, "shift_factor", None) or 0.0)

    def from_autoencoder(self, vae: Any, latents: Tensor) -> Tensor:
        """The other way round."""
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * getattr(vae.config, "scaling_factor", 1.0)

    # -------------------------------------------------------------------------------------- prompts

    @abstractmethod
    def encode(self, prompt: str, encoders: Sequence[tuple[Any, Any]], image_size: tuple[int, int]) -> Conditioning:
        """The conditioning of a prompt, with its words, and with the extras that an evaluation needs beside its rows.

        ``encoders`` are the (tokenizer, text encoder) of ``text_encoders``, ``image_size`` is (height, width) in
        pixels. Raises PromptTooLong for more than can be read.
        """


def takes_images(name: str) -> ModelError:
    return ModelError(
        f"{name} takes an image beside the prompt (inpainting or editing); such models cannot be measured here"
    )


def available() -> list[Family]:
    """All families of this folder, in the order of their files."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return [module.FAMILY for module in modules]


def names() -> str:
    """'Stable Diffusion 1.x and 2.x, Stable Diffusion XL', for messages."""
    return ", ".join(family.name for family in available())


def family_of_pipeline(name: Any, where: str) -> Family:
    """The family whose pipeline has this name, as read at ``where``. Raises ModelError where there is none."""
    for family in available():
        if family.pipeline == name:
            return family
    raise ModelError(f"{where} holds a {name or 'pipeline without a name'}; what can be read is: {names()}")


def family_of_checkpoint(shapes: Shapes, name: str) -> Family:
    """The family of a single-file checkpoint. Raises ModelError where there is none."""
    for family in available():
        if family.holds(shapes):
            return family
    raise ModelError(
        f"{name} holds no whole model that can be read ({names()}): it is a LoRA or a part of one, perhaps"
    )
