"""A monitor that watches every run of the host's samplers, through wrappers on a clone of the model.

Each run has a controller of its own, whose host is :class:`Run`. The sampling loop never waits for the device on our
account, with these exceptions: 'stop' and 'mitigate' need the first step's score before the second step, and a
conditioning with a range of steps is compared with the noise level, which the host itself reads at that very place.
What is explained because it was flagged is explained as soon as the score has arrived, in a later step on a fast card,
from what was kept of the first.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ...calibration import store
from ...calibration.profile import Profile, Setting
from ...core.attention import AttentionRule
from ...core.conditioning import Conditioning, Unconditional
from ...core.denoiser import Evaluation
from ...core.readout import Readout
from ...run.controller import GO, Again, Decision, Restart, RunController, Stop
from ...run.judge import needed_nulls
from ...run.monitoring import Monitoring
from ...run.report import Report
from ...run.state import RunState
from . import graph
from .api import CLIP, Entry, Executor, GuidanceArguments, Guider, ModelPatcher, Options
from .attention import attending
from .evaluation import covers, guided_step, level_of, negative_of, unconditional_of
from .model import ComfyModel, as_host, as_images, fingerprint, ordinary_for, remember_beginning, why_no_images
from .run_options import AGAIN, forget_steps, in_guidance
from .setting import kind_of, negative_name, profile_for, setting_of
from .text import SOURCE, Source, conditioning_of, empty_prompt

KEY = "dejavu"
RUNS_KEPT = 8
INTERRUPTION = comfy.model_management.InterruptProcessingException


class Stopped(RuntimeError):
    """The monitor was told to end flagged runs, and this one was flagged."""


class OtherNoise(Exception):
    """A mitigation has changed the noise that the run began with: it begins again, ``moved`` away in the model's scale."""

    def __init__(self, moved: Tensor) -> None:
        super().__init__("this run begins again from other noise")
        self.moved = moved


# ---------------------------------------------------------------------------------------- monitor


class Output:
    """What a run gave, told apart from what others gave by the bytes of each image, as they are between two nodes."""

    def __init__(self, samples: Tensor) -> None:
        """From the host's latents [B, ...], on any device. Waits for nothing."""
        dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
        self._samples: Readout | None = Readout(samples.detach().to(dtype).float())
        self._images: tuple[bytes, ...] = ()

    @property
    def images(self) -> tuple[bytes, ...]:
        """A digest of each image. Waits for the samples."""
        if self._samples is not None:
            values = self._samples.wait().contiguous()
            self._images = tuple(hashlib.sha256(one.numpy().tobytes()).digest() for one in values)
            self._samples = None
        return self._images

    def places_of(self, other: Output) -> tuple[int, ...] | None:
        """Where each image of the other is among these; None where one of them is not."""
        if other.images == self.images:
            return tuple(range(len(self.images)))
        if not other.images or not set(other.images) <= set(self.images):
            return None
        return tuple(self.images.index(image) for image in other.images)


