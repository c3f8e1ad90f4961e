"""The noise a run starts from, adjusted before the sampler by the methods that touch it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import comfy.samplers
import torch
from torch import Tensor

from ...calibration.profile import Profile
from ...mitigations import Mitigation, Outcome
from .api import HostConditioning, Latent, ModelPatcher
from .before_sampling import begin_of
from .guidance import Steering
from .model import ComfyModel, as_host, with_model


@dataclass(frozen=True)
class FixedNoise:
    """The host's NOISE: this very noise, for a latent of its shape; ``seed`` is for samplers that draw more."""

    noise: Tensor
    seed: int

    def generate_noise(self, input_latent: Latent) -> Tensor:
        wanted = tuple(input_latent["samples"].shape)
        if wanted != tuple(self.noise.shape):
            raise ValueError(
                f"the initial noise was made for a latent of {tuple(self.noise.shape)}, not {wanted}: link the same "
                "latent to both nodes"
            )
        return self.noise.clone()


def adjust_noise(
    patcher: ModelPatcher,
    positive: HostConditioning,
    negative: HostConditioning,
    start: tuple[Tensor, Tensor, Tensor],
    seed: int,
    target: float,
    method: Mitigation,
    settings: object,
    profile: Profile | None,
    folder: Path | None,
) -> tuple[FixedNoise, ModelPatcher, dict[str, object]]:
    """The noise, the model with the method's guidance rule where it has one, and what was done as plain values.

    ``start`` is the run's latent, noise and sigmas. Raises ValueError where the prompt has several conditionings, or
    no target is given and no calibration found.
    """
    if len(positive) != 1 or len(negative) != 1:
        raise ValueError("the prompt or negative prompt is combined from several conditionings: give one of each")
    latent, noise, sigmas = start
    moved: list[Tensor] = []

    def work(model: ComfyModel, x: Tensor, sigma: Tensor) -> Outcome:
        conditioning, begin = begin_of(model, x, sigma, positive, target, profile, folder)
        outcome = method.apply(model, conditioning, begin, settings)
        if outcome.x is not None:
            moved.append((outcome.x - x).cpu())
        return outcome

    outcome = with_model(patcher, positive, latent, noise, sigmas, work, negative=negative)
    if moved:
        noise = noise + as_host(moved[0], noise.ndim) / _scale(patcher, sigmas)
    if outcome.rule is not None:
        rule = outcome.rule
        patcher = Steering(lambda model, guider, x: rule()).attach(patcher)
    document = {
        "method": method.name,
        "score_before": outcome.score_before,
        "score_after": outcome.score_after,
        "changed": bool(moved),
        "late_guidance": outcome.rule is not None,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in outcome.details.items()},
    }
    return FixedNoise(noise, seed), patcher, document


def _scale(patcher: ModelPatcher, sigmas: Tensor) -> float:
    """How far one unit of noise moves the x of a run's first step: the host's scaling is affine in the noise."""
    sampling = patcher.get_model_object("model_sampling")
    wrapped = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
    from_noise = comfy.samplers.Sampler().max_denoise(wrapped, sigmas)
    sigma, one = sigmas[:1].cpu(), torch.ones(1, 1, 1, 1)
    return float(sampling.noise_scaling(sigma, one.clone(), torch.zeros_like(one), from_noise))
