"""Watching the sampling of Automatic1111 and Forge through their own callbacks.

Nothing of the host is patched: Automatic1111 calls back before and after each evaluation, Forge before it and, on a
clone of its unet, after guidance. Conditionings that the host caches are never changed, only replaced for one step.
Where a mitigation may change the noise, the function of the run's own sampler is ours until it is called (noise.py).
Each sampling of a batch is a :class:`Pass` with a controller of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...calibration import store
from ...calibration.ordinary_prompts import general_prompts
from ...calibration.profile import Profile, Setting
from ...core.conditioning import Conditioning, Unconditional
from ...core.denoiser import Evaluation
from ...core.guidance import GuidanceRule, GuidedStep
from ...core.memory import ran_out, release
from ...kept.foreign import one_line
from ...mitigations.guard import Guard
from ...run.controller import Again, Decision, Restart, RunController, Stop
from ...run.monitoring import Monitoring
from ...run.report import Report
from ...run.state import RunState
from .guidance import Automatic1111, Forge, GuidedModel, Step, attended_rows, checkpoint_of, rows_of
from .hosted import After, Before, Cond, Guided, Processed, Processing
from .noise import OtherNoise, let_begin_again
from .references import rule_of

Host = Automatic1111 | Forge

HIRES = "hires pass"
MARK = "dejavu"  # an attribute of our function among those that Forge calls after guidance

log = logging.getLogger("dejavu")


def this_host() -> Host:
    """Forge has a package of its own for models, Automatic1111 has not."""
    import importlib.util

    return Forge() if importlib.util.find_spec("modules_forge") is not None else Automatic1111()


def drawn(p: Processing) -> Processed:
    """What the host draws in a run that we have made. Raises ValueError in one line where it cannot."""
    from modules import processing

    try:
        return processing.process_images(p)
    except Exception as error:
        log.warning("[Déjà Vu] the host could not draw", exc_info=True)
        if ran_out(error):
            release()
            raise ValueError("there was not enough memory: choose a smaller size, or fewer images") from error
        raise ValueError(f"the host could not draw: {type(error).__name__}: {one_line(error)}") from error


class Pass:
    """One sampling of one batch, the first pass or that of the hires fix: the host of its controller."""

    def __init__(
        self,
        host: Host,
        p: Processing,
        monitoring: Monitoring,
        folder: Path,
        from_image: bool,
        rule: Callable[[GuidedModel], GuidanceRule] | None,
        within: bool,
        every_score: bool,
    ) -> None:
        """``rule`` makes a guidance rule for every prompt; ``within`` another run this one ends itself alone. Readings
        are for the monitor's score, or for ``every_score``."""
        hires = bool(getattr(p, "is_hr_pass", False))
        self.title = HIRES if hires else "first pass"
        self.prompts = list((getattr(p, "hr_prompts", None) if hires else None) or p.prompts)
        self.negatives = list((getattr(p, "hr_negative_prompts", None) if hires else None) or p.negative_prompts)
        self.scale = float(getattr(p, "hr_cfg", 0) or p.cfg_scale) if hires else float(p.cfg_scale)
        self.sampler = str((getattr(p, "hr_sampler_name", None) if hires else None) or p.sampler_name)
        self.steps = (getattr(p, "hr_second_pass_steps", 0) if hires else 0) or p.steps
        self.first_steps = int(getattr(p, "firstpass_steps", 0) or p.steps)  # the host's prompt editing goes by them
        self.from_image = from_image or hires
        self.may_begin_again = False  # from other noise, now
        self.evaluations = 0
        self.step: Step | None = None
        self._host, self._monitoring, self._folder = host, monitoring, folder
        self._sampled_by: str | None = None  # the checkpoint that the first evaluation was of
        self._attending = ExitStack()  # while the host evaluates
        images: dict[str, list[int]] = {}
        for image, prompt in enumerate(self.prompts):
            images.setdefault(prompt, []).append(image)
        self.states = [
            RunState(monitoring, prompt, images=tuple(places), every_score=every_score)
            for prompt, places in images.items()
        ]
        self.controller: RunController[GuidedModel] = RunController(
            self,
            monitoring,
            self.states,
            rule,
            ordinary=self._ordinary,
            keep=lambda made: store.keep(made, store.path_for(made.setting, folder)),
        )
        self._steered, self._within = rule is not None, within
        self._told = False  # whether the host's page tells of a calibration

    # ----------------------------------------------------------------- as the controller's host

    @property
    def interruptions(self) -> tuple[type[BaseException], ...]:
        from modules import sd_samplers_common

        return (sd_samplers_common.InterruptedException,)

    def model(self, state: RunState) -> GuidedModel:
        assert self.step is not None
        own = self.step.of(_images(state))
        return GuidedModel(self._host, own, [float(self._host.sigma(own)[0])] + [0.0] * self.steps)

    def prompt(self, state: RunState, model: GuidedModel) -> Conditioning:
        parts = self._parts()
        return rows_of(model.step.text_cond, [parts[image][0][0] for image in _images(state)])

    def unconditional(
        self, state: RunState, model: GuidedModel, empty: bool
    ) -> tuple[Conditioning, Unconditional] | None:
        if empty:
            return model.encode(""), "empty prompt"
        uncond = model.step.text_uncond
        return None if uncond is None else (rows_of(uncond, _images(state)), self._negative_kind())

    def words(self, state: RunState, model: GuidedModel) -> Conditioning | None:
        from modules import prompt_parser, shared

        first = _images(state)[0]
        own = self._parts()[first]
        if len(own) != 1:
            state.note(f"the prompt is joined from {len(own)} by AND, so its words are not told apart")
            return None
        hires_steps = self.steps if self.title == HIRES else None
        old = bool(shared.opts.data.get("use_old_scheduling", False))
        schedules = prompt_parser.get_learned_conditioning_prompt_schedules
        schedule = schedules([self.prompts[first]], self.first_steps, hires_steps, old)[0]
        if len(schedule) > 1:
            state.note("the prompt changes during the run; what is said here is of its first part")
        text = state.prompt = schedule[0][1]
        sampled = rows_of(model.step.text_cond, [own[0][0]])
        try:
            found = model.encode(text)
        except ValueError as error:
            state.note(str(error))
            return sampled
        shared_rows = min(found.rows.shape[1], sampled.rows.shape[1])
        fits = torch.allclose(
            found.rows[:, :shared_rows].to(sampled.rows), sampled.rows[:, :shared_rows], atol=2e-2, rtol=2e-2
        )
        if not fits:
            state.prompt = ""
            state.note("another extension changes the conditioning, so the prompt's tokens are numbered")
            return sampled
        return found

    def identity(self, state: RunState, model: GuidedModel) -> tuple[Setting, Profile | None]:
        baseline = state.trace.baseline or self._monitoring.baseline
        setting = Setting(
            model=model.fingerprint,
            prediction_type=model.prediction_type,
            latent_shape=model.latent_shape,
            steps=self.steps,
            sigma=model.sigmas(self.steps)[0],
            guidance_scale=self.scale,
            baseline=baseline,
            negative_prompt=" | ".join(dict.fromkeys(self.negatives)),
            begins_with="an image" if self.from_image else "noise",
            sampler=self.sampler,
            patches=model.patches,
            text_encoder=model.text_encoder,
        )
        return setting, store.find_for_monitor(setting, self._monitoring.score, model.brought_along, self._folder)

    def refuses_restart(self) -> str:
        if self.may_begin_again:
            return ""
        return "begins with an image" if self.from_image else "is sampled in a way that cannot begin again"

    def _ordinary(self, model: GuidedModel, count: int) -> list[str]:
        """Ordinary prompts, with the text encoder where its LoRAs act on it."""
        self._host.load_encoders(model.step)
        return general_prompts(count)

    def progress(self) -> None:
        """The host's page shows the report when the run is over; until then, how far a calibration within it is."""
        from modules import shared

        measured = next((state.calibrating for state in self.states if state.calibrating is not None), None)
        if measured is not None:
            shared.state.textinfo = f"ordinary prompts: {measured.done:,} of {measured.count:,}"
        elif self._told:
            shared.state.textinfo = None
        self._told = measured is not None

    # ------------------------------------------------------------------------ in the host's loop

    def before(self, params: Before, step: Step) -> None:
        """Before an evaluation: put in what is sampled instead."""
        self.step = step
        sampled_by = checkpoint_of(step.sd_model)
        self._sampled_by = self._sampled_by or sampled_by
        if sampled_by != self._sampled_by:
            self._leave_to_the_refiner()
            return
        changed = [state for state in self.states if state.sampled is not None]
        if changed:
            params.text_cond = self._with(step.text_cond, changed)
            self._attend(step)

    def after_automatic1111(self, params: After) -> None:
        """After an evaluation of Automatic1111: ``params.x`` holds the network's results, the negative prompt's last."""
        step = self._step
        images, parts = step.x.shape[0], self._parts()
        if params.x.shape[0] != images + sum(len(part) for part in parts):
            self._hand_over(None, None, missing="this model edits images, its guidance is of another kind")
            return
        results = self._host.denoised(_repeated(step, params.x.shape[0]), params.x)
        unconditional = results[-images:]
        joined = torch.stack(
            [unconditional[i] + sum(w * (results[j] - unconditional[i]) for j, w in parts[i]) for i in range(images)]
        )
        first = torch.stack([results[part[0][0]] for part in parts])
        matters = self.states[0].measures_next() or self._steered or any(state.rule for state in self.states)
        # Where the negative prompt is skipped, the prompt's own result stands in its place.
        guided = not (matters and self._may_be_skipped() and torch.equal(first, unconditional))
        for image, found in self._carried_out(
            self._hand_over(joined, unconditional if guided else None), joined
        ).items():
            params.x[parts[image][0][0]] = self._host.output(step.of([image]), found)[0].to(params.x)
        for image, wanted in self._ruled(joined, unconditional).items() if guided else ():
            # The host guides on: it is given the result with the prompt from which it comes to what is wanted.
            (row, weight), *others = parts[image]
            scale = self.scale * step.denoiser.cond_scale_miltiplier
            begin, end = params.x[image - images], self._host.output(step.of([image]), wanted)[0].to(params.x)
            rest = sum((w * scale * (params.x[j] - begin) for j, w in others), torch.zeros_like(begin))
            params.x[row] = begin + (end - begin - rest) / (weight * scale)

    def after_forge(self, arguments: Guided) -> Tensor:
        """After Forge's guidance; what it shall go on with."""
        denoised: Tensor = arguments["denoised"]
        unconditional, conditional = arguments["uncond_denoised"], arguments["cond_denoised"]
        guided = arguments.get("uncond") is not None
        if guided and self._may_be_skipped(arguments["model_options"]):
            guided = bool(unconditional.any())  # zeros stand in its place where it was
        if guided:
            strength = sum(entry.get("strength", 1) for entry in arguments["cond"])
            conditional = unconditional + strength * (conditional - unconditional)
        if self._carried_out(self._hand_over(conditional, unconditional if guided else None), conditional):
            denoised = self._guided_again(arguments)
        ruled = self._ruled(conditional, unconditional) if guided else {}
        denoised = denoised.clone() if ruled else denoised
        for image, wanted in ruled.items():
            denoised[image] = wanted[0].to(denoised)
        return denoised

    def end(self) -> None:
        """The batch is done."""
        self.release()
        self.controller.end()
        self.step = None

    def release(self) -> None:
        """The host's evaluation is over: it attends as usual again."""
        self._attending.close()

    @property
    def _step(self) -> Step:
        assert self.step is not None
        return self.step

    def _hand_over(self, conditional: Tensor | None, unconditional: Tensor | None, missing: str = "") -> Decision:
        """This evaluation, with both predictions by image as guidance has them."""
        x, sigma = self._host.scaled(self._step, self._step.x), self._host.sigma(self._step)
        seen = Evaluation(x, sigma, conditional, unconditional, self._negative_kind(), missing)
        return self.controller.evaluation(seen)

    def _carried_out(self, decision: Decision, conditional: Tensor) -> dict[int, Tensor]:
        """The denoised prediction [1, C, H, W] of each image that goes on with another conditioning than its own
        ``conditional`` one.

        Raises OtherNoise where the run begins again.
        """
        if isinstance(decision, Stop):
            from modules import shared

            for state in self.states:
                state.note("this run was ended at its first step, since it was flagged")
            if self._within:
                raise self.interruptions[0]  # ends this sampling alone
            shared.state.interrupt()
        if isinstance(decision, Restart):
            raise OtherNoise(self._host.unscaled(self._step, decision.moved))
        found: dict[int, Tensor] = {}
        for state in decision.states if isinstance(decision, Again) else ():
            with self.controller.faults(state):
                again = self._made_again(state, conditional)
                if state.sampled is not None:
                    found.update(zip(_images(state), again.split(1), strict=True))
        return found

    def _made_again(self, state: RunState, conditional: Tensor) -> Tensor:
        """The first evaluation since a mitigation, [B, C, H, W] denoised of this prompt's images: its first reading."""
        assert state.beginning is not None and state.before is not None
        begin = state.beginning
        found = conditional[_images(state)]
        if state.sampled is not None:
            with torch.no_grad():
                found = self.model(state)(begin.x, begin.sigma, state.sampled)
        kind = state.before.baseline or "empty prompt"
        self.controller.evaluation(Evaluation(begin.x, begin.sigma, found, begin.base, kind), (state,))
        return found

    def _parts(self) -> list[list[tuple[int, float]]]:
        """For each image its (row of the conditioning, weight): several where prompts are joined by AND."""
        from modules import prompt_parser

        denoiser = self._step.denoiser
        given = denoiser.sampler.sampler_extra_args["cond"]
        parts: list[list[tuple[int, float]]] = prompt_parser.reconstruct_multicond_batch(given, denoiser.step)[0]
        return parts

    def _may_be_skipped(self, options: Mapping[str, object] = MappingProxyType({})) -> bool:
        """Whether the negative prompt may have been left out of this evaluation, so that its result must be looked at.

        To look waits for the device, which the first evaluation does anyway. ``options`` are Forge's, of the model.
        """
        from modules import shared

        asked = shared.opts.data.get("skip_early_cond", 0), getattr(self._step.denoiser.sampler, "s_min_uncond", 0)
        changed = any(options.get(name) for name in ("sampler_pre_cfg_function", "conditioning_modifiers"))
        return self.evaluations == 0 or self.scale == 1 or any(asked) or changed

    def _negative_kind(self) -> Unconditional:
        return "negative prompt" if any(text.strip() for text in self.negatives) else "empty prompt"

    def _leave_to_the_refiner(self) -> None:
        """Another checkpoint samples from here on: it is not what was calibrated, and takes the prompt as it was typed."""
        for state in self.states:
            state.trace.skip(self._host.sigma(self._step)[0], "the refiner samples here, which is another checkpoint")
            if state.sampled is not None:
                state.note("the refiner sampled the last steps, from the prompt as it was typed")
        self.step = None

    def _attend(self, step: Step) -> None:
        """Where a mitigation has changed the attention, the host's next evaluation attends so."""
        rules = [state.sampled.attention for state in self.states if state.sampled is not None]
        if rules and rules[0] is not None:
            self._attending.enter_context(self._host.attending(step, rules[0]))

    def _ruled(self, conditional: Tensor, unconditional: Tensor) -> dict[int, Tensor]:
        """What the images of prompts with a rule for guidance go on with, [1, C, H, W] each."""
        found: dict[int, Tensor] = {}
        for state in self.states:
            if state.rule is None and not self._steered:
                continue
            with self.controller.faults(state):
                images = _images(state)
                own = self._step.of(images)
                x, sigma, common = self._host.scaled(own, own.x), self._host.sigma(own), self._host.common(own)
                both = common + conditional[images], common + unconditional[images]
                ask = partial(self.model(state), x, sigma)
                whole = GuidedStep(x, sigma, *both, self.scale, len(state.trace) - 1, ask)
                guided = self.controller.guided(state, whole)
                for place, image in enumerate(images):
                    if not torch.equal(guided[place], whole.plain[place]):  # else the host's own goes on, to the bit
                        found[image] = guided[place : place + 1] - common[place : place + 1]
        return found

    def _with(self, cond: Cond, states: list[RunState]) -> Cond:
        """A copy of the host's conditioning, with other rows for the images of these groups."""
        parts = self._parts()
        rows = (cond["crossattn"] if isinstance(cond, dict) else cond).clone()
        vector = cond["vector"].clone() if isinstance(cond, dict) else None
        for state in states:
            assert state.sampled is not None
            new = attended_rows(state.sampled).to(rows)
            if state.sampled.attention is not None:  # the only prompt of the batch: no other rows share its length
                rows = rows[:, :1].expand(-1, new.shape[1], -1).clone()
            longest = max(rows.shape[1], new.shape[1])
            rows, new = _lengthened(rows, longest), _lengthened(new, longest)
            for image in _images(state):
                place = parts[image][0][0]
                rows[place] = new[0]
                if vector is not None and "vector" in state.sampled.extras:
                    vector[place] = state.sampled.extras["vector"][0].to(vector)
        if not isinstance(cond, dict):
            return rows
        kind: Any = type(cond)  # the host asks its dictionaries for a shape: a copy of the same kind, filled anew
        swapped: Cond = kind({**cond, "crossattn": rows, "vector": vector}, rows.shape)
        return swapped

    def _guided_again(self, arguments: Guided) -> Tensor:
        """Forge's guidance once more for this step, with the changed conditionings."""
        from backend.sampling.sampling_function import sampling_function_inner

        swapped = self._with(self._step.text_cond, [state for state in self.states if state.sampled is not None])
        entries = []
        for entry in arguments["cond"]:
            conds = dict(entry["model_conds"])
            rows = swapped["crossattn"] if isinstance(swapped, dict) else swapped
            conds["c_crossattn"] = type(conds["c_crossattn"])(rows)
            if isinstance(swapped, dict):
                conds["y"] = type(conds["y"])(swapped["vector"])
            entries.append({**entry, "model_conds": conds})
        options = dict(arguments["model_options"])
        options["sampler_post_cfg_function"] = [f for f in options["sampler_post_cfg_function"] if not hasattr(f, MARK)]
        uncond, scale = arguments["uncond"], self.scale
        self._attend(self._step)
        try:
            again: Tensor = sampling_function_inner(
                arguments["model"], arguments["input"], arguments["sigma"], uncond, entries, scale, options
            )
        finally:
            self._attending.close()
        return again


