"""Leaves samples that a model is memorising out of its training loss.

Wen, Liu, Chen, Lyu: *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*, ICLR
2024, on mitigation during training: for each sample at its own random t, one more pass without the
prompt and without gradients; the sample is left out of the loss when

    || eps(x_t, prompt) - eps(x_t, empty) ||_2 >= tau,   tau = 2.

The number belongs to latents of 4 x 64 x 64. A norm grows with the square root of the number of
elements, so the threshold is scaled by sqrt(C H W / 16384) for other shapes. How far an ordinary
caption moves the prediction also differs from model to model, and with t; the other mode therefore
compares a sample with recent ones at the same noise level.

For v-models eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t, so the difference of two noise predictions is
sqrt(abar_t) times that of the two outputs. The published training code is undefined for a batch that
goes altogether: here the least memorised sample stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

import numpy as np
import torch
from torch import Tensor

from ..core.schedule import Schedule
from ..core.settings import Checked, option
from ..detectors.magnitude import magnitude_of_noise_predictions

PUBLISHED_NUMEL = 4 * 64 * 64
DIFFUSION_STEPS = 1000
CHOICES = ("none", "threshold", "quantile")

Reason = Literal["at or above the threshold", "above the quantile", "not finite"]


@dataclass(frozen=True)
class FilterSettings(Checked):
    """Which samples are left out of the loss."""

    filter: str = option(
        "threshold",
        "leave out samples by a fixed threshold (as published), by a running quantile at their noise level, or none",
        choices=CHOICES,
    )
    filter_threshold: float = option(
        2.0,
        "magnitude from which a sample is left out, for latents of 4x64x64; scaled to other shapes",
        minimum=0.001,
        maximum=10_000.0,
    )
    filter_quantile: float = option(
        0.9,
        "share of recent magnitudes at the same noise level that a sample may not be above",
        minimum=0.0,
        maximum=1.0,
        exclusive=True,
    )
    filter_levels: int = option(10, "noise levels that are told apart for the quantile", minimum=1, maximum=1000)
    filter_history: int = option(
        1000, "recent magnitudes that are kept of each noise level", minimum=1, maximum=1_000_000
    )
    filter_warm_up: int = option(
        100,
        "magnitudes of a noise level that must have been seen before its quantile counts",
        minimum=1,
        maximum=1_000_000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter_warm_up > self.filter_history:
            raise ValueError(
                f"filter warm up must be at most filter history ({self.filter_history}), not {self.filter_warm_up}: "
                "the quantile would never count"
            )


@dataclass(frozen=True)
class LeftOut:
    """One sample that was left out: ``magnitude`` and ``limit`` are L2 norms of this latent's own shape."""

    step: int
    sample: str
    timestep: int
    magnitude: float
    limit: float
    reason: Reason

    def as_json(self) -> str:
        """One line; what is not finite becomes null, which every reader knows."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return json.dumps(values, ensure_ascii=False)


@dataclass
class Counts:
    """``kept_alone`` counts the samples that stayed only because their whole batch would have gone."""

    seen: int = 0
    left_out: int = 0
    not_finite: int = 0
    kept_alone: int = 0

    @property
    def kept_share(self) -> float:
        return 1 - self.left_out / self.seen if self.seen else float("nan")


class TrainingFilter:
    """Says for each batch which samples stay in the loss; ``counts`` and ``log`` say what did not, and why.

    ``prediction_type`` is the kind of the model's outputs; for 'v_prediction' ``alphas_cumprod`` [T] of the training
    schedule is needed. The log grows until :meth:`write_log` takes it. A batch never goes altogether, unless it
    ``may_empty``: for trainers that weigh samples by 0, whose loss is defined then too. Raises ValueError for settings
    that leave nothing out, and for flow models, whose difference at one t is not that of noise predictions.

    >>> found = TrainingFilter()  # 2 for latents of 4 x 64 x 64, so 2 * sqrt(16 / 16384) = 0.0625 for 16 numbers
    >>> with_prompt = torch.stack([torch.full((1, 4, 4), 0.01), torch.full((1, 4, 4), 0.02)])  # 4 * 0.01, 4 * 0.02
    >>> found.keep(with_prompt, torch.zeros(2, 1, 4, 4), torch.tensor([500, 500]))
    tensor([ True, False])
    """

    def __init__(
        self,
        settings: FilterSettings = FilterSettings(),
        prediction_type: str = "epsilon",
        alphas_cumprod: Tensor | None = None,
        may_empty: bool = False,
    ) -> None:
        if settings.filter == "none":
            raise ValueError("a filter that leaves nothing out is no filter: use threshold or quantile")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"the filter is made for epsilon and v_prediction models, not for {prediction_type!r}")
        self._schedule: Schedule | None = None
        if prediction_type == "v_prediction":
            if alphas_cumprod is None:
                raise ValueError("for a v_prediction model the filter needs alphas_cumprod of its noise schedule")
            self._schedule = Schedule(alphas_cumprod)
        self.settings, self._may_empty = settings, may_empty
        self._diffusion_steps = DIFFUSION_STEPS if alphas_cumprod is None else len(alphas_cumprod)
        self._histories: list[list[float]] = [[] for _ in range(settings.filter_levels)]
        self._step = 0
        self.counts = Counts()
        self.log: list[LeftOut] = []

    def magnitudes(self, conditional: Tensor, unconditional: Tensor, timesteps: Tensor) -> Tensor:
        """|| Delta ||_2 in fp32, [B], from the model's outputs [B, C, H, W] with and without prompt."""
        found = magnitude_of_noise_predictions(conditional.detach(), unconditional.detach())
        return found if self._schedule is None else found * self._schedule.scales(timesteps.to(found.device))[0]

    def keep(
        self, conditional: Tensor, unconditional: Tensor, timesteps: Tensor, names: Sequence[str] | None = None
    ) -> Tensor:
        """Which samples stay in the loss, [B] of bool, on the device of the model's outputs.

        ``conditional`` and ``unconditional`` [B, C, H, W] are the model's outputs with and without prompt in any
        precision, ``timesteps`` [B] whole numbers, ``names`` what the log calls the samples (their number in the
        batch by default). Raises ValueError where no magnitude of the batch is finite.
        """
        magnitudes = self.magnitudes(conditional, unconditional, timesteps).tolist()
        levels = [int(t) for t in timesteps.tolist()]
        if not any(math.isfinite(m) for m in magnitudes):
            raise ValueError(
                "the noise predictions of a whole batch are not finite (NaN or infinity): lower the learning rate, "
                "or train in a higher precision"
            )
        limits = self._limits(levels, conditional[0].numel())
        out: dict[int, LeftOut] = {}
        for number, (magnitude, timestep, limit) in enumerate(zip(magnitudes, levels, limits, strict=True)):
            reason = self._reason(magnitude, limit)
            if reason is not None:
                name = str(number) if names is None else names[number]
                out[number] = LeftOut(self._step, name, timestep, magnitude, limit, reason)
        if len(out) == len(magnitudes) and not self._may_empty:
            least = min((m, n) for n, m in enumerate(magnitudes) if math.isfinite(m))[1]
            del out[least]
            self.counts.kept_alone += 1
        self._remember(magnitudes, levels)
        self.counts.seen += len(magnitudes)
        self.counts.left_out += len(out)
        self.counts.not_finite += sum(record.reason == "not finite" for record in out.values())
        self.log += out.values()
        self._step += 1
        return torch.tensor([n not in out for n in range(len(magnitudes))], device=conditional.device)

    def sift(
        self,
        unet: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        empty: Tensor,
        conditional: Tensor,
        *others: Tensor,
        **more: Any,
    ) -> tuple[Tensor, ...]:
        """The samples that stay, of ``conditional`` and of all ``others`` [B, ...]: the one line of a training loop.

        ``unet(noisy, timesteps, rows, **more)`` is called once more, without gradients, with the rows of the empty
        prompt: ``empty`` [1 or B, N, D]. It may give a tensor, or an object with ``sample``.
        """
        unconditional = predict_unconditional(unet, noisy, timesteps, empty, **more)
        stay = self.keep(conditional, unconditional, timesteps)
        return tuple(values[stay] for values in (conditional, *others))

    def weights(
        self,
        unet: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        empty: Tensor,
        conditional: Tensor,
        **more: Any,
    ) -> Tensor:
        """As :meth:`sift`, for loops that weigh their samples: see :func:`weights_of`."""
        return weights_of(
            self.keep(conditional, predict_unconditional(unet, noisy, timesteps, empty, **more), timesteps)
        )

    def write_log(self, file: TextIO) -> None:
        """Moves what is logged to a file, one JSON object a line."""
        file.writelines(record.as_json() + "\n" for record in self.log)
        self.log.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, as plain numbers, lists and texts."""
        return {
            "step": self._step,
            "histories": [list(history) for history in self._histories],
            "counts": asdict(self.counts),
            "log": [asdict(record) for record in self.log],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of a filter with another number of noise levels."""
        if len(state["histories"]) != self.settings.filter_levels:
            raise ValueError(
                f"this state tells {len(state['histories'])} noise levels apart, this filter "
                f"{self.settings.filter_levels}: use the settings it was saved with"
            )
        self._step = state["step"]
        self._histories = [list(history) for history in state["histories"]]
        self.counts = Counts(**state["counts"])
        self.log = [LeftOut(**record) for record in state["log"]]

    def _level(self, timestep: int) -> int:
        return min(timestep * self.settings.filter_levels // self._diffusion_steps, self.settings.filter_levels - 1)

    def _limits(self, timesteps: Sequence[int], numel: int) -> list[float]:
        """The limit of each sample; infinite as long as its noise level warms up."""
        if self.settings.filter == "threshold":
            return [self.settings.filter_threshold * math.sqrt(numel / PUBLISHED_NUMEL)] * len(timesteps)
        by_level = {
            level: float(np.quantile(self._histories[level], self.settings.filter_quantile))
            for level in {self._level(t) for t in timesteps}
            if len(self._histories[level]) >= self.settings.filter_warm_up
        }
        return [by_level.get(self._level(t), math.inf) for t in timesteps]

    def _reason(self, magnitude: float, limit: float) -> Reason | None:
        if not math.isfinite(magnitude):
            return "not finite"
        if self.settings.filter == "threshold":
            return "at or above the threshold" if magnitude >= limit else None
        return "above the quantile" if magnitude > limit else None

    def _remember(self, magnitudes: Sequence[float], timesteps: Sequence[int]) -> None:
        """Left-out samples too, or the quantile would sink with what it removes.

        A magnitude of 0 is that of a sample whose caption was dropped for this step: it says nothing of captions.
        """
        if self.settings.filter == "quantile":
            for magnitude, timestep in zip(magnitudes, timesteps, strict=True):
                if math.isfinite(magnitude) and magnitude > 0:
                    history = self._histories[self._level(timestep)]
                    history.append(magnitude)
                    del history[: -self.settings.filter_history]


def weights_of(stay: Tensor) -> Tensor:
    """[B] of bool -> [B], fp32: B / kept and 0, under which the mean over a batch is that over what stays (0 if none)."""
    return stay.float() * (len(stay) / stay.sum().clamp_min(1))


@torch.no_grad()
def predict_unconditional(
    unet: Callable[..., Any], noisy: Tensor, timesteps: Tensor, empty: Tensor, **more: Any
) -> Tensor:
    """The model's output [B, C, H, W] for the empty prompt's rows [1 or B, N, D], without gradients."""
    rows = empty.expand(len(noisy), *empty.shape[1:])
    output = unet(noisy, timesteps, rows, **more)
    return output if isinstance(output, Tensor) else output.sample
