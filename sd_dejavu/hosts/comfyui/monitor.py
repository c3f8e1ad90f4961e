"""A monitor that watches every run of the host's samplers, through wrappers on a clone of the model."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from ...monitor import Monitoring, Report, Watch, flagged
from . import graph
from .attention import attending
from .model import ComfyModel, HostStep, as_host, as_pictures, remember_beginning, why_no_pictures
from .setting import kind_of, profile_for, setting_of
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


@dataclass
class Run:
    """One run of a sampler under a monitor."""

    watch: Watch
    sampler: str = ""
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    evaluations: int = 0
    output: tuple[Any, ...] | None = None
    negative: Unconditional | None = None  # what the host's negative conditioning was found to be
    from_picture: bool = False
    no_pictures: str = ""  # why there is nothing to measure
    acted: bool = False  # judged, and mitigated where that was asked for
    rule: GuidanceRule | None = None  # in place of plain guidance, since a mitigation
    attention: AttentionRule | None = None
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
        self.runs: deque[Run] = deque(maxlen=RUNS_KEPT)
        self._open: list[Run] = []
        self._lock = threading.Lock()

    def attach(self, patcher: Any) -> Any:
        """A clone of the model whose runs are watched."""
        types = comfy.patcher_extension.WrappersMP
        clone = patcher.clone()
        key = f"{KEY}-{uuid.uuid4().hex[:8]}"
        # Plain functions: the host deep-copies what it finds, and a method would bring its object along.
        clone.add_wrapper_with_key(types.OUTER_SAMPLE, key, lambda *a, **k: self._outer_sample(*a, **k))
        clone.add_wrapper_with_key(types.PREDICT_NOISE, key, lambda *a, **k: self._predict_noise(*a, **k))
        remember_beginning(clone, key)
        return clone

    def report_of(self, samples: Tensor) -> Report:
        """The report on the run that gave these samples."""
        run = self._run_of(samples)
        return Report.missing("no sampler has used the monitored model") if run is None else Report.of(run.watch)

    def _run_of(self, samples: Tensor) -> Run | None:
        """The finished run that gave these samples; the last finished one where none did."""
        wanted = _digest(samples)
        with self._lock:
            finished = [run for run in self.runs if run.watch.finished]
        matching = [run for run in finished if run.output == wanted] or finished
        return matching[-1] if matching else None

    def _outer_sample(
        self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *a: Any, **k: Any
    ) -> Tensor:
        guider = executor.class_obj
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        run = Run(Watch(self.monitoring), name, from_picture=bool(torch.count_nonzero(latent_image)))
        run.no_pictures = why_no_pictures(noise)
        self._open.append(run)
        options = guider.model_options
        before = options.get("sampler_post_cfg_function", [])

        def read(arguments: dict[str, Any]) -> Tensor:
            with self._guarded(run):
                self._read(run, guider, arguments)
            return arguments["denoised"]

        def guide(arguments: dict[str, Any]) -> Tensor:
            return self._guide(run, guider, arguments)

        options["sampler_post_cfg_function"] = [guide, *before, read]
        try:
            try:
                samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
            except OtherNoise as found:
                run.evaluations = 0
                moved = as_host(found.moved, noise.ndim) / _noise_unit(guider, sampler, sigmas)
                noise = noise + moved.to(noise)
                samples = executor(noise, latent_image, sampler, sigmas, *a, **k)
            run.watch.finished = True
        finally:
            options["sampler_post_cfg_function"] = before
            self._open.remove(run)
            if run.evaluations:
                with self._lock:
                    self.runs.append(run)
        with self._guarded(run):
            run.output = _digest(samples)
            self._on_progress(run.number, run.watch)
        return samples

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
        denoised = executor(x, timestep, attending(options, run.attention), seed)
        changed = None
        with self._guarded(run):
            changed = self._after(run, guider, x, timestep, options)
        run.evaluations += 1
        run.cond = run.uncond = None
        if changed is not None:
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
        if arguments.get("cond") is not positive or not covers(positive, sigma) or run.no_pictures:
            return
        run.cond = as_pictures(arguments["cond_denoised"])
        found = without_of(arguments, negative)
        if found is None or not covers(negative, sigma):
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
            sigmas = options.get("transformer_options", {}).get("sample_sigmas", sigma[:1])
            model = ComfyModel(guider.model_patcher, guider.inner_model, positive[0], options, sigmas, x)
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
        if not covers(positive, sigma):
            run.watch.trace.skip(sigma[0], "the prompt does not act on the whole picture here (an area, mask or range)")
            return
        with torch.no_grad():
            known = self._kind(run, positive, negative) if negative and covers(negative, sigma) else None
            if known == "empty prompt" or (known is not None and not self._wants_empty(known, positive)):
                without, kind = model.calculate(negative, x, sigma), known
            elif model.clip is not None:
                without, kind = model(x, sigma, model.encode("")), "empty prompt"
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
        watch.setting = setting_of(model, without, negative_of(guider), scale, run.from_picture, run.sampler)
        watch.profile = self._profile or profile_for(watch.setting, model, self.monitoring, self._folder)

    # -------------------------------------------------------------------------------- acting

    def _act(self, run: Run, model: ComfyModel, guider: Any, x: Tensor, sigma: Tensor) -> bool:
        watch, wanted = run.watch, self.monitoring
        if wanted.when_flagged == "report" and wanted.explain == "never":
            return False  # nothing to decide now, so nothing is waited for
        is_flagged = bool(flagged(watch.verdicts("first step")))
        entries = guider.conds["positive"]
        explaining = wanted.explain == "always" or (wanted.explain == "flagged" and is_flagged)
        mitigating = is_flagged and wanted.when_flagged == "mitigate"
        if run.uncond is None or not (explaining or is_flagged):
            return False
        conditioning = self._conditioning(watch, entries) if explaining or mitigating else None
        if explaining and conditioning is not None:
            with self._guarded(run):
                watch.look_at_words(model, conditioning, x, sigma, run.uncond)
        if is_flagged and wanted.when_flagged == "stop":
            watch.stopped = True
            self._on_progress(run.number, watch)
            raise Stopped(_stop_message(watch))
        if not mitigating or conditioning is None:
            return False
        if watch.trace.without == "empty prompt" and run.negative != "empty prompt" and model.clip is not None:
            unconditional: Conditioning | None = model.encode("")
        else:
            unconditional = model.of_the_host(negative_of(guider))
        outcome = watch.find_remedy(model, conditioning, x, sigma, run.uncond, unconditional)
        if outcome.conditioning is not conditioning:
            guider.conds["positive"] = [model.entry_with(outcome.conditioning, x)]
        run.rule, run.attention = outcome.rule() if outcome.rule else None, outcome.attention
        if outcome.x is not None:
            raise OtherNoise(outcome.x.to(x) - x)  # of pictures; the latents may have a time axis
        return True

    def _guide(self, run: Run, guider: Any, arguments: dict[str, Any]) -> Tensor:
        """The host's guided prediction, or what the rule of a mitigation makes of it."""
        denoised: Tensor = arguments["denoised"]
        x, sigma = arguments["input"], arguments["sigma"]
        positive = guider.conds["positive"]
        if run.rule is None or arguments.get("cond") is not positive or not covers(positive, sigma):
            return denoised
        without = without_of(arguments, negative_of(guider))
        if without is None:
            run.watch.note(f"guidance is off or of another kind, so {self.monitoring.remedy} has nothing to change")
            return denoised
        options = arguments["model_options"]
        sigmas = options.get("transformer_options", {}).get("sample_sigmas", sigma[:1])
        model = ComfyModel(guider.model_patcher, guider.inner_model, guider.conds["positive"][0], options, sigmas, x)
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


def covers(entries: Any, sigma: Tensor) -> bool:
    """Whether some conditioning acts on the whole picture now: the host leaves zeros where none does."""
    whole = [e for e in entries if "area" not in e and "mask" not in e]
    if any("timestep_start" not in e and "timestep_end" not in e for e in whole):
        return True
    level = float(sigma[0]) if whole else 0.0
    return any(e.get("timestep_end", 0.0) <= level <= e.get("timestep_start", float("inf")) for e in whole)


def _digest(samples: Tensor) -> tuple[Any, ...]:
    """Tells the outputs of runs apart."""
    flat = samples.detach().float()
    return (tuple(samples.shape), float(flat.sum()), float(flat.square().sum()))


def _stop_message(watch: Watch) -> str:
    from ...report.wording import sentence

    worst = min((v for v in watch.verdicts("first step") if v.p_value is not None), key=lambda v: v.p_value or 0.0)
    return f"Déjà Vu ended this run at its first step. {sentence(worst)}. Nothing is broken: change the prompt, or set the monitor to report."
