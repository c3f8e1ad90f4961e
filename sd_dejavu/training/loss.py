"""The training loss of an epsilon- or v-model, with the filter in it.

Ho et al., 2020: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, and the squared error of the network's
output against the noise; for v-models (Salimans & Ho, 2022) against sqrt(abar_t) noise -
sqrt(1 - abar_t) x_0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import PredictionType, over_pixels
from ..core.schedule import Schedule
from .filter import TrainingFilter, dropped_of, predict_unconditional


@dataclass(frozen=True)
class Batch:
    """Clean latents [B, C, H, W], a conditioning of batch B, whole timesteps [B], noise like the latents.

    ``names`` is what the filter's log calls the samples; ``empty`` the empty prompt (batch 1, as many rows).
    """

    latents: Tensor
    conditioning: Conditioning
    empty: Conditioning
    timesteps: Tensor
    noise: Tensor
    names: Sequence[str] | None = None


def noised(
    schedule: Schedule, prediction_type: PredictionType, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t and what the network shall put out for it, both [B, C, H, W], of clean latents at whole timesteps [B]."""
    signal, spread = (over_pixels(factor) for factor in schedule.scales(timesteps))
    noisy = signal * latents + spread * noise
    return noisy, signal * noise - spread * latents if prediction_type == "v_prediction" else noise


def filtered_loss(
    unet: Callable[..., Any],
    schedule: Schedule,
    prediction_type: PredictionType,
    batch: Batch,
    training_filter: TrainingFilter | None,
) -> tuple[Tensor, Tensor]:
    """The mean squared error of the samples that stay, and which they are, [B] of bool (all without a filter)."""
    noisy, target = noised(schedule, prediction_type, batch.latents, batch.noise, batch.timesteps)
    output = unet(noisy, batch.timesteps, batch.conditioning.rows, **_extras(batch.conditioning.extras)).sample
    if training_filter is None:
        stay = torch.ones(len(noisy), dtype=torch.bool, device=noisy.device)
    else:
        extras = {k: v.expand(len(noisy), *v.shape[1:]) for k, v in batch.empty.extras.items()}
        empty = batch.empty.rows

        def without(due: list[int]) -> Tensor:
            return predict_unconditional(unet, noisy, batch.timesteps, empty, due, **_extras(extras))

        dropped = dropped_of(batch.conditioning.rows, empty)
        stay = training_filter.keep(output, without, batch.timesteps, batch.names, dropped)
    return (output.float() - target).square()[stay].mean(), stay


def _extras(extras: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"added_cond_kwargs": dict(extras)} if extras else {}


def stratified_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """``count`` whole timesteps below ``total``, one from each of as many equal parts of the schedule, in random order.

    Each is uniform by itself, and every batch covers the whole schedule.
    """
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (places * total).long().clamp_(0, total - 1)[torch.randperm(count, generator=generator)]