class Run:
    """One run of the host's: its passes, and their reports."""

    def __init__(
        self,
        host: Host,
        monitoring: Monitoring,
        folder: Path,
        guard: Guard | None = None,
        within: bool = False,
        every_score: bool = False,
    ) -> None:
        """``folder`` holds the calibrations. With a ``guard`` every run is led away from its reference images.

        ``within`` says that another run is around this one; with ``every_score`` each evaluation is read for all scores.
        """
        self.host, self.monitoring, self.guard, self.within = host, monitoring, guard, within
        self._folder, self._every_score = folder, every_score
        self.passes: list[Pass] = []
        self._open: Pass | None = None

    def begin(self, p: Processing, from_image: bool) -> None:
        """A sampling begins; the hires fix begins a second one."""
        if self._open is not None and not self._open.evaluations:
            # Forge announces the hires pass twice.
            self.passes = [known for known in self.passes if known is not self._open]
        rule = None if self.guard is None else partial(rule_of, self.guard)
        self._open = Pass(self.host, p, self.monitoring, self._folder, from_image, rule, self.within, self._every_score)
        self.passes.append(self._open)
        if self.monitoring.changes_noise and not self._open.from_image:
            let_begin_again(p, partial(setattr, self._open, "may_begin_again"))

    def end(self) -> None:
        """The batch is done."""
        for known in self.passes:
            known.end()
        self._open = None

    def reports(self) -> list[tuple[str, int, Report]]:
        """(pass, image, its report) for the batch that was sampled last, in the order of the images."""
        found = [
            (known.title, image, Report.of(state).of_images([place]))
            for known in self.passes
            for state in known.states
            for place, image in enumerate(_images(state))
        ]
        return sorted(found, key=lambda entry: entry[1])

    def forget(self) -> None:
        """Before the next batch."""
        self.passes = []

    def evaluates(self, inner_model: object = None) -> bool:
        """Whether an evaluation of this run has begun and is not over; of this model of the host's, where it is given."""
        step = None if self._open is None else self._open.step
        return step is not None and (inner_model is None or step.denoiser.inner_model is inner_model)

    def before(self, params: Before) -> None:
        """Before an evaluation of the host."""
        known = self._open
        if known is None:
            return
        with known.controller.faults():
            known.step = None
            known.before(params, self.host.step(params))

    def after_automatic1111(self, params: After) -> None:
        """After an evaluation of Automatic1111 that :meth:`evaluates`."""
        with self._evaluated() as known:
            known.after_automatic1111(params)

    def after_forge(self, arguments: Guided) -> Tensor:
        """After Forge's guidance, of an evaluation that :meth:`evaluates`; what it shall go on with."""
        denoised: Tensor = arguments["denoised"]
        with self._evaluated() as known:
            denoised = known.after_forge(arguments)
        return denoised

    @contextmanager
    def _evaluated(self) -> Iterator[Pass]:
        known = self._open
        assert known is not None
        known.release()
        with known.controller.faults():
            yield known
        known.evaluations += 1
        known.step = None


