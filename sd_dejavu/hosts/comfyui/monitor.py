"""A monitor that watches every run of the host's samplers, through wrappers on a clone of the model.

The sampling loop never waits for the device on our account, with these exceptions: 'stop' and 'mitigate' need the
first step's score before the second step, and a conditioning with a range of steps is compared with the noise level,
which the host itself reads at that very place. What is explained because it was flagged is explained as soon as the
score has arrived, in a later step on a fast card, from what was kept of the first.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ...attention import AttentionRule
from ...calibration.profile import Profile
from ...conditioning import Conditioning, Unconditional
from ...denoiser import Predictions
from ...guidance import GuidanceRule
from ...monitor import Monitoring, Report, Watch
from ...readout import Readout
from . import graph
from .attention import attending
from .model import ComfyModel, HostStep, as_host, as_pictures, fingerprint, remember_beginning, why_no_pictures
from .run_options import forget_steps, in_guidance
from .setting import kind_of, negative_name, profile_for, setting_of
from .text import SOURCE, Source, conditioning_of

KEY = "dejavu"
RUNS_KEPT = 8

log = logging.getLogger("dejavu")


class Stopped(RuntimeError):
    """The monitor was told to end flagged runs, and this one was flagged."""


class OtherNoise(Exception):
    """A remedy has changed the noise that the run began with: it begins again, ``moved`` away in the model's scale."""

    def __init__(self, moved: Tensor) -> None:
        super().__init__("this run begins again from other noise")
        self.moved = moved


# ---------------------------------------------------------------------------------------- monitor


@dataclass(frozen=True)
class Moment:
    """An evaluation to be explained: the host's entries of the prompt, x, its noise level, the prediction without."""

    model: ComfyModel
    entries: list[dict[str, Any]]
    x: Tensor
    sigma: Tensor
    base: Tensor

    def kept(self) -> Moment:
        """The same for later, whatever the host does with its tensors."""
        return replace(self, x=self.x.clone(), sigma=self.sigma.clone(), base=self.base.clone())


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


@dataclass
class Run:
    """One run of a sampler under a monitor."""

    watch: Watch
    sigmas: Readout
    from_picture: Readout
    sampler: str = ""
    place: tuple[str | None, str | None] = field(default_factory=graph.place)  # the execution, and the sampler's node
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    evaluations: int = 0
    level: float | None = None  # of this evaluation's noise, where a conditioning has a range
    output: Output | None = None
    negative: Unconditional | None = None  # what the host's negative conditioning was found to be
    no_pictures: str = ""  # why there is nothing to measure
    acted: bool = False  # judged, and mitigated where that was asked for
    rule: GuidanceRule | None = None  # in place of plain guidance, since a mitigation
    attention: AttentionRule | None = None
    unexplained: Moment | None = None  # until it is known whether this run is flagged
    empty: Conditioning | None = None  # the empty prompt, where it had to be encoded
    cond: Tensor | None = field(default=None, repr=False)
    uncond: Tensor | None = field(default=None, repr=False)


