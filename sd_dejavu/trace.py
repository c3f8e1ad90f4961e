"""The trace of one sampling run: what guidance's two predictions told at each model evaluation.

Values stay on the device while the sampler runs, nothing waits for them; they are read once,
afterwards. A reading that is missing or cannot be true is 'not measured' with its reason, never a
score: guidance skipped by the host looks like two equal predictions, and a broken model like NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .conditioning import Unconditional
from .denoiser import Predictions
from .detectors.magnitude import magnitude, squared_difference_map

Unit = Literal["l2", "rms"]
MAP_SIDE_LIMIT = 256


@dataclass(frozen=True)
class Reading:
    """One evaluation: the noise level, and the L2 magnitude of each image or why it was not measured."""

    sigma: float
    values: tuple[float, ...] | None
    why: str | None = None


class NotMeasured(ValueError):
    """There is no reading to make a score from; the text says why."""


class Trace:
    """Collects one run. ``record`` in the sampling loop, everything else afterwards."""

    def __init__(self) -> None:
        self.without: Unconditional | None = None
        self.elements: int | None = None
        self._entries: list[tuple[Tensor | float, Tensor | None, str | None]] = []
        self._map: Tensor | None = None
        self._readings: list[Reading] | None = None

    def record(self, predictions: Predictions) -> None:
        """Take one guidance step in. Launches a few small operations, waits for none of them."""
        if self.without not in (None, predictions.without):
            self.skip(predictions.sigma[0], f"this step was measured against the {predictions.without}")
            return
        self.without = predictions.without
        self.elements = predictions.conditional[0].numel()
        with torch.no_grad():
            self._map = squared_difference_map(predictions)
            self._entries.append((predictions.sigma[0].detach(), magnitude(predictions).detach(), None))
        self._readings = None

    def skip(self, sigma: Tensor | float, why: str) -> None:
        """Note that an evaluation gave no reading."""
        self._entries.append((sigma, None, why))
        self._readings = None

    def of_images(self, start: int, stop: int) -> Trace:
        """The same run seen for images ``start`` to ``stop`` only, where several prompts shared a batch."""
        part = Trace()
        part.without, part.elements = self.without, self.elements
        part._entries = [(s, None if v is None else v[start:stop], why) for s, v, why in self._entries]
        part._map = None if self._map is None else self._map[start:stop]
        return part

    @property
    def readings(self) -> list[Reading]:
        """All evaluations in order, read from the device once."""
        if self._readings is None:
            self._readings = [_read(*entry) for entry in self._entries]
        return self._readings

    def where(self) -> Tensor:
        """Squared-difference map [B, H, W] of the last evaluation that was recorded, on the CPU."""
        if self._map is None:
            raise NotMeasured("no guidance step was recorded")
        return self._map.float().cpu()

    def per_step(self, unit: Unit = "l2") -> list[tuple[float, ...] | None]:
        """Magnitudes of each evaluation, one number an image; None where not measured."""
        return [r.values and tuple(v * self._factor(unit) for v in r.values) for r in self.readings]

    def score(self, first: int | None = 1, unit: Unit = "l2") -> Tensor:
        """Mean magnitude [B] over the first ``first`` evaluations, or over all of them with None.

        Raises NotMeasured when any evaluation of that range has no reading: a mean over other steps
        would be another quantity.
        """
        chosen = self.readings[:first]
        if not chosen or (first is not None and len(chosen) < first):
            raise NotMeasured(f"{len(self.readings)} evaluations were seen, {first or 'at least 1'} are needed")
        return torch.tensor([self.reading(number) for number in range(len(chosen))]).mean(0) * self._factor(unit)

    def reading(self, number: int) -> tuple[float, ...]:
        """L2 magnitude of each image at evaluation ``number`` (from 0). Raises NotMeasured with the reason."""
        reading = self.readings[number]
        if reading.values is None:
            raise NotMeasured(f"evaluation {number + 1} (sigma {reading.sigma:.4g}) was not measured: {reading.why}")
        return reading.values

    def _factor(self, unit: Unit) -> float:
        if unit == "l2":
            return 1.0
        if unit == "rms":
            return (self.elements or 1) ** -0.5
        raise ValueError(f"unit {unit!r} is unknown: use 'l2' (as in the paper) or 'rms' (comparable across sizes)")


def _read(sigma: Tensor | float, values: Tensor | None, why: str | None) -> Reading:
    level = float(sigma)
    if values is None:
        return Reading(level, None, why)
    numbers = tuple(values.float().cpu().tolist())
    if not all(torch.isfinite(values.cpu())):
        return Reading(level, None, "the model's predictions are not finite (NaN or infinity)")
    if any(v == 0 for v in numbers):
        return Reading(level, None, "both predictions are equal: guidance was skipped, or the prompt is empty")
    return Reading(level, numbers)
