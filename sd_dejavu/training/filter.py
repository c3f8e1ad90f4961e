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
sqrt(abar_t) times that of the two outputs. For rectified flow x = (1 - sigma) x_0 + sigma eps and the
output is v = eps - x_0, so eps = x + (1 - sigma) v, and the factor is 1 - sigma (0 in pure noise). The
published training code is undefined for a batch that goes altogether: here the least memorised stays.

The pass without the prompt is a third of a step's work. Samples that have names are therefore measured at
every third of their showings, and what was found holds until the next. A sample whose caption was dropped
for this step is trained on by the very pass without a prompt: it is not measured, and always stays.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO, get_args

import numpy as np
import torch
from torch import Tensor

from ..core.denoiser import PredictionType
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
    filter_every: int = option(
        3,
        "measure a sample at every so many of its showings; what was found holds until it is measured again",
        minimum=1,
        maximum=1000,
        later=True,
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
    """One sample that was left out: ``magnitude`` and ``limit`` are L2 norms of this latent's own shape, as they were
    found at the step ``measured``."""

    step: int
    sample: str
    timestep: int
    magnitude: float
    limit: float
    reason: Reason
    measured: int

    def as_json(self) -> str:
        """One line; what is not finite becomes null, which every reader knows."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return json.dumps(values, ensure_ascii=False)


@dataclass(frozen=True)
class Finding:
    """The last of a sample: its magnitude against the limit at the step when it was measured."""

    step: int
    magnitude: float
    limit: float
    above: bool


@dataclass
class Sample:
    """How often a sample was shown with its caption, and its last finding as long as that leaves it out."""

    shown: int = 0
    finding: Finding | None = None


@dataclass
class Counts:
    """``measured`` counts the evaluations that the filter made, ``kept_alone`` the samples that stayed only because their
    whole batch would have gone."""

    seen: int = 0
    measured: int = 0
    left_out: int = 0
    not_finite: int = 0
    kept_alone: int = 0

    @property
    def kept_share(self) -> float:
        return 1 - self.left_out / self.seen if self.seen else float("nan")


class TrainingFilter:
    """Says for each batch which samples stay in the loss; ``counts`` and ``log`` say what did not, and why.

    ``prediction_type`` is the kind of the model's outputs; for 'v_prediction' ``alphas_cumprod`` [T] of the training
    schedule is needed. For 'flow' timesteps are 1000 sigma, whole or not, as trainers give them. The log grows until
    :meth:`write_log` takes it. A batch never goes altogether, unless it ``may_empty``: for trainers that weigh samples by
    0, whose loss is defined then too. Raises ValueError for settings that leave nothing out, and for other kinds of outputs.

    >>> found = TrainingFilter()  # 2 for latents of 4 x 64 x 64, so 2 * sqrt(16 / 16384) = 0.0625 for 16 numbers
    >>> with_prompt = torch.stack([torch.full((1, 4, 4), 0.01), torch.full((1, 4, 4), 0.02)])  # 4 * 0.01, 4 * 0.02
    >>> found.keep(with_prompt, lambda due: torch.zeros(len(due), 1, 4, 4), torch.tensor([500, 500]))
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
        if prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"the filter is made for {', '.join(get_args(PredictionType))} models, not for {prediction_type!r}"
            )
        if prediction_type == "v_prediction" and alphas_cumprod is None:
            raise ValueError("for a v_prediction model the filter needs alphas_cumprod of its noise schedule")
        if prediction_type == "flow" and alphas_cumprod is not None:
            raise ValueError("a flow model has no alphas_cumprod: leave them out, and give 1000 sigma as timesteps")
        self.settings, self._may_empty, self._prediction_type = settings, may_empty, prediction_type
        self._schedule = None if alphas_cumprod is None else Schedule(alphas_cumprod)
        self._diffusion_steps = DIFFUSION_STEPS if alphas_cumprod is None else len(alphas_cumprod)
        self._histories: list[list[float]] = [[] for _ in range(settings.filter_levels)]
        self._samples: dict[str, Sample] = {}
        self._step = 0
        self.counts = Counts()
        self.log: list[LeftOut] = []

    def magnitudes(self, conditional: Tensor, unconditional: Tensor, timesteps: Tensor) -> Tensor:
        """|| Delta ||_2 of the noise predictions in fp32, [B], from the outputs [B, C, H, W] with and without prompt."""
        found = magnitude_of_noise_predictions(conditional.detach(), unconditional.detach())
        if self._prediction_type == "flow":
            return found * (1 - timesteps.to(found) / DIFFUSION_STEPS)
        if self._prediction_type == "v_prediction":
            assert self._schedule is not None
            return found * self._schedule.scales(timesteps.to(found.device))[0]
        return found

    def keep(
        self,
        conditional: Tensor,
        without: Callable[[list[int]], Tensor],
        timesteps: Tensor,
        names: Sequence[str] | None = None,
        dropped: Sequence[bool] | None = None,
    ) -> Tensor:
        """Which samples stay in the loss, [B] of bool, on the device of the model's outputs.

        ``conditional`` [B, C, H, W] is the model's output with the prompt in any precision, ``without(numbers)`` shall
        give that without it for the samples of these numbers, and is called at most once; ``timesteps`` [B]. ``names``
        tell the samples apart from step to step; without them (their numbers in the batch then stand in the log) nothing
        holds beyond a step, and all are measured in each. ``dropped`` are those whose caption is empty in this step.
        Raises ValueError where the outputs of the whole batch are not finite, or the names are not as many.
        """
        steps = timesteps.tolist()
        if names is not None and len(names) != len(steps):
            raise ValueError(f"there are {len(names)} names for {len(steps)} samples: give one each, or none")
        called = [str(number) for number in range(len(steps))] if names is None else names
        empty = [False] * len(steps) if dropped is None else dropped
        sound = torch.isfinite(conditional.detach()).flatten(1).all(1).tolist()
        due = [
            number
            for number, name in enumerate(called)
            if sound[number] and not empty[number] and (names is None or self._turn(name))
        ]
        measured = {} if not due else self._measured(conditional[due], without(due), timesteps[due], due)
        for number, finding in measured.items():
            if not math.isfinite(finding.magnitude):
                sound[number] = False
            elif names is not None:
                self._samples[called[number]].finding = finding if finding.above else None
        if not any(sound):
            raise ValueError(
                "the noise predictions of a whole batch are not finite (NaN or infinity): lower the learning rate, "
                "or train in a higher precision"
            )
        out: dict[int, LeftOut] = {}
        for number, name in enumerate(called):
            reason: Reason = self._reason if sound[number] else "not finite"
            last: Finding | None = Finding(self._step, math.nan, math.nan, True)
            if sound[number]:
                held = self._samples[name].finding if name in self._samples else None
                last = None if empty[number] else measured.get(number, held)
            if last is not None and last.above:
                of_the_sample = (last.magnitude, last.limit, reason, last.step)
                out[number] = LeftOut(self._step, name, int(steps[number]), *of_the_sample)
        if len(out) == len(steps) and not self._may_empty:
            del out[min((record.magnitude, number) for number, record in out.items() if sound[number])[1]]
            self.counts.kept_alone += 1
        self.counts.seen += len(steps)
        self.counts.measured += len(due)
        self.counts.left_out += len(out)
        self.counts.not_finite += sum(record.reason == "not finite" for record in out.values())
        self.log += out.values()
        self._step += 1
        return torch.tensor([n not in out for n in range(len(steps))], device=conditional.device)

    def sift(
        self,
        unet: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        empty: Tensor,
        conditional: Tensor,
        *others: Tensor,
        names: Sequence[str] | None = None,
        rows: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, ...]:
        """The samples that stay, of ``conditional`` and of all ``others`` [B, ...]: the one line of a training loop.

        ``unet(noisy, timesteps, rows, **more)`` is called once more, without gradients, for the samples that are to be
        measured, with the rows of the empty prompt: ``empty`` [1 or B, N, D]. It may give a tensor, or an object with
        ``sample``. ``more`` is cut to those samples as ``noisy`` is. ``names`` and ``rows`` [B, N, D], those that the
        batch was predicted with, save evaluations: see :meth:`keep` and :func:`dropped_of`.
        """
        stay = self._stay(unet, noisy, timesteps, empty, conditional, names, rows, more)
        return tuple(values[stay] for values in (conditional, *others))

    def weights(
        self,
        unet: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        empty: Tensor,
        conditional: Tensor,
        names: Sequence[str] | None = None,
        rows: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """As :meth:`sift`, for loops that weigh their samples: see :func:`weights_of`."""
        return weights_of(self._stay(unet, noisy, timesteps, empty, conditional, names, rows, more))

    def _stay(
        self,
        unet: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        empty: Tensor,
        conditional: Tensor,
        names: Sequence[str] | None,
        rows: Tensor | None,
        more: dict[str, Any],
    ) -> Tensor:
        def without(due: list[int]) -> Tensor:
            return predict_unconditional(unet, noisy, timesteps, empty, due, **more)

        return self.keep(conditional, without, timesteps, names, None if rows is None else dropped_of(rows, empty))

    def write_log(self, file: TextIO) -> None:
        """Moves what is logged to a file, one JSON object a line."""
        file.writelines(record.as_json() + "\n" for record in self.log)
        self.log.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that decides what comes next, as plain numbers, lists and texts."""
        return {
            "step": self._step,
            "histories": [list(history) for history in self._histories],
            "samples": {name: [one.shown, one.finding and asdict(one.finding)] for name, one in self._samples.items()},
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
        self._samples = {
            name: Sample(shown, found and Finding(**found)) for name, (shown, found) in state["samples"].items()
        }
        self.counts = Counts(**state["counts"])
        self.log = [LeftOut(**record) for record in state["log"]]

    def _turn(self, name: str) -> bool:
        """Counts a showing of the sample, and says whether it is one to measure; which one it begins with, its name says."""
        sample = self._samples.setdefault(name, Sample())
        every = self.settings.filter_every
        due = (sample.shown + zlib.crc32(name.encode("utf-8", "surrogatepass"))) % every == 0
        sample.shown += 1
        return due

    def _measured(
        self, conditional: Tensor, unconditional: Tensor, timesteps: Tensor, due: Sequence[int]
    ) -> dict[int, Finding]:
        """What is found of the samples ``due``, by their numbers; the quantile learns of it afterwards."""
        magnitudes = self.magnitudes(conditional, unconditional, timesteps).tolist()
        levels = [self._level(t) for t in timesteps.tolist()]
        limits = self._limits(levels, conditional[0].numel())
        found = {
            number: Finding(self._step, magnitude, limit, self._is_above(magnitude, limit))
            for number, magnitude, limit in zip(due, magnitudes, limits, strict=True)
        }
        self._remember(magnitudes, levels)
        return found

    def _level(self, timestep: float) -> int:
        levels = self.settings.filter_levels
        return min(int(timestep * levels / self._diffusion_steps), levels - 1)

    def _limits(self, levels: Sequence[int], numel: int) -> list[float]:
        """The limit of each sample; infinite as long as its noise level warms up."""
        if self.settings.filter == "threshold":
            return [self.settings.filter_threshold * math.sqrt(numel / PUBLISHED_NUMEL)] * len(levels)
        by_level = {
            level: float(np.quantile(self._histories[level], self.settings.filter_quantile))
            for level in set(levels)
            if len(self._histories[level]) >= self.settings.filter_warm_up
        }
        return [by_level.get(level, math.inf) for level in levels]

    @property
    def _reason(self) -> Reason:
        return "at or above the threshold" if self.settings.filter == "threshold" else "above the quantile"

    def _is_above(self, magnitude: float, limit: float) -> bool:
        return magnitude >= limit if self.settings.filter == "threshold" else magnitude > limit

    def _remember(self, magnitudes: Sequence[float], levels: Sequence[int]) -> None:
        """Left-out samples too, or the quantile would sink with what it removes.

        A magnitude of 0 is that of a sample whose caption was dropped for this step: it says nothing of captions.
        """
        if self.settings.filter == "quantile":
            for magnitude, level in zip(magnitudes, levels, strict=True):
                if math.isfinite(magnitude) and magnitude > 0:
                    history = self._histories[level]
                    history.append(magnitude)
                    del history[: -self.settings.filter_history]


def weights_of(stay: Tensor) -> Tensor:
    """[B] of bool -> [B], fp32: B / kept and 0, under which the mean over a batch is that over what stays (0 if none)."""
    return stay.float() * (len(stay) / stay.sum().clamp_min(1))


def dropped_of(rows: Tensor, empty: Tensor) -> list[bool]:
    """Whose rows [B, N, D] are those of the empty prompt, [1 or B, N, D]: the pass that is trained on is theirs without
    a prompt, and there is none to compare it with. Rows of another number are those of no empty prompt.

    >>> dropped_of(torch.tensor([[[1.0]], [[0.0]]]), torch.zeros(1, 1, 1))
    [False, True]
    """
    if rows.shape[1:] != empty.shape[1:]:
        return [False] * len(rows)
    found: list[bool] = (rows.detach() == empty.to(rows)).flatten(1).all(1).tolist()
    return found


@torch.no_grad()
def predict_unconditional(
    unet: Callable[..., Any], noisy: Tensor, timesteps: Tensor, empty: Tensor, due: Sequence[int], **more: Any
) -> Tensor:
    """The model's output [due, C, H, W] for the empty prompt's rows [1 or B, N, D], without gradients, of those samples
    of the batch whose numbers are ``due``."""
    rows = empty.expand(len(noisy), *empty.shape[1:])
    cut = {name: _of_samples(value, due, len(noisy)) for name, value in more.items()}
    output = unet(noisy[due], timesteps[due], rows[due], **cut)
    return output if isinstance(output, Tensor) else output.sample


def _of_samples(value: Any, due: Sequence[int], batch: int) -> Any:
    """What a model is given beside its inputs, for some samples of the batch: tensors [B, ...], also within dicts."""
    if isinstance(value, Mapping):
        return {name: _of_samples(held, due, batch) for name, held in value.items()}
    return value[list(due)] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch else value
