"""Detectors: one method a file; the folder is the register.

A module of this folder that scores prompts ends in ``DETECTORS``, a tuple of :class:`Detector`. A higher
score means more likely memorised.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Needs = Literal["prompt", "steps", "pictures"]


@dataclass(frozen=True)
class Observed:
    """What one run showed of a prompt: magnitudes [steps, images], and pictures [images, 3, H, W] in 0..1."""

    prompt: str
    magnitudes: Tensor | None = None
    pictures: Tensor | None = None


@dataclass(frozen=True)
class Detector:
    """``needs`` says what must be run before ``score``; ``steps`` is None where all steps are wanted."""

    name: str
    help: str
    needs: Needs
    score: Callable[[Observed], float]
    steps: tuple[int | None, ...] = (None,)
    images: tuple[int, ...] = (1,)


def available() -> dict[str, Detector]:
    """All detectors of this folder by name, in the order of their files."""
    found: dict[str, Detector] = {}
    for module in pkgutil.iter_modules(__path__):
        for detector in getattr(importlib.import_module(f"{__name__}.{module.name}"), "DETECTORS", ()):
            found[detector.name] = detector
    return found
