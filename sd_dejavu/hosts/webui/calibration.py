"""Calibrating in Automatic1111 and Forge, in runs of the host's own: ordinary prompts at the first step of one that ends
there, and as whole runs, one after another, where a score needs them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ...calibration import store
from ...calibration.calibrate import calibrate, with_whole_runs
from ...calibration.first_step import seed_of
from ...calibration.ordinary_prompts import general_prompts
from ...calibration.profile import Null, Ordinary, Profile, Setting
from ...calibration.recombined import recombined
from ...core.conditioning import Baseline, Conditioning
from ...core.settings import Checked, option, options_of
from ...core.trace import Trace
from ...detectors import scores
from ...run.judge import needed_nulls
from ...run.measure import Measurement, setting_of
from ...run.monitoring import Monitoring
from .guidance import GuidedModel
from .hosted import Before, Options, Processing
from .run import Host, Run

PIXELS_PER_LATENT = 8
BATCH = 8  # prompts in one evaluation
QUICK, THOROUGH = 100, 1000  # ordinary prompts that the page offers
WHOLE_RUNS = "all steps"  # a score that reads every evaluation

_MEASUREMENT = {known.name: known for known in options_of(Measurement)}
_STEPS, _SCALE = _MEASUREMENT["steps"], _MEASUREMENT["guidance_scale"]
_NETWORK = re.compile(r"<\w+:[^<>]+>")


@dataclass(frozen=True)
class Calibrating(Checked):
    """What is calibrated for; the checkpoint is the loaded one."""

    count: int = option(THOROUGH, "ordinary prompts", minimum=20, maximum=100_000)
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
    whole_runs: int = option(
        0,
        "of the ordinary prompts, how many are sampled to the end as well: what scores of more than the first step need",
        minimum=0,
        maximum=100_000,
    )
    guidance_scale: float = option(7.0, _SCALE.help, minimum=_SCALE.minimum, maximum=_SCALE.maximum)
    networks: str = option("", "LoRAs that are drawn with, as a prompt names them: <lora:name:1>")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.width, self.height)
        if self.whole_runs > self.count:
            raise ValueError(f"whole runs must be at most the {self.count:,} of count, not {self.whole_runs:,}")
        if networks_of(self.networks) != self.networks.strip():
            raise ValueError(f"networks must be like '<lora:name:1>', one after another, not {self.networks!r:.60}")

    @property
    def size(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def images(self) -> int:
        """How many images take about as long: one has two predictions a step, an ordinary prompt's first step one."""
        return max(1, round(self.count / (2 * self.steps))) + self.whole_runs

    def enough_for(self, score: str, alpha: float, batch: int = 1) -> Calibrating:
        """The same, with as many ordinary prompts, and as whole runs, as it takes to flag a batch by this score."""
        needed = min(100_000, math.ceil(needed_nulls(alpha, batch) / QUICK) * QUICK)
        count = max(self.count, needed)
        return replace(self, count=count, whole_runs=self.whole_runs if scores()[score].of_first_step else count)


def networks_of(prompt: str) -> str:
    """The LoRAs and other networks that a prompt names for the host, without its words.

    >>> networks_of("a red <lora:style:0.8> fox <hypernet:x:1>")
    '<lora:style:0.8> <hypernet:x:1>'
    """
    return " ".join(_NETWORK.findall(prompt))


def check_size(width: int, height: int) -> None:
    """Raises ValueError where an image has no whole number of latent cells."""
    for name, value in (("width", width), ("height", height)):
        if value % PIXELS_PER_LATENT:
            raise ValueError(f"{name} must be a multiple of {PIXELS_PER_LATENT}, not {value}")


class _Model(GuidedModel):
    """The model of a run; the text encoder is where the LoRAs act on it."""

    def encode(self, prompt: str) -> Conditioning:
        self.host.load_encoders(self.step)
        return super().encode(prompt)