def read_forge(p: Processing, after: Callable[[Guided], Tensor]) -> None:
    """Have Forge ask ``after`` what to go on with after guidance, on a clone of the unet that it drops after the run.

    Once, however often called.
    """
    unet = p.sd_model.forge_objects.unet
    if any(hasattr(f, MARK) for f in unet.model_options.get("sampler_post_cfg_function", [])):
        return
    unet = unet.clone()

    def read(arguments: Guided) -> Tensor:  # the host deep-copies what it finds: a method would bring us along
        return after(arguments)

    setattr(read, MARK, True)
    unet.set_model_sampler_post_cfg_function(read)
    p.sd_model.forge_objects.unet = unet


def _images(state: RunState) -> list[int]:
    """The places of a prompt's images in the batch."""
    assert state.images is not None
    return list(state.images)


def _repeated(step: Step, count: int) -> Step:
    """The step's level for each of the network's results."""
    level = step.level[:1].expand(count)
    return Step(step.denoiser, step.x, level, None, step.text_cond, None)


def _lengthened(rows: Tensor, length: int) -> Tensor:
    """Rows [B, N, D] with their last one repeated up to ``length``, as the host does with prompts of two lengths."""
    return (
        rows if rows.shape[1] == length else torch.cat([rows, rows[:, -1:].expand(-1, length - rows.shape[1], -1)], 1)
    )