class Run:
    """One run of a sampler under a monitor: the host of its controller."""

    interruptions = (INTERRUPTION, Stopped, OtherNoise)

    def __init__(self, monitor: Monitor, guider: Guider, noise: Tensor, from_image: Readout, sampler: str) -> None:
        self._monitor, self._guider, self._from_image, self.sampler = monitor, guider, from_image, sampler
        self.place = graph.place()  # the execution, and the sampler's node
        self.number = uuid.uuid4().hex
        self.output: Output | None = None
        self.evaluations = 0  # of the host
        self.state = RunState(monitor.monitoring, every_score=monitor.every_score)
        self.controller: RunController[ComfyModel] = RunController(
            self,
            monitor.monitoring,
            [self.state],
            explains_later=True,
            ordinary=lambda model, count: ordinary_for(self._guider.model_patcher, count),
            keep=monitor.keep,
        )
        self.sigmas: Readout | None = None
        self._no_images = why_no_images(noise)
        self._level: float | None = None  # of this evaluation's noise, where a conditioning has a range
        self._given: list[Entry] = []  # the host's conditioning at the first evaluation
        self._kind: Unconditional | None = None  # what the host's negative conditioning was found to be
        self._attention: AttentionRule | None = None
        self._cond: Tensor | None = None  # what guidance gave at this evaluation
        self._uncond: Tensor | None = None
        self._x: Tensor | None = None  # of this evaluation, as the host has it
        self._options: Options = {}

    # ----------------------------------------------------------------- as the controller's host

    def model(self, state: RunState) -> ComfyModel:
        assert self.sigmas is not None and self._x is not None
        entry, sigmas = self._positive[0], self.sigmas.wait().tolist()
        found = ComfyModel(self._guider.model_patcher, self._guider.inner_model, entry, self._options, sigmas, self._x)
        found.clip = found.clip or self._monitor.clip
        return found

    def prompt(self, state: RunState, model: ComfyModel) -> Conditioning:
        return model.of_the_host(self._positive)

    def unconditional(
        self, state: RunState, model: ComfyModel, empty: bool
    ) -> tuple[Conditioning, Unconditional] | None:
        if empty:
            return None if model.clip is None else (empty_prompt(model.clip), "empty prompt")
        negative = negative_of(self._guider)
        if not negative or not covers(negative, self._level):
            return None
        return model.of_the_host(negative), self._negative_kind()

    def words(self, state: RunState, model: ComfyModel) -> Conditioning | None:
        entries = self._given  # another monitor may have changed them since
        if len(entries) != 1:
            state.note(f"the prompt is combined from {len(entries)} conditionings, so its words are not told apart")
            return None
        if entries[0].get("cross_attn") is None:
            state.note("this conditioning has no rows to explain or change")
            return None
        found = conditioning_of(entries[0]["cross_attn"], entries[0])
        if not found.tokens:
            state.prompt = ""
            state.note(
                "the words are not known, so the prompt's tokens are numbered: encode it with the Text Encode "
                "(Déjà Vu) node to see them"
            )
        elif found.reencoding is None:
            state.note(
                "the words are those that the workflow shows, explained without the text encoder: encode the prompt "
                "with the Text Encode (Déjà Vu) node, or link CLIP to the monitor, to name them more surely"
            )
        return found

    def identity(self, state: RunState, model: ComfyModel) -> tuple[Setting, Profile | None]:
        source = self._positive[0].get(SOURCE)
        state.pixels_a_cell = int(getattr(self._guider.inner_model.latent_format, "spacial_downscale_ratio", 8))
        if source is not None:
            state.prompt, state.prompt_node = source.text, source.node
        baseline = state.trace.baseline or self._monitor.monitoring.baseline
        scale = float(getattr(self._guider, "cfg", 1.0))
        from_image = bool(self._from_image.wait())
        setting = setting_of(
            model, baseline, negative_of(self._guider), scale, from_image, self.sampler, self._negative_kind()
        )
        return setting, self._monitor.profile_of(setting, model)

    def refuses_restart(self) -> str:
        return ""

    def progress(self) -> None:
        self._monitor.on_progress(self.number, self.state)

    # ------------------------------------------------------------------------ in the host's loop

    def read_before_the_loop(self) -> None:
        """What is read from the device once for a model or a conditioning, and known by the first step."""
        fingerprint(self._guider.model_patcher)
        negative = negative_of(self._guider)
        if self._guider.conds.get("positive"):
            self._name_sources()
        if self._guider.conds.get("positive") and negative:
            self._negative_kind()
            negative_name(negative)

    def predict(self, executor: Executor, x: Tensor, sigma: Tensor, options: Options, seed: object) -> Tensor:
        """One evaluation of the host, and what the controller makes of it."""
        self._level = level_of(self._guider.conds, sigma)
        self._x, self._options = x, options
        if AGAIN in options:
            self.state.mitigated(None)
        if not self.evaluations:
            self._given = self._positive
        denoised = executor(x, sigma, attending(options, self._attention), seed)
        decision: Decision = GO
        with self.controller.faults():
            decision = self._handed_over(x, sigma)
        self.evaluations += 1
        if isinstance(decision, Stop):
            raise Stopped(decision.sentence)
        if isinstance(decision, Restart):
            raise OtherNoise(decision.moved)
        if isinstance(decision, Again):
            changed = self.state.sampled
            if changed is not None:
                entry = self.model(self.state).entry_with(changed, as_images(x))
                self._guider.conds["positive"], self._attention = [entry], changed.attention
            forget_steps(options)
            denoised = executor(x, sigma, {**attending(options, self._attention), AGAIN: True}, seed)
            with self.controller.faults():
                self._handed_over(x, sigma)
        return denoised

    def _handed_over(self, x: Tensor, sigma: Tensor) -> Decision:
        cond, uncond, self._cond, self._uncond = self._cond, self._uncond, None, None
        if self._no_images:
            self.state.trace.skip(sigma[0], self._no_images)
            return GO
        if not covers(self._positive, self._level):
            why = "the prompt does not act on the whole image here (an area, mask or range)"
            return self.controller.evaluation(Evaluation(as_images(x), sigma, missing=why))
        kind = self._negative_kind() if uncond is not None else "empty prompt"
        return self.controller.evaluation(Evaluation(as_images(x), sigma, cond, uncond, kind))

    def end(self, finished: bool) -> None:
        """Lets go of all that is the host's: the run is kept for its report."""
        self.controller.end(finished)
        self._guider = self._x = self._cond = self._uncond = self.sigmas = self._attention = None  # type: ignore[assignment]
        self._options = {}
        self._given = []

    def read(self, arguments: GuidanceArguments) -> None:
        """The last function after guidance: both predictions, where it tells them."""
        negative = negative_of(self._guider)
        if arguments.get("cond") is self._positive and not self._no_images:
            self._cond = as_images(arguments["cond_denoised"])
            found = unconditional_of(arguments, negative)
            if found is not None and covers(negative, self._level):
                self._uncond = as_images(found)

    def guide(self, arguments: GuidanceArguments) -> Tensor:
        """The first function after guidance: the host's guided prediction, or what a mitigation's rule makes of it."""
        denoised = arguments["denoised"]
        if self.state.rule is None:
            return denoised
        number = len(self.state.trace)
        step = guided_step(arguments, self._guider, self._level, number, lambda: self.model(self.state))
        if step is not None and step.unconditional is not step.conditional:
            return as_host(self.controller.guided(self.state, step).to(denoised.dtype), denoised.ndim)
        if arguments.get("cond") is self._positive:
            mitigation = self._monitor.monitoring.mitigation
            self.state.note(f"guidance is off or of another kind, so {mitigation} has nothing to change")
        return denoised

    @property
    def _positive(self) -> list[Entry]:
        return self._guider.conds["positive"]

    def _negative_kind(self) -> Unconditional:
        if self._kind is None:
            source = self._positive[0].get(SOURCE)
            clip = source.clip if source is not None and source.clip is not None else self._monitor.clip
            self._kind = kind_of(negative_of(self._guider), clip)
        return self._kind

    def _name_sources(self) -> None:
        """Give prompts from plain encode nodes the texts that the workflow holds for them."""
        for name, entries in self._guider.conds.items():
            if name not in ("positive", "negative") or len(entries) != 1 or SOURCE in entries[0]:
                continue
            executing = graph.executing()
            typed = graph.typed_prompt(*executing, negative=name == "negative") if executing is not None else None
            if typed is not None:
                entries[0][SOURCE] = Source(self._monitor.clip, *typed)


