"""The trace of one sampling run: what guidance's two predictions told at each model evaluation.

Nothing in the sampling loop waits for the device: each evaluation launches a few small operations, their results are
copied to the CPU together when somebody wants to know, and only who asks for a reading waits for that copy. A reading
that is missing or cannot be true is 'not measured' with its reason, never a score: guidance skipped by the host looks
like two equal predictions, and a broken model like NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..detectors import Read
from ..detectors.magnitude import difference, length, over_channels, rounding
from .conditioning import Unconditional
from .denoiser import Predictions
from .readout import Readout

ALL = slice(None)
MAGNITUDE = "magnitude"  # the detector that every trace reads


@dataclass(frozen=True)
class Reading:
    """One evaluation: the noise level, and the L2 magnitude of each image or why it was not measured.

    ``others`` holds what other detectors read of each image, by detector.
    """

    sigma: float
    values: tuple[float, ...] | None
    why: str | None = None
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, detector: str) -> tuple[float, ...] | None:
        return self.values if detector == MAGNITUDE else self.others.get(detector)


class NotMeasured(ValueError):
    """There is no reading to make a score from; the text says why."""


class _Evaluation:
    """One evaluation on the device: its noise level, and what detectors read [B] of ``elements``, or why nothing."""

    def __init__(self, sigma: Tensor, read: Mapping[str, Tensor], why: str | None = None, elements: int = 1) -> None:
        self._sigma, self._read, self._why = sigma.detach(), read, why
        self._elements = elements
        self._readout: Readout | None = None
        self._place = 0  # where its numbers begin among those that were read with them

    @staticmethod
    def start(evaluations: Sequence[_Evaluation]) -> None:
        """Begin to read those of which this was not done; one copy for all of them."""
        waiting = [e for e in evaluations if e._readout is None]
        for device in {e._sigma.device for e in waiting}:
            together = [e for e in waiting if e._sigma.device == device]
            numbers = [part for e in together for part in e._numbers()]
            readout, place = Readout(torch.cat(numbers)), 0
            for each in together:
                each._readout, each._place = readout, place
                place += sum(part.numel() for part in each._numbers())

    def _numbers(self) -> list[Tensor]:
        return [self._sigma.reshape(1).float(), *self._read.values()]

    def ready(self) -> bool:
        return self._readout is not None and self._readout.ready()

    def reading(self, images: slice) -> Reading:
        """Of these images. Waits for the numbers; reading them must have begun."""
        assert self._readout is not None
        count = sum(part.numel() for part in self._numbers())
        level, *numbers = self._readout.wait()[self._place : self._place + count].tolist()
        if not self._read:
            return Reading(level, None, self._why)
        batch = len(numbers) // len(self._read)
        others = {name: tuple(numbers[n * batch :][:batch][images]) for n, name in enumerate(self._read)}
        values = others.pop(MAGNITUDE)
        if not all(map(math.isfinite, values)):
            return Reading(level, None, "the model's predictions are not finite (NaN or infinity)")
        if min(values) <= rounding(self._elements, level):
            return Reading(level, None, "both predictions are equal: guidance was skipped, or the prompt is empty")
        return Reading(level, values, others=others)


class _Map:
    """Where the prompt acted at one evaluation: worked out when it is first asked for, since most never are."""

    def __init__(self, difference: Tensor) -> None:
        """From Delta [B, C, H, W], which is kept until then."""
        self._difference: Tensor | None = difference
        self._found: Readout | None = None

    def start(self) -> Readout:
        """Launches the work, once."""
        if self._found is None:
            assert self._difference is not None
            with torch.no_grad():
                self._found = Readout(over_channels(self._difference))
            self._difference = None
        return self._found


class Trace:
    """Collects one run. ``record`` in the sampling loop, everything else whenever it is wanted.

    The magnitude is read at every evaluation, and what ``others`` read, by detector, beside it.
    """

    def __init__(self, others: Mapping[str, Read] | None = None) -> None:
        self._others = {name: read for name, read in (others or {}).items() if name != MAGNITUDE}
        self.baseline: Unconditional | None = None
        self._evaluations: list[_Evaluation] = []
        self._readings: list[Reading] = []  # of the first evaluations: those that were asked for
        self._map: _Map | None = None
        self._images = slice(0, None)

    def __len__(self) -> int:
        """How many evaluations were seen, measured or not."""
        return len(self._evaluations)

    def record(self, predictions: Predictions) -> None:
        """Take one guidance step in. Launches a few small operations, waits for none of them."""
        if self.baseline not in (None, predictions.baseline):
            self.skip(predictions.sigma[0], f"this step was measured against the {predictions.baseline}")
            return
        self.baseline = predictions.baseline
        with torch.no_grad():
            delta = difference(predictions)
            read = {MAGNITUDE: length(delta), **{name: one(predictions) for name, one in self._others.items()}}
            self._evaluations.append(_Evaluation(predictions.sigma[0], read, elements=delta[0].numel()))
            self._map = _Map(delta)

    def skip(self, sigma: Tensor | float, why: str) -> None:
        """Note that an evaluation gave no reading. Waits for nothing either."""
        self._evaluations.append(_Evaluation(torch.as_tensor(sigma), {}, why))

    def of_images(self, start: int, stop: int) -> Trace:
        """The same run seen for images ``start`` to ``stop`` only, where several prompts shared a batch."""
        part = self._copy()
        part._images = slice(self._images.start + start, self._images.start + stop)
        part._readings = []
        return part

    def first(self, evaluations: int) -> Trace:
        """The run's first ``evaluations`` only: to judge them without waiting for what came after."""
        part = self._copy()
        del part._evaluations[evaluations:], part._readings[evaluations:]
        return part

    def so_far(self) -> Trace:
        """The trace as it stands, for another thread: it does not grow, and all of it is on its way to the CPU."""
        self.settle()
        return self._copy()

    def settle(self) -> None:
        """Begin to read all that was recorded, and keep nothing else on the device. Waits for nothing."""
        _Evaluation.start(self._evaluations)
        if self._map is not None:
            self._map.start()

    def ready(self, evaluations: int) -> bool:
        """Whether the first ``evaluations`` can be told without waiting for the device; begins to read them."""
        wanted = self._evaluations[:evaluations]
        _Evaluation.start(wanted)
        return all(evaluation.ready() for evaluation in wanted)

    def _copy(self) -> Trace:
        other = Trace(self._others)
        other.baseline = self.baseline
        other._evaluations, other._readings = list(self._evaluations), list(self._readings)
        other._map, other._images = self._map, self._images
        return other

    def _read(self, count: int | None = None) -> list[Reading]:
        """The first ``count`` evaluations, or all."""
        unread = self._evaluations[len(self._readings) : count]
        _Evaluation.start(unread)
        self._readings += [evaluation.reading(self._images) for evaluation in unread]
        return self._readings[:count]

    @property
    def readings(self) -> list[Reading]:
        """All evaluations in order; waits for those that are still on their way."""
        return self._read()

    def where(self) -> Tensor:
        """Squared-difference map [B, H, W] of the last evaluation that was recorded, on the CPU."""
        if self._map is None:
            raise NotMeasured("no guidance step was recorded")
        return self._map.start().wait()[self._images].float()

    def score(self, first: int | None = 1, detector: str = MAGNITUDE) -> Tensor:
        """Mean of what a detector read of each image, [B], over the first ``first`` evaluations, or all with None.

        Raises NotMeasured when any evaluation of that range has no reading: a mean over other steps
        would be another quantity.
        """
        chosen = self._read(first)
        if not chosen or (first is not None and len(chosen) < first):
            raise NotMeasured(f"{len(chosen)} evaluations were seen, {first or 'at least 1'} are needed")
        return torch.tensor([self.reading(number, detector) for number in range(len(chosen))]).mean(0)

    def reading(self, number: int, detector: str = MAGNITUDE) -> tuple[float, ...]:
        """What a detector read of each image at evaluation ``number`` (from 0). Raises NotMeasured with the reason."""
        reading = self._read(number + 1)[number]
        values, why = reading.of(detector), reading.why
        if values is not None and not all(map(math.isfinite, values)):
            values, why = None, f"the {detector} is not finite (NaN or infinity)"
        if values is None:
            raise NotMeasured(f"evaluation {number + 1} (sigma {reading.sigma:.4g}) was not measured: {why}")
        return values
