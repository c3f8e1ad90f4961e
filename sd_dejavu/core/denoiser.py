"""The one thing every host provides: a denoiser, (x, sigma, conditioning) -> x0 prediction.

``x`` is the noisy latent in the scale x = x0 + sigma * noise (Karras et al., 2022) for epsilon- and
v-models, and x = (1 - sigma) * x0 + sigma * noise for rectified flow. Samplers, detectors and
mitigations see nothing else of a model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .conditioning import Conditioning, Unconditional

PredictionType = Literal["epsilon", "v_prediction", "flow"]


class PromptTooLong(ValueError):
    """The prompt has more tokens than can be read; the text says how many."""


class Denoiser(Protocol):
    """A model bound to its weights; differentiable in ``x`` and in the conditioning's rows and extras.

    A conditioning that carries an attention rule is attended to by that rule.
    """

    @property
    def prediction_type(self) -> PredictionType: ...

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x [B, C, H, W], sigma [B], conditioning of batch 1 or B -> denoised [B, C, H, W] in fp32."""
        ...


class Model(Denoiser, Protocol):
    """A whole text-to-image model, as the command line and calibration need it: a denoiser with both ends."""

    @property
    def name(self) -> str: ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one latent."""
        ...

    @property
    def fingerprint(self) -> str:
        """Tells the denoising network's weights apart: equal for equal weights, in every host."""
        ...

    @property
    def text_encoder(self) -> str:
        """The same for the text encoder's; '' where it is not at hand."""
        ...

    @property
    def patches(self) -> str:
        """What a host adds to the checkpoint in this run, in words; '' for nothing that it tells."""
        ...

    def encode(self, prompt: str) -> Conditioning:
        """Raises PromptTooLong for more tokens than can be read."""
        ...

    def sigmas(self, steps: int) -> list[float]:
        """Noise levels of a run of so many steps, first to last, ending in 0."""
        ...

    def noise(self, seed: int, images: int) -> Tensor:
        """Standard normal noise [images, *latent_shape] on the model's device."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, height, width] in 0..1 on the CPU."""
        ...

    def images_of(self, latents: Tensor) -> Tensor:
        """As :meth:`decode`, but differentiable, on the model's device and not cut to 0..1."""
        ...

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Share of the cross-attention that each of the prompt's rows gets, [B, N], over layers, heads and places.

        Raises ValueError for a model without cross-attention of its own.
        """
        ...

    def differentiable(self, checkpointing: bool = False) -> AbstractContextManager[None]:
        """While open, calls can be differentiated, in the model's own precision.

        Activations are recomputed in the backward pass where memory is short, or always with ``checkpointing``.
        """
        ...


@dataclass(frozen=True)
class Predictions:
    """Both predictions of one guidance step: denoised [B, C, H, W] with and without the prompt, sigma [B]."""

    conditional: Tensor
    unconditional: Tensor
    sigma: Tensor
    baseline: Unconditional = "empty prompt"


@dataclass(frozen=True)
class Evaluation:
    """One model evaluation of a host's own sampler: x [B, C, H, W] at sigma [B], in the denoiser's scale.

    Both denoised predictions [B, C, H, W], or None for what guidance did not give; ``kind`` is what the unconditional
    one was made with. ``missing`` says why nothing can be measured here at all.
    """

    x: Tensor
    sigma: Tensor
    conditional: Tensor | None = None
    unconditional: Tensor | None = None
    kind: Unconditional = "empty prompt"
    missing: str = ""

    @property
    def predictions(self) -> Predictions:
        """Raises ValueError where guidance did not give both."""
        if self.conditional is None or self.unconditional is None:
            raise ValueError(self.missing or "guidance did not give both predictions")
        return Predictions(self.conditional, self.unconditional, self.sigma, self.kind)

    def of(self, images: tuple[int, ...] | None) -> Evaluation:
        """The same for some images of the batch; None for all."""
        if images is None:
            return self
        chosen = list(images)
        conditional = None if self.conditional is None else self.conditional[chosen]
        unconditional = None if self.unconditional is None else self.unconditional[chosen]
        return Evaluation(self.x[chosen], self.sigma[chosen], conditional, unconditional, self.kind, self.missing)


def over_pixels(sigma: Tensor) -> Tensor:
    """sigma [B] -> [B, 1, 1, 1] in fp32."""
    return sigma.float().reshape(-1, 1, 1, 1)


def noise_to_signal(sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """sigma [B] -> the noise over the signal in x: sigma itself, and s / (1 - s) for flow, infinite at pure noise.

    x / (1 - s) = x0 + s / (1 - s) * noise, so that a formula made for epsilon-models holds for flow at this level.

    >>> noise_to_signal(torch.tensor([0.5, 0.75]), "flow")
    tensor([1., 3.])
    """
    return sigma.float() / (1 - sigma.float()).clamp_min(0) if prediction_type == "flow" else sigma.float()


def model_input(x: Tensor, sigma: Tensor) -> Tensor:
    """The unit-variance input of an epsilon- or v-model: x / sqrt(1 + sigma^2)."""
    return x / (1 + over_pixels(sigma) ** 2).sqrt()


def denoised_from_output(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """The x0 prediction from what the network put out, in fp32.

    epsilon: x - sigma * eps. v (Salimans & Ho, 2022, in this scale): x / (1 + sigma^2)
    - v * sigma / sqrt(1 + sigma^2). flow: x - sigma * velocity.

    >>> x, sigma = torch.full((1, 1, 1, 1), 5.0), torch.tensor([2.0])
    >>> denoised_from_output(torch.ones(1, 1, 1, 1), x, sigma, "epsilon").item()  # 5 - 2 * 1
    3.0
    """
    s, output, x = over_pixels(sigma), output.float(), x.float()
    match prediction_type:
        case "epsilon" | "flow":
            return x - s * output
        case "v_prediction":
            return x / (1 + s**2) - output * s / (1 + s**2).sqrt()
        case _:
            raise ValueError(f"prediction type {prediction_type!r} is unknown: use epsilon, v_prediction or flow")


def initial_latent(noise: Tensor, sigma: float, prediction_type: PredictionType) -> Tensor:
    """x_T of a run that starts from nothing but noise: unit-variance noise in the model's own scale."""
    return noise if prediction_type == "flow" else noise * (1 + sigma**2) ** 0.5


def seeded_noise(shape: tuple[int, ...], seed: int, images: int) -> Tensor:
    """Standard normal noise [images, *shape] from one generator on the CPU.

    The first images are the same however many are asked for, as in the hosts.
    """
    return torch.randn((images, *shape), generator=torch.Generator().manual_seed(seed))
