"""Detectors: one method a file; the folder is the register.

A module of this folder that scores prompts ends in ``DETECTORS``, a tuple of :class:`Detector`. A higher score means
more likely memorised. One that reads guidance's two predictions gives each of its scores a name, and by that name every
front end offers it: ``check``, the monitors, ``calibrate``, with p-values of its own. One that looks at prompts or at
finished images is for ``bench``.

Example, a whole new file ``detectors/widest.py``::

    from ..core.denoiser import Predictions
    from . import Detector
    from .magnitude import difference

    def read(predictions: Predictions) -> Tensor:
        return difference(predictions).abs().flatten(1).amax(1)

    DETECTORS = (Detector("widest", "the widest difference in one place", read=read, scores={"widest, first step": 1}),)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from torch import Tensor

from ..core.denoiser import Predictions

Needs = Literal["prompt", "predictions", "images"]
Read = Callable[[Predictions], Tensor]
"""Both predictions of one evaluation -> one number an image, [B], on their device and without waiting for it."""


@dataclass(frozen=True)
class Observed:
    """What one run showed of a prompt: the detector's ``readings`` [evaluations, images], images [images, 3, H, W] in 0..1."""

    prompt: str
    readings: Tensor | None = None
    images: Tensor | None = None


def _mean(observed: Observed) -> float:
    """Mean of the readings over the evaluations and images that were run."""
    if observed.readings is None:
        raise ValueError("this detector needs the readings of a run, none were given")
    return float(observed.readings.mean())


@dataclass(frozen=True)
class Detector:
    """``read`` and ``scores`` are of a detector that reads predictions: a score's name -> over how many first evaluations
    it averages (None: all), in the unit ``unit``.

    ``score`` rates what :class:`Observed` shows, for ``bench``, with each of ``images`` images.
    """

    name: str
    help: str
    needs: Needs = "predictions"
    score: Callable[[Observed], float] = _mean
    images: tuple[int, ...] = (1,)
    read: Read | None = None
    scores: Mapping[str, int | None] = field(default_factory=dict)
    unit: str = ""

    @property
    def evaluations(self) -> tuple[int | None, ...]:
        """For ``bench``: the numbers of evaluations to run; None for all."""
        return tuple(self.scores.values()) or (None,)


@dataclass(frozen=True)
class Score:
    """One way to score an image: the mean of what a detector reads at the first ``evaluations`` of a run (None: all)."""

    name: str
    detector: str
    read: Read
    evaluations: int | None
    unit: str

    @property
    def of_first_step(self) -> bool:
        """Whether the first evaluation alone decides, so that neither guidance nor the later steps matter."""
        return self.evaluations == 1


@cache
def available() -> dict[str, Detector]:
    """All detectors of this folder by name: the magnitude first, the others in the order of their files."""
    found: list[Detector] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "DETECTORS", ())
    return {detector.name: detector for detector in sorted(found, key=lambda detector: detector.name != "magnitude")}


@cache
def scores() -> dict[str, Score]:
    """All scores that can be read while a sampler runs, by name; 'first step' comes first.

    Raises ValueError where two detectors give one name.

    >>> scores()["first 5 steps"].detector, scores()["first 5 steps"].evaluations
    ('magnitude', 5)
    """
    found: dict[str, Score] = {}
    for detector in available().values():
        for name, evaluations in detector.scores.items() if detector.read is not None else ():
            if name in found:
                raise ValueError(f"two detectors call a score {name!r}: {found[name].detector} and {detector.name}")
            assert detector.read is not None
            found[name] = Score(name, detector.name, detector.read, evaluations, detector.unit)
    return found


def reads(*names: str) -> dict[str, Read]:
    """What the detectors behind these scores read, by detector; of all scores where none are named."""
    return {score.detector: score.read for score in scores().values() if not names or score.name in names}