class Monitor:
    """Watches every run of the models it is attached to; keeps the last few."""

    def __init__(
        self,
        monitoring: Monitoring,
        profile: Profile | None = None,
        folder: Path | None = None,
        clip: Any = None,
        on_progress: Callable[[str, Watch], None] = lambda run, watch: None,
    ) -> None:
        """``profile`` is the user's choice; without one those of ``folder`` are looked through.

        ``on_progress`` is told of every evaluation and of a run's end, with a name for the run.
        """
        self.monitoring = monitoring
        self._profile, self._folder, self._clip = profile, folder, clip
        self._on_progress = on_progress
        self.runs: deque[Run] = deque()  # the last few, and all of this execution: a list is drawn before it is told
        self._open: list[Run] = []
        self._lock = threading.Lock()

    def attach(self, patcher: Any) -> Any:
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
            finished = [run for run in self.runs if run.watch.finished]
        wanted = Output(samples) if isinstance(samples, Tensor) else None
        for run in reversed(finished):
            places = run.output.places_of(wanted) if run.output is not None and wanted is not None else None
            if places is not None:
                return Report.of(run.watch).of_images(places)
        runs = self._runs_behind(finished)
        if not runs:
            why = "no sampler has drawn these samples with the monitored model: link the monitor's model to the sampler"
            return Report.missing(why)
        reports = [Report.of(run.watch) for run in runs]
        worst = max(reports, key=lambda report: report.highest.score or 0.0)
        if len(reports) > 1:
            worst.watch.note(
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

    def _outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *a: Any, **k: Any
    ) -> Tensor:
        guider = executor.class_obj
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        run = Run(Watch(self.monitoring), Readout(sigmas), Readout(latent_image.any()), name)
        run.no_pictures = why_no_pictures(noise)
        self._open.append(run)
        options = guider.model_options

        def read(arguments: dict[str, Any]) -> Tensor:
            with self._guarded(run):
                self._read(run, guider, arguments)
            return arguments["denoised"]

        def guide(arguments: dict[str, Any]) -> Tensor:
            return self._guide(run, guider, arguments)

        try:
            with in_guidance(options, first=[guide], last=[read]):
                try:
                    samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
                except OtherNoise as found:
                    run.evaluations = 0
                    moved = as_host(found.moved, noise.ndim) / _noise_unit(guider, sampler, sigmas)
                    noise = noise + moved.to(noise)
                    forget_steps(options)
                    samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
            run.watch.finished = True
        finally:
            run.unexplained = None  # of a run that was interrupted
            self._open.remove(run)
            if run.evaluations:
                with self._lock:
                    self.runs.append(run)
                    execution = run.place[0]
                    while len(self.runs) > RUNS_KEPT and (execution is None or self.runs[0].place[0] != execution):
                        self.runs.popleft()
        with self._guarded(run):
            run.output = Output(samples)
            run.watch.settle()
            self._on_progress(run.number, run.watch)
        return samples

    def _sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, *a: Any, **k: Any) -> Tensor:
        """The sampler's loop, with models loaded and conditionings processed before and after it."""
        if not self._open:
            return executor(guider, sigmas, *a, **k)
        run = self._open[-1]
        run.sigmas = Readout(sigmas)
        with self._guarded(run):
            self._read_before_the_loop(run, guider)
        samples = executor(guider, sigmas, *a, **k)
        with self._guarded(run):
            self._explain(run, wait=True)
        return samples

    def _read_before_the_loop(self, run: Run, guider: Any) -> None:
        """What is read from the device once for a model or a conditioning, and known by the first step."""
        fingerprint(guider.model_patcher)
        positive, negative = guider.conds.get("positive"), negative_of(guider)
        if positive and negative:
            self._kind(run, positive, negative)
            negative_name(negative)

    @contextmanager
    def _guarded(self, run: Run) -> Iterator[None]:
        """Our own faults never cost a picture; the host's interruption, and ending a flagged run, pass."""
        try:
            yield
        except (comfy.model_management.InterruptProcessingException, Stopped, OtherNoise):
            raise
        except Exception as error:
            if isinstance(error, comfy.model_management.OOM_EXCEPTION):
                comfy.model_management.soft_empty_cache()
                text = "there was not enough memory: choose 'remove-trigger', or a smaller batch"
            else:
                text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if text not in run.watch.notes:  # a fault of every step is told once
                log.warning("[Déjà Vu] no verdict: %s", text, exc_info=not isinstance(error, ValueError))
            run.watch.note(text)

    def _predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None
    ) -> Tensor:
        options = {} if model_options is None else model_options
        if not self._open:
            return executor(x, timestep, options, seed)
        run, guider = self._open[-1], executor.class_obj
        run.level = level_of(guider.conds, timestep)
        denoised = executor(x, timestep, attending(options, run.attention), seed)
        changed = None
        with self._guarded(run):
            changed = self._after(run, guider, x, timestep, options)
        with self._guarded(run):
            self._explain(run)
        run.evaluations += 1
        run.cond = run.uncond = None
        if changed is not None:
            forget_steps(options)
            denoised = executor(x, timestep, attending(options, run.attention), seed)
            if run.uncond is None:
                with self._guarded(run):
                    self._measure_apart(run, changed, guider, as_pictures(x), timestep)
            run.cond = run.uncond = None
        with self._guarded(run):
            self._on_progress(run.number, run.watch)
        return denoised

    # ------------------------------------------------------------------------------- reading

    def _read(self, run: Run, guider: Any, arguments: dict[str, Any]) -> None:
        """Take one guidance step in, if it tells both predictions; see :meth:`_after` for those that do not."""
        positive, negative, sigma = guider.conds.get("positive"), negative_of(guider), arguments["sigma"]
        if arguments.get("cond") is not positive or not covers(positive, run.level) or run.no_pictures:
            return
        run.cond = as_pictures(arguments["cond_denoised"])
        found = without_of(arguments, negative)
        if found is None or not covers(negative, run.level):
            return
        kind = self._kind(run, positive, negative)
        if kind != "empty prompt" and self._wants_empty(kind, positive):
            return
        run.uncond = unconditional = as_pictures(found)
        run.watch.trace.record(Predictions(run.cond, unconditional, sigma, kind))

    def _after(self, run: Run, guider: Any, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> ComfyModel | None:
        """After an evaluation: measure what guidance did not tell, then explain and mitigate.

        The model where the evaluation shall be run again, with another conditioning.
        """
        watch = run.watch
        if run.no_pictures:
            watch.trace.skip(sigma[0], run.no_pictures)
            return None
        shown = as_pictures(x)
        positive = guider.conds["positive"]
        if run.evaluations == 0:
            self._name_source(positive)
        model = None
        if run.evaluations == 0 or (run.uncond is None and watch.measures(run.evaluations)):
            model = _model(run, guider, options, x)
            model.clip = model.clip or self._clip
        if run.uncond is None:
            if model is None or not watch.measures(run.evaluations):
                watch.trace.skip(
                    sigma[0], "guidance does not tell it here, and only the steps of the score are measured"
                )
            else:
                self._measure_apart(run, model, guider, shown, sigma)
        if run.acted or run.evaluations or model is None:
            return None
        run.acted = True
        self._identify(run, model, guider)
        self._on_progress(run.number, watch)
        return model if self._act(run, model, guider, shown, sigma) else None

    def _name_source(self, positive: list[dict[str, Any]]) -> None:
        """Give a prompt from a plain encode node the text that the workflow holds for it."""
        if len(positive) != 1 or SOURCE in positive[0]:
            return
        executing = graph.executing()
        typed = graph.typed_prompt(*executing) if executing is not None else None
        if typed is not None:
            positive[0][SOURCE] = Source(self._clip, *typed)

    def _kind(self, run: Run, positive: Any, negative: Any) -> Unconditional:
        if run.negative is None:
            run.negative = kind_of(negative, self._clip_for(positive))
        return run.negative

    def _clip_for(self, positive: Any) -> Any:
        source = positive[0].get(SOURCE)
        return source.clip if source is not None and source.clip is not None else self._clip

    def _wants_empty(self, kind: Unconditional, positive: Any) -> bool:
        """Whether the empty prompt shall take the place of a negative conditioning of this kind.

        No calibration can be made against one that no text encodes to, so there it does wherever it can be encoded.
        """
        if self.monitoring.without == "empty prompt":
            return True
        return kind in ("zeroed prompt", "prompt left out") and self._clip_for(positive) is not None

    def _measure_apart(self, run: Run, model: ComfyModel, guider: Any, x: Tensor, sigma: Tensor) -> None:
        """Evaluations of our own where guidance has none to read: cfg 1, other guiders, another 'without'."""
        positive, negative = guider.conds["positive"], negative_of(guider)
        kind: Unconditional
        if not covers(positive, run.level):
            run.watch.trace.skip(sigma[0], "the prompt does not act on the whole picture here (an area, mask or range)")
            return
        with torch.no_grad():
            known = self._kind(run, positive, negative) if negative and covers(negative, run.level) else None
            if known == "empty prompt" or (known is not None and not self._wants_empty(known, positive)):
                without, kind = model.calculate(negative, x, sigma), known
            elif model.clip is not None:
                run.empty = run.empty or model.encode("")
                without, kind = model(x, sigma, run.empty), "empty prompt"
            else:
                run.watch.trace.skip(
                    sigma[0],
                    "guidance gives nothing to measure against here, and the empty prompt needs the text encoder: "
                    "encode the prompt with the Déjà Vu Text Encode node",
                )
                return
            run.uncond = without
            conditional = model.calculate(positive, x, sigma) if run.cond is None else run.cond
            run.watch.trace.record(Predictions(conditional, without, sigma, kind))

    def _identify(self, run: Run, model: ComfyModel, guider: Any) -> None:
        watch = run.watch
        source = guider.conds["positive"][0].get(SOURCE)
        watch.pixels_a_cell = int(getattr(guider.inner_model.latent_format, "spacial_downscale_ratio", 8))
        if source is not None:
            watch.prompt, watch.prompt_node = source.text, source.node
        without = watch.trace.without or self.monitoring.without
        scale = float(getattr(guider, "cfg", 1.0))
        from_picture = bool(run.from_picture.wait())
        watch.setting = setting_of(model, without, negative_of(guider), scale, from_picture, run.sampler)
        watch.profile = self._profile or profile_for(watch.setting, model, self.monitoring, self._folder)

    # -------------------------------------------------------------------------------- acting

    def _act(self, run: Run, model: ComfyModel, guider: Any, x: Tensor, sigma: Tensor) -> bool:
        watch, wanted = run.watch, self.monitoring
        if run.uncond is None or (wanted.when_flagged == "report" and wanted.explain == "never"):
            return False  # nothing to decide now, so nothing is waited for
        entries = guider.conds["positive"]
        moment = run.unexplained = Moment(model, entries, x, sigma, run.uncond)
        if wanted.when_flagged == "report":
            self._explain(run)
            if run.unexplained is not None:
                run.unexplained = moment.kept()
            return False
        is_flagged = watch.is_flagged()
        conditioning = None
        with self._guarded(run):
            conditioning = self._explain(run, wait=True)
        if is_flagged and wanted.when_flagged == "stop":
            watch.stopped = True
            self._on_progress(run.number, watch)
            raise Stopped(_stop_message(watch))
        if not is_flagged:
            return False
        if conditioning is None:
            conditioning = self._conditioning(watch, entries)
        if conditioning is None:
            return False
        if watch.trace.without == "empty prompt" and run.negative != "empty prompt" and model.clip is not None:
            run.empty = run.empty or model.encode("")
            unconditional: Conditioning | None = run.empty
        else:
            unconditional = model.of_the_host(negative_of(guider))
        outcome = watch.find_remedy(model, conditioning, x, sigma, run.uncond, unconditional)
        if outcome.conditioning is not conditioning:
            guider.conds["positive"] = [model.entry_with(outcome.conditioning, x)]
        run.rule, run.attention = outcome.rule() if outcome.rule else None, outcome.attention
        if outcome.x is not None:
            raise OtherNoise(outcome.x.to(x) - x)  # of pictures; the latents may have a time axis
        return True

    def _explain(self, run: Run, wait: bool = False) -> Conditioning | None:
        """Explain the first step if that is wanted, once it is known whether it was flagged; what was explained."""
        moment, wanted = run.unexplained, self.monitoring
        if moment is None or (wanted.explain == "flagged" and not wait and not run.watch.trace.ready(1)):
            return None
        run.unexplained = None
        if wanted.explain == "never" or (wanted.explain == "flagged" and not run.watch.is_flagged()):
            return None
        conditioning = self._conditioning(run.watch, moment.entries)
        if conditioning is not None:
            run.watch.look_at_words(moment.model, conditioning, moment.x, moment.sigma, moment.base)
        return conditioning

    def _guide(self, run: Run, guider: Any, arguments: dict[str, Any]) -> Tensor:
        """The host's guided prediction, or what the rule of a mitigation makes of it."""
        denoised: Tensor = arguments["denoised"]
        x, sigma = arguments["input"], arguments["sigma"]
        positive = guider.conds["positive"]
        if run.rule is None or arguments.get("cond") is not positive or not covers(positive, run.level):
            return denoised
        without = without_of(arguments, negative_of(guider))
        if without is None:
            run.watch.note(f"guidance is off or of another kind, so {self.monitoring.remedy} has nothing to change")
            return denoised
        model = _model(run, guider, arguments["model_options"], x)
        shown, with_prompt, without, plain = map(as_pictures, (x, arguments["cond_denoised"], without, denoised))
        scale, ask = float(arguments["cond_scale"]), partial(model, shown, sigma)
        step = HostStep(shown, sigma, with_prompt, without, scale, run.evaluations, ask, plain)
        with self._guarded(run):
            denoised = as_host(run.rule(step).to(denoised.dtype), x.ndim)
        return denoised

    def _conditioning(self, watch: Watch, entries: list[dict[str, Any]]) -> Conditioning | None:
        if len(entries) != 1:
            watch.note(f"the prompt is combined from {len(entries)} conditionings, so its words are not told apart")
            return None
        if entries[0].get("cross_attn") is None:
            watch.note("this conditioning has no rows to explain or change")
            return None
        found = conditioning_of(entries[0]["cross_attn"], entries[0])
        if not found.tokens:
            watch.prompt = ""
            watch.note(
                "the words are not known, so the prompt's tokens are numbered: encode it with the Text Encode "
                "(Déjà Vu) node to see them"
            )
        elif found.reencoding is None:
            watch.note(
                "the words are those that the workflow shows, explained without the text encoder: encode the prompt "
                "with the Text Encode (Déjà Vu) node, or link CLIP to the monitor, to name them more surely"
            )
        return found


def negative_of(guider: Any) -> list[dict[str, Any]]:
    """The host's conditioning that guidance measures the prompt against; empty where it has none."""
    conds = guider.conds
    return conds.get("empty_negative_prompt", conds.get("negative")) or []  # the first with perpendicular guidance


def without_of(arguments: dict[str, Any], negative: list[dict[str, Any]]) -> Tensor | None:
    """The prediction without the prompt in what a post-cfg function is given; None where it tells none.

    Guidance leaves zeros for what it did not evaluate, and guiders of other kinds hand over other conditionings.
    """
    name = "empty_cond" if "empty_cond_denoised" in arguments else "uncond"
    return arguments[f"{name}_denoised"] if negative and arguments.get(name) is negative else None


def _noise_unit(guider: Any, sampler: Any, sigmas: Tensor) -> Tensor:
    """What one unit of noise is in the x that a run of these sigmas begins with."""
    sampling = guider.inner_model.model_sampling
    all_noise = sampler.max_denoise(guider, sigmas)
    unit: Tensor = sampling.noise_scaling(sigmas[0], torch.ones(1), torch.zeros(1), all_noise)
    return unit


def _model(run: Run, guider: Any, options: dict[str, Any], x: Tensor) -> ComfyModel:
    """The model as it is sampled now."""
    entry = guider.conds["positive"][0]
    return ComfyModel(guider.model_patcher, guider.inner_model, entry, options, run.sigmas.wait().tolist(), x)


def level_of(conds: dict[str, Any], sigma: Tensor) -> float | None:
    """The noise level, where the prompt or the negative prompt acts in a part of the steps only; read from the device.

    None where it does not matter, so that nothing is waited for.
    """
    names = ("positive", "negative", "empty_negative_prompt")
    entries = (entry for name in names for entry in conds.get(name) or ())
    return float(sigma[0]) if any("timestep_start" in e or "timestep_end" in e for e in entries) else None


def covers(entries: Any, level: float | None) -> bool:
    """Whether some conditioning acts on the whole picture at this level (see :func:`level_of`): the host leaves zeros
    where none does.
    """
    whole = [e for e in entries if "area" not in e and "mask" not in e]
    if any("timestep_start" not in e and "timestep_end" not in e for e in whole):
        return True
    return level is not None and any(
        e.get("timestep_end", 0.0) <= level <= e.get("timestep_start", float("inf")) for e in whole
    )


def _stop_message(watch: Watch) -> str:
    from ...report.wording import sentence

    worst = min((v for v in watch.verdicts("first step") if v.p_value is not None), key=lambda v: v.p_value or 0.0)
    return f"Déjà Vu ended this run at its first step. {sentence(worst)}. Nothing is broken: change the prompt, or set the monitor to report."