class Calibration:
    """Measures ordinary prompts at the first evaluation of a run that is made only for that, and ends it."""

    def __init__(self, host: Host, asked: Calibrating, folder: Path, on_prompt: Callable[[int], None]) -> None:
        """``folder`` holds the calibrations; ``on_prompt`` is told how many prompts are measured."""
        self.host, self.asked = host, asked
        self.profile: Profile | None = None
        self.fault: Exception | None = None
        self._folder, self._on_prompt = folder, on_prompt

    def prompts(self) -> tuple[list[str], Ordinary]:
        """The ordinary prompts, and of which kind they are."""
        given = [line for line in self.asked.like.splitlines() if line.strip()]
        if given:
            return recombined(given, self.asked.count), "recombined"
        return general_prompts(self.asked.count), "generated"

    def before(self, params: Before) -> None:
        from modules import shared

        asked = self.asked
        try:
            step = self.host.step(params).of([0])
            sigma = float(self.host.sigma(step)[0])
            model = (_Model if asked.networks else GuidedModel)(self.host, step, [sigma] + [0.0] * asked.steps)
            against_negative = asked.baseline == "negative prompt" and asked.negative_prompt.strip()
            wanted = Measurement(
                images=1,
                steps=asked.steps,
                guidance_scale=asked.guidance_scale,
                negative=asked.negative_prompt,
                baseline="negative prompt" if against_negative else "empty prompt",
            )
            setting = replace(setting_of(model, wanted), sampler=asked.sampler_name)
            path = store.path_for(setting, self._folder)
            prompts, ordinary = self.prompts()
            self.profile = self._to_go_on_with(setting, ordinary)
            if not asked.replace:
                count = asked.count if self.profile is None else len(self.profile.nulls)
                store.check_kept(path, store.Size(count, asked.whole_runs))
            if self.profile is not None:
                return
            done = iter(range(1, asked.count + 1))
            with torch.no_grad():
                made = calibrate(
                    model, prompts, wanted, 0, BATCH, lambda stage: self._on_prompt(next(done)), ordinary=ordinary
                )
            self.profile = replace(made, setting=setting)
        except Exception as error:
            self.fault = error
        finally:
            shared.state.interrupt()

    def _to_go_on_with(self, setting: Setting, ordinary: Ordinary) -> Profile | None:
        """Where only whole runs are missing, the first steps that are kept, if they are of the same ordinary prompts."""
        if not self.asked.whole_runs or self.asked.replace or ordinary != "generated":
            return None
        kept = store.find(setting, "first step", folder=self._folder)
        if kept is None or kept.ordinary != ordinary or len(kept.nulls) < self.asked.count:
            return None
        known = scores()
        nulls = [
            Null(
                null.style, {name: v for name, v in null.scores.items() if name in known and known[name].of_first_step}
            )
            for null in kept.nulls
        ]
        return Profile(setting, tuple(nulls), ordinary=ordinary)

    def add_whole_runs(self, traces: Sequence[Trace]) -> None:
        """Those of the first ordinary prompts, in their order. Raises ValueError where they cannot be compared."""
        if not all(trace.readings for trace in traces):
            raise ValueError("no evaluation of these runs could be read: the host's log says why")
        self.profile = with_whole_runs(self.made(), traces)

    def made(self) -> Profile:
        """Raises ValueError where nothing was measured."""
        if isinstance(self.fault, store.HoldsMore):
            raise self.fault
        if self.profile is None:
            raise ValueError(f"nothing was measured: {self.fault or 'it was stopped'}")
        return self.profile

    def kept(self) -> tuple[Profile, Path]:
        """The profile, and where it is kept. Raises ValueError where nothing was measured, or more would be lost."""
        profile = self.made()
        path = store.path_for(profile.setting, self._folder)
        store.keep(profile, path, self.asked.replace)
        return profile, path


# ------------------------------------------------------------------------------------------ runs


def processing_of(asked: Calibrating, prompts: Sequence[str], overrides: Options | None = None) -> Processing:
    """The host's own object for a run of so many ordinary prompts, one after another; nothing of it is saved.

    ``overrides`` are settings of the host's that hold for this run.
    """
    from modules import processing, shared

    p: Processing = processing.StableDiffusionProcessingTxt2Img(
        prompt=[f"{prompt} {asked.networks}".strip() for prompt in prompts],
        negative_prompt=asked.negative_prompt,
        seed=[seed_of(number) for number in range(len(prompts))],
        subseed=[0] * len(prompts),
        n_iter=len(prompts),
        steps=asked.steps,
        cfg_scale=asked.guidance_scale,
        width=asked.width,
        height=asked.height,
        sampler_name=asked.sampler_name,
        scheduler=asked.scheduler,
        restore_faces=False,
        do_not_save_samples=True,
        do_not_save_grid=True,
        override_settings=dict(overrides or {}),
    )
    p.sd_model = shared.sd_model  # which waits where the host, just started, is still loading it
    if asked.networks:
        # With what was encoded before, the host would not bring the text encoder to where the LoRA acts on it.
        p.cached_c, p.cached_uc = [None, None, None], [None, None, None]
    return p


def watching(host: Host, asked: Calibrating, folder: Path) -> Run:
    """What measures every evaluation of whole runs, for all scores, as runs of a user's are measured."""
    monitoring = Monitoring(baseline=asked.baseline, explain="never", score=WHOLE_RUNS)
    return Run(host, monitoring, folder, every_score=True)


def read(p: Processing, run: Run, begun: Callable[[], None], on_run: Callable[[int], None]) -> list[Trace]:
    """The traces of the samplings of ``p``, each watched by ``run``, which come in as it is drawn; no image is decoded.

    ``begun`` is called where the host has prepared a sampling, ``on_run`` is told how many are over.
    """
    from modules import processing, scripts

    traces: list[Trace] = []

    class Reading(scripts.ScriptRunner):
        """Runs no script, and is told what scripts are."""

        def process_before_every_sampling(self, p: Processing, **named: object) -> None:
            run.begin(p, from_image=False)
            begun()

        def post_sample(self, p: Processing, sampled: Any) -> None:
            run.end()
            traces.extend(state.trace for known in run.passes for state in known.states)
            run.forget()
            sampled.samples = processing.DecodedSamples(torch.zeros(3, 8, 8) for _ in sampled.samples)
            on_run(len(traces))

    p.scripts = Reading()
    return traces