class Monitor:
    """Watches every run of the models it is attached to; keeps the last few."""

    runs_as: type[Run] = Run

    def __init__(
        self,
        monitoring: Monitoring,
        profile: Profile | None = None,
        folder: Path | None = None,
        clip: CLIP | None = None,
        on_progress: Callable[[str, RunState], None] = lambda run, state: None,
        every_score: bool = False,
    ) -> None:
        """``profile`` is the user's choice; without one those of ``folder`` are looked through.

        ``on_progress`` is told of every evaluation and of a run's end, with a name for the run. With ``every_score``
        the traces hold what all scores need, as a calibration does.
        """
        self.monitoring, self.clip, self.on_progress, self.every_score = monitoring, clip, on_progress, every_score
        self._profile, self._folder = profile, folder
        self.runs: deque[Run] = deque()  # the last few, and all of this execution: a list is drawn before it is told
        self._open: list[Run] = []
        self._lock = threading.Lock()

    def attach(self, patcher: ModelPatcher) -> ModelPatcher:
        """A clone of the model whose runs are watched."""
        types = comfy.patcher_extension.WrappersMP
        clone = patcher.clone()
        key = f"{KEY}-{uuid.uuid4().hex[:8]}"
        # Plain functions: the host deep-copies what it finds, and a method would bring its object along.
        clone.add_wrapper_with_key(types.OUTER_SAMPLE, key, lambda *a, **k: self._outer_sample(*a, **k))
        clone.add_wrapper_with_key(types.SAMPLER_SAMPLE, key, lambda *a, **k: self._sampler_sample(*a, **k))
        clone.add_wrapper_with_key(types.PREDICT_NOISE, key, lambda *a, **k: self._predict_noise(*a, **k))
        remember_beginning(clone, key)
        return clone

    def report_of(self, samples: Tensor) -> Report:
        """The report on the run that gave these samples, or some of its images, in any order.

        Other nodes may have changed the samples since: then it is on what the samplers that lie behind them in the
        workflow drew last, be it in an earlier execution, since the host keeps what need not be drawn again.
        """
        with self._lock:
            finished = [run for run in self.runs if run.state.finished]
        wanted = Output(samples) if isinstance(samples, Tensor) else None
        for run in reversed(finished):
            places = run.output.places_of(wanted) if run.output is not None and wanted is not None else None
            if places is not None:
                return Report.of(run.state).of_images(places)
        runs = self._runs_behind(finished)
        if not runs:
            why = "no sampler has drawn these samples with the monitored model: link the monitor's model to the sampler"
            return Report.missing(why)
        reports = [Report.of(run.state) for run in runs]
        worst = max(reports, key=lambda report: report.highest.score or 0.0)
        if len(reports) > 1:
            worst.state.note(
                f"{len(reports)} runs may have given these samples: this is the one with the highest score"
            )
        return worst

    @staticmethod
    def _runs_behind(finished: list[Run]) -> list[Run]:
        """Of these runs, those that the workflow says to lie behind the samples of the Verdict that asks."""
        execution, _ = graph.place()
        found, own = graph.executing(), [run for run in finished if run.place[0] == execution]
        if found is None or any(node not in found[0] for node in (found[1], *(run.place[1] for run in own))):
            return own[-1:]  # nodes that the host has made on the way are in no workflow
        drew = {str(run.place[1]): run.place[0] for run in finished if run.place[1] in found[0]}  # the last execution
        samplers = graph.samplers_behind(*found, drew)
        return [run for run in finished if run.place[1] in samplers and run.place[0] == drew[str(run.place[1])]]

    def profile_of(self, setting: Setting, model: ComfyModel) -> Profile | None:
        """The user's choice; where it is for another setting or can flag nothing, one that was kept for this one."""
        given = self._profile
        kind, needed = self.monitoring.deciding, needed_nulls(self.monitoring.alpha)
        if given is not None and given.setting.mismatch(setting, kind) is None and len(given.nulls) >= needed:
            return given
        return profile_for(setting, model, self.monitoring, self._folder) or given

    def keep(self, made: Profile) -> None:
        """Keep a calibration that a run has made. Raises ValueError where one that is kept holds more."""
        store.keep(made, store.path_for(made.setting, self._folder))

    def _outer_sample(
        self, executor: Executor, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *a: Any, **k: Any
    ) -> Tensor:
        guider = executor.class_obj
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        run = self.runs_as(self, guider, noise, Readout(latent_image.any()), name)
        self._open.append(run)
        options, finished = guider.model_options, False
        try:
            # Plain functions: the host deep-copies what it finds, and a method would bring its object along.
            def guide(arguments: GuidanceArguments) -> Tensor:
                denoised = arguments["denoised"]
                with run.controller.faults():
                    denoised = run.guide(arguments)
                return denoised

            def read(arguments: GuidanceArguments) -> Tensor:
                with run.controller.faults():
                    run.read(arguments)
                return arguments["denoised"]

            with in_guidance(options, first=[guide], last=[read]):
                try:
                    samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
                except OtherNoise as found:
                    moved = as_host(found.moved, noise.ndim) / _noise_unit(guider, sampler, sigmas)
                    noise = noise + moved.to(noise)
                    forget_steps(options)
                    samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
            finished = True
        finally:
            self._open.remove(run)
            run.end(finished)
            if run.evaluations:
                self._keep(run)
        with run.controller.faults():
            run.output = Output(samples)
            run.progress()
        return samples

    def _keep(self, run: Run) -> None:
        with self._lock:
            self.runs.append(run)
            execution = run.place[0]
            while len(self.runs) > RUNS_KEPT and (execution is None or self.runs[0].place[0] != execution):
                self.runs.popleft()

    def _sampler_sample(self, executor: Executor, guider: Guider, sigmas: Tensor, *a: Any, **k: Any) -> Tensor:
        """The sampler's loop, with models loaded and conditionings processed before and after it."""
        if not self._open:
            return executor(guider, sigmas, *a, **k)
        run = self._open[-1]
        run.sigmas = Readout(sigmas)
        with run.controller.faults():
            run.read_before_the_loop()
        samples = executor(guider, sigmas, *a, **k)
        run.controller.explain()
        return samples

    def _predict_noise(
        self, executor: Executor, x: Tensor, timestep: Tensor, model_options: Options | None = None, seed: object = None
    ) -> Tensor:
        options = {} if model_options is None else model_options
        if not self._open:
            return executor(x, timestep, options, seed)
        return self._open[-1].predict(executor, x, timestep, options, seed)


def _noise_unit(guider: Guider, sampler: Any, sigmas: Tensor) -> Tensor:
    """What one unit of noise is in the x that a run of these sigmas begins with."""
    sampling = guider.inner_model.model_sampling
    all_noise = sampler.max_denoise(guider, sigmas)
    one = torch.ones((), device=sigmas.device)  # a number alone goes with tensors of any device
    return sampling.noise_scaling(sigmas[0], one, torch.zeros_like(one), all_noise)
