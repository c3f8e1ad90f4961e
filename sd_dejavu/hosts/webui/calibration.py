"""Calibrating in Automatic1111 and Forge: a run that ends when ordinary prompts have been measured at its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from ...calibration import store
from ...calibration.calibrate import calibrate
from ...calibration.ordinary_prompts import general_prompts
from ...calibration.profile import Ordinary, Profile
from ...calibration.recombined import recombined
from ...core.conditioning import Baseline
from ...core.settings import Checked, option, options_of
from ...run.measure import Measurement, setting_of
from .guidance import GuidedModel
from .hosted import Before
from .run import Host

PIXELS_PER_LATENT = 8
BATCH = 8  # prompts in one evaluation

_STEPS = next(known for known in options_of(Measurement) if known.name == "steps")


@dataclass(frozen=True)
class Calibrating(Checked):
    """What is calibrated for; the checkpoint is the loaded one."""

    count: int = option(1000, "ordinary prompts", minimum=20, maximum=100_000)
    width: int = option(512, "width that is drawn, in pixels", minimum=64, maximum=2048)
    height: int = option(512, "height that is drawn, in pixels", minimum=64, maximum=2048)
    steps: int = option(20, _STEPS.help, minimum=_STEPS.minimum, maximum=_STEPS.maximum)
    sampler_name: str = option("Euler", "the host's sampler")
    scheduler: str = option("Automatic", "its scheduler")
    negative_prompt: str = option("", "negative prompt that is drawn with")
    replace: bool = option(False, "also replace a calibration that holds more than the new one")
    baseline: Baseline = option(
        "empty prompt", "what prompts are measured against", choices=get_args(Baseline), former="without"
    )
    like: str = option("", "prompts like those to be judged, one a line; ordinary ones are recombined from their words")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.width, self.height)


def check_size(width: int, height: int) -> None:
    """Raises ValueError where an image has no whole number of latent cells."""
    for name, value in (("width", width), ("height", height)):
        if value % PIXELS_PER_LATENT:
            raise ValueError(f"{name} must be a multiple of {PIXELS_PER_LATENT}, not {value}")


class Calibration:
    """A run that is made only to measure ordinary prompts at its first evaluation, and then ends."""

    def __init__(self, host: Host, asked: Calibrating, folder: Path, on_prompt: Callable[[int], None]) -> None:
        """``folder`` holds the calibrations; ``on_prompt`` is told how many prompts are measured."""
        self.host, self.asked = host, asked
        self.profile: Profile | None = None
        self.fault: Exception | None = None
        self._folder, self._on_prompt = folder, on_prompt

    def before(self, params: Before) -> None:
        from modules import shared

        asked = self.asked
        try:
            step = self.host.step(params).of([0])
            sigma = float(self.host.sigma(step)[0])
            model = GuidedModel(self.host, step, [sigma] + [0.0] * asked.steps)
            against_negative = asked.baseline == "negative prompt" and asked.negative_prompt.strip()
            wanted = Measurement(
                images=1,
                steps=asked.steps,
                negative=asked.negative_prompt,
                baseline="negative prompt" if against_negative else "empty prompt",
            )
            if not asked.replace:
                path = store.path_for(setting_of(model, wanted), self._folder)
                store.check_kept(path, store.Size(asked.count))
            given = [line for line in asked.like.splitlines() if line.strip()]
            ordinary: Ordinary = "recombined" if given else "generated"
            prompts = recombined(given, asked.count) if given else general_prompts(asked.count)
            done = iter(range(1, asked.count + 1))
            with torch.no_grad():
                self.profile = calibrate(
                    model, prompts, wanted, 0, BATCH, lambda stage: self._on_prompt(next(done)), ordinary=ordinary
                )
        except Exception as error:
            self.fault = error
        finally:
            shared.state.interrupt()

    def kept(self) -> tuple[Profile, Path]:
        """The profile, and where it is kept. Raises ValueError where nothing was measured, or more would be lost."""
        if isinstance(self.fault, store.HoldsMore):
            raise self.fault
        if self.profile is None:
            raise ValueError(f"nothing was measured: {self.fault or 'it was stopped'}")
        path = store.path_for(self.profile.setting, self._folder)
        store.keep(self.profile, path, self.asked.replace)
        return self.profile, path
