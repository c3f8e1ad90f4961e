"""The noise schedule of epsilon- and v-models: whole and fractional timesteps, and the noise levels that belong to them.

At timestep t such a model has x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al., 2020). Divided by
sqrt(abar_t) that is x0 + sigma_t noise, with sigma_t = sqrt((1 - abar_t) / abar_t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WHOLE = 1e-3  # so near to a whole timestep a level is that timestep's own, and its logarithm was rounded


@dataclass(frozen=True)
class Schedule:
    """``alphas_cumprod`` holds abar_t [T], falling, as diffusers' schedulers and the web UIs have it.

    >>> schedule = Schedule(torch.tensor([0.8, 0.5, 0.2]))  # sigma 0.5, 1 and 2
    >>> schedule.timestep(torch.tensor([1.0, 2.0**0.5]))
    tensor([1.0000, 1.5000])
    """

    alphas_cumprod: Tensor

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of signal and noise, sqrt(abar_t) and sqrt(1 - abar_t), [B] in fp32 on the timesteps' device.

        ``timesteps`` [B] are whole.
        """
        abar = self._at(timesteps).float()
        return abar.sqrt(), (1 - abar).sqrt()

    def sigma(self, timesteps: Tensor) -> Tensor:
        """sigma_t [B] of whole timesteps [B], on their device and in the precision of the schedule."""
        abar = self._at(timesteps)
        return ((1 - abar) / abar).sqrt()

    def timestep(self, sigma: Tensor) -> Tensor:
        """sigma [B] -> fractional timestep [B] in fp32, linear in log sigma between the levels, and cut to 0..T-1."""
        levels = self._log_sigmas.to(sigma.device)
        log = sigma.float().clamp_min(1e-10).log()
        high = torch.searchsorted(levels, log.contiguous()).clamp(1, len(levels) - 1)
        low = high - 1
        share = ((log - levels[low]) / (levels[high] - levels[low])).clamp(0, 1)
        fractional = low + share
        nearest = fractional.round()
        return torch.where((fractional - nearest).abs() < WHOLE, nearest, fractional)

    def sigmas(self, steps: int) -> list[float]:
        """Noise levels of ``steps`` DDIM steps (leading spacing, offset 1: the first is timestep 981 of 50), then 0.

        Raises ValueError for more steps than the schedule has, or none.
        """
        total = len(self)
        if not 1 <= steps <= total:
            raise ValueError(f"the number of steps must be between 1 and {total}, not {steps}")
        timesteps = [min(i * (total // steps) + 1, total - 1) for i in reversed(range(steps))]
        return [*(math.sqrt((1 - abar) / abar) for abar in self.alphas_cumprod[timesteps].tolist()), 0.0]

    def _at(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device)[timesteps.long()]

    @cached_property
    def _log_sigmas(self) -> Tensor:
        """[T] in fp32, rising."""
        return self.sigma(torch.arange(len(self), device=self.alphas_cumprod.device)).log().float()
