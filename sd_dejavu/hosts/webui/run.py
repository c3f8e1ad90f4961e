"""Watching the sampling of Automatic1111 and Forge through their own callbacks.

Nothing of the host is patched: Automatic1111 calls back before and after each evaluation, Forge before it and, on a
clone of its unet, after guidance. Conditionings that the host caches are never changed, only replaced for one step.
Where a remedy may change the noise, the function of the run's own sampler is ours until it is called (noise.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...calibration import store
from ...calibration.profile import Setting
from ...conditioning import Conditioning, Unconditional
from ...denoiser import Predictions
from ...guidance import GuidanceRule, GuidedStep
from ...memory import ran_out, release
from ...mitigations.guard import Guard
from ...monitor import Monitoring, Report, Watch, flagged
from ...trace import Trace
from .guidance import Automatic1111, Cond, Forge, GuidedModel, Step, attended_rows, checkpoint_of, cond_of, rows_of
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


def drawn(p: Any) -> Any:
    """What the host draws in a run that we have made. Raises ValueError in one line where it cannot."""
    from modules import processing

    try:
        return processing.process_images(p)
    except Exception as error:
        log.warning("[Déjà Vu] the host could not draw", exc_info=True)
        if ran_out(error):
            release()
            raise ValueError("there was not enough memory: choose a smaller size, or fewer pictures") from error
        raise ValueError(f"the host could not draw: {type(error).__name__}: {error}") from error


@dataclass
class Group:
    """The pictures of a batch that share a prompt."""

    prompt: str
    images: list[int]
    watch: Watch
    unconditional: Conditioning | None = None  # what the first evaluation is measured against
    instead: Conditioning | None = None  # what is sampled since a mitigation
    rule: GuidanceRule | None = None  # in place of plain guidance


@dataclass
class Pass:
    """One sampling of one batch: the first pass, or that of the hires fix."""

    groups: list[Group]
    negatives: list[str]
    scale: float
    steps: int
    sampler: str
    from_picture: bool
    title: str
    first_steps: int  # of the first pass, as the host counts them: its prompt editing goes by them
    evaluations: int = 0
    acted: bool = False  # judged, and mitigated where that was asked for
    may_begin_again: bool = False  # from other noise, now
    step: Step | None = field(default=None, repr=False)
    drawn_by: str | None = None  # the checkpoint that its first evaluation was of


class Run:
    """One press of the button: reads its evaluations, acts at the first of each pass, and keeps the reports."""

    def __init__(self, host: Host, monitoring: Monitoring, folder: Path, guard: Guard | None = None) -> None:
        """``folder`` holds the calibrations. With a ``guard`` every run is led away from its reference pictures."""
        self.host, self.monitoring, self.guard = host, monitoring, guard
        self._folder = folder
        self.passes: list[Pass] = []
        self._open: Pass | None = None
        self._p: Any = None  # the host's processing object, whose evaluations are ours to read
        self._attending = ExitStack()  # while the host evaluates

    # ------------------------------------------------------------------------------- passes

    def begin(self, p: Any, from_picture: bool) -> None:
        """A sampling begins; the hires fix begins a second one. ``p`` is the host's processing object."""
        hires = bool(getattr(p, "is_hr_pass", False))
        prompts = (getattr(p, "hr_prompts", None) if hires else None) or p.prompts
        negatives = (getattr(p, "hr_negative_prompts", None) if hires else None) or p.negative_prompts
        groups: dict[str, Group] = {}
        for image, prompt in enumerate(prompts):
            known = groups.setdefault(prompt, Group(prompt, [], Watch(self.monitoring, prompt)))
            known.images.append(image)
        scale = float(getattr(p, "hr_cfg", 0) or p.cfg_scale) if hires else float(p.cfg_scale)
        name = (getattr(p, "hr_sampler_name", None) if hires else None) or p.sampler_name
        steps = (getattr(p, "hr_second_pass_steps", 0) if hires else 0) or p.steps
        first_steps = int(getattr(p, "firstpass_steps", 0) or p.steps)
        self._p = p
        title = HIRES if hires else "first pass"
        if self._open is not None and not self._open.evaluations:
            # Forge announces the hires pass twice.
            self.passes = [known for known in self.passes if known is not self._open]
        from_picture = from_picture or hires
        self._open = Pass(
            list(groups.values()), list(negatives), scale, steps, str(name), from_picture, title, first_steps
        )
        self.passes.append(self._open)
        if self.monitoring.changes_noise and not self._open.from_picture:
            let_begin_again(p, partial(setattr, self._open, "may_begin_again"))

    def attach(self, p: Any) -> None:
        """Forge: read guidance on a clone of the unet, which the host drops after the run. Once, however often called."""
        unet = p.sd_model.forge_objects.unet
        if any(hasattr(f, MARK) for f in unet.model_options.get("sampler_post_cfg_function", [])):
            return
        unet = unet.clone()

        def read(
            arguments: dict[str, Any],
        ) -> Tensor:  # the host deep-copies what it finds: a method would bring us along
            return self.after_forge(arguments)

        setattr(read, MARK, True)
        unet.set_model_sampler_post_cfg_function(read)
        p.sd_model.forge_objects.unet = unet

    def end(self) -> None:
        """The batch is done."""
        self._attending.close()
        for known in self.passes:
            for group in known.groups:
                group.watch.finished, group.watch.base, group.unconditional = True, None, None
            known.step = None
        self._open = None

    def reports(self) -> list[tuple[str, int, Report]]:
        """(pass, picture, its report) for the batch that was sampled last, in the order of the pictures."""
        found = [
            (known.title, image, Report.of(group.watch).of_images([place]))
            for known in self.passes
            for group in known.groups
            for place, image in enumerate(group.images)
        ]
        return sorted(found, key=lambda entry: entry[1])

    def forget(self) -> None:
        """Before the next batch."""
        self.passes = []

    # ------------------------------------------------------------------------------ callbacks

    def before(self, params: Any) -> None:
        """Before an evaluation: note it, and put in what is sampled instead."""
        if self._open is None:
            return
        with self._guarded():
            self._open.step = None
            step = self.host.step(params)
            if step.denoiser.p is not self._p:
                return  # another extension draws something of its own in the midst of this run
            self._open.step = step
            drawn_by = checkpoint_of(step.sd_model)
            self._open.drawn_by = self._open.drawn_by or drawn_by
            if drawn_by != self._open.drawn_by:
                self._leave_to_the_refiner()
                return
            changed = [group for group in self._open.groups if group.instead is not None]
            if changed:
                params.text_cond = self._with(step.text_cond, self._parts(step), changed)
                self._attend(step)

    def after_automatic1111(self, params: Any) -> None:
        """After an evaluation of Automatic1111: ``params.x`` holds the network's results, the negative prompt's last."""
        self._attending.close()
        if self._open is None or self._open.step is None:
            return
        with self._guarded():
            step = self._open.step
            images = step.x.shape[0]
            parts = self._parts(step)
            if params.x.shape[0] != images + sum(len(part) for part in parts):
                self._skip("this model edits pictures, its guidance is of another kind")
            else:
                results = self.host.denoised(_repeated(step, params.x.shape[0]), params.x)
                without = results[-images:]
                joined = [without[i] + sum(w * (results[j] - without[i]) for j, w in parts[i]) for i in range(images)]
                first = torch.stack([results[part[0][0]] for part in parts])
                groups = self._open.groups
                matters = (
                    groups[0].watch.measures(self._open.evaluations)
                    or self.guard is not None
                    or any(group.rule for group in groups)
                )
                # Where the negative prompt is skipped, the prompt's own result stands in its place.
                guided = not (matters and self._may_be_skipped() and torch.equal(first, without))
                if guided:
                    self._record(torch.stack(joined), without)
                else:
                    self._measure_apart(step, torch.stack(joined))
                for image, found in self._act(step, parts).items():
                    params.x[parts[image][0][0]] = self.host.output(step.of([image]), found)[0].to(params.x)
                ruled = self._ruled(step, torch.stack(joined), without) if guided else {}
                for image, wanted in ruled.items():
                    # The host guides on: it is given the result with the prompt from which it comes to what is wanted.
                    (row, weight), *others = parts[image]
                    scale = self._open.scale * step.denoiser.cond_scale_miltiplier
                    begin, end = params.x[image - images], self.host.output(step.of([image]), wanted)[0].to(params.x)
                    rest = sum((w * scale * (params.x[j] - begin) for j, w in others), torch.zeros_like(begin))
                    params.x[row] = begin + (end - begin - rest) / (weight * scale)
        self._open.evaluations += 1

    def after_forge(self, arguments: dict[str, Any]) -> Tensor:
        """After Forge's guidance; what it shall go on with."""
        self._attending.close()
        denoised: Tensor = arguments["denoised"]
        if self._open is None or self._open.step is None:
            return denoised
        with self._guarded():
            step = self._open.step
            parts = self._parts(step)
            without, conditional = arguments["uncond_denoised"], arguments["cond_denoised"]
            guided = arguments.get("uncond") is not None
            if guided and self._may_be_skipped(arguments["model_options"]):
                guided = bool(without.any())  # zeros stand in its place where it was
            if guided:
                strength = sum(entry.get("strength", 1) for entry in arguments["cond"])
                conditional = without + strength * (conditional - without)
                self._record(conditional, without)
            else:
                self._measure_apart(step, conditional)
            if self._act(step, parts):
                denoised = self._guided_again(arguments)
            ruled = self._ruled(step, conditional, without) if guided else {}
            denoised = denoised.clone() if ruled else denoised
            for image, wanted in ruled.items():
                denoised[image] = wanted[0].to(denoised)
        self._open.evaluations += 1
        return denoised

    # -------------------------------------------------------------------------------- reading

    def _parts(self, step: Step) -> list[list[tuple[int, float]]]:
        """For each picture its (row of the conditioning, weight): several where prompts are joined by AND."""
        from modules import prompt_parser

        given = step.denoiser.sampler.sampler_extra_args["cond"]
        parts: list[list[tuple[int, float]]] = prompt_parser.reconstruct_multicond_batch(given, step.denoiser.step)[0]
        return parts

    def _may_be_skipped(self, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Whether the negative prompt may have been left out of this evaluation, so that its result must be looked at.

        To look waits for the device, which the first evaluation does anyway. ``options`` are Forge's, of the model.
        """
        from modules import shared

        known = self._open
        assert known is not None and known.step is not None
        asked = shared.opts.data.get("skip_early_cond", 0), getattr(known.step.denoiser.sampler, "s_min_uncond", 0)
        changed = any(options.get(name) for name in ("sampler_pre_cfg_function", "conditioning_modifiers"))
        return known.evaluations == 0 or known.scale == 1 or any(asked) or changed

    def _record(self, conditional: Tensor, without: Tensor) -> None:
        """Both predictions of a step, by picture, as guidance has them: measured against the negative prompt."""
        known = self._open
        assert known is not None and known.step is not None
        if self._negative_kind() == "negative prompt" and self.monitoring.without == "empty prompt":
            self._measure_apart(known.step, conditional)
            return
        assert known.step.text_uncond is not None
        self._keep(known.step, conditional, without, self._negative_kind(), known.step.text_uncond)

    def _negative_kind(self) -> Unconditional:
        assert self._open is not None
        return "negative prompt" if any(text.strip() for text in self._open.negatives) else "empty prompt"

    def _keep(self, step: Step, conditional: Tensor, without: Tensor, kind: Unconditional, unconditional: Cond) -> None:
        """``unconditional`` is what ``without`` was predicted with, a row for each picture."""
        assert self._open is not None
        sigma = self.host.sigma(step)
        for group in self._open.groups:
            own = group.images
            group.watch.trace.record(Predictions(conditional[own], without[own], sigma[own], kind))
            if self._open.evaluations == 0:
                group.watch.base, group.unconditional = without[own].float(), rows_of(unconditional, own)

    def _measure_apart(self, step: Step, conditional: Tensor) -> None:
        """An evaluation of our own where guidance has none to read, at the steps of the score only."""
        assert self._open is not None
        if not self._open.groups[0].watch.measures(self._open.evaluations):
            self._skip("guidance is off here, and only the steps of the score are measured")
            return
        model = GuidedModel(self.host, step, [float(self.host.sigma(step)[0]), 0.0])
        kind: Unconditional
        with torch.no_grad():
            x = self.host.scaled(step, step.x)
            if self.monitoring.without == "negative prompt" and step.text_uncond is not None:
                unconditional, kind = step.text_uncond, self._negative_kind()
            else:
                unconditional, kind = cond_of(model.encode(""), x.shape[0], step.text_cond), "empty prompt"
            without = self.host.predict(step, x, unconditional)
        self._keep(step, conditional, without, kind, unconditional)

    def _leave_to_the_refiner(self) -> None:
        """Another checkpoint draws from here on: it is not what was calibrated, and takes the prompt as it was typed."""
        assert self._open is not None
        self._skip("the refiner draws here, which is another checkpoint")
        for group in self._open.groups:
            if group.instead is not None:
                group.watch.note("the refiner drew the last steps, from the prompt as it was typed")
        self._open.step = None

    def _skip(self, why: str) -> None:
        assert self._open is not None and self._open.step is not None
        for group in self._open.groups:
            group.watch.trace.skip(self.host.sigma(self._open.step)[0], why)

    # --------------------------------------------------------------------------------- acting

    def _act(self, step: Step, parts: list[list[tuple[int, float]]]) -> dict[int, Tensor]:
        """At the first evaluation: judge, explain, mitigate.

        The denoised prediction [1, C, H, W] of each picture whose prompt was mitigated by another conditioning.
        Raises OtherNoise where one was mitigated by other noise.
        """
        known = self._open
        assert known is not None
        if known.evaluations or known.acted:
            return {}
        known.acted = True
        sigma = float(self.host.sigma(step)[0])
        model = GuidedModel(self.host, step, [sigma] + [0.0] * known.steps)
        changed: dict[int, Tensor] = {}
        moved = torch.zeros_like(step.x)
        for group in known.groups:
            watch = group.watch
            watch.setting = self._setting(model, known, watch)
            watch.profile = store.find_for_monitor(
                watch.setting, self.monitoring.score, model.brought_along, self._folder
            )
            wanted = self.monitoring
            if wanted.when_flagged == "report" and wanted.explain == "never":
                continue  # nothing to decide now, so nothing is waited for
            is_flagged = bool(flagged(watch.verdicts("first step")))
            explaining = wanted.explain == "always" or (wanted.explain == "flagged" and is_flagged)
            mitigating = is_flagged and wanted.when_flagged == "mitigate"
            if watch.base is not None and (explaining or mitigating):
                with self._guarded(group):
                    conditioning = self._conditioning(model, group, parts)
                    own = step.of(group.images)
                    own_model = GuidedModel(self.host, own, model.sigmas(known.steps))
                    x, level = self.host.scaled(own, own.x), self.host.sigma(own)
                    if explaining and conditioning is not None:
                        with self._guarded(group):
                            watch.look_at_words(own_model, conditioning, x, level, watch.base)
                    if mitigating and conditioning is not None:
                        self._check_noise(known)
                        outcome = watch.find_remedy(own_model, conditioning, x, level, watch.base, group.unconditional)
                        group.rule = outcome.rule() if outcome.rule else None
                        if outcome.conditioning is not conditioning:
                            group.instead = self._fitting(outcome.conditioning)
                        if outcome.x is not None:
                            moved[group.images] = self.host.unscaled(own, outcome.x.to(x) - x).to(moved)
                        else:
                            found = self._first_of(own_model, group, outcome.conditioning, x, level)
                            if group.instead is not None:
                                changed.update(zip(group.images, found.split(1), strict=True))
            if is_flagged and wanted.when_flagged == "stop":
                from modules import shared

                watch.stopped = True
                watch.note("this run was ended at its first step, since it was flagged")
                shared.state.interrupt()
        if moved.any():
            for group in known.groups:
                group.watch.trace = Trace()  # of the run that is drawn
            raise OtherNoise(moved)
        return changed

    def _check_noise(self, known: Pass) -> None:
        """Raises ValueError where the remedy changes the noise, and this run cannot begin again."""
        if not self.monitoring.changes_noise or known.may_begin_again:
            return
        why = "begins with a picture" if known.from_picture else "is sampled in a way that cannot begin again"
        raise ValueError(
            f"{self.monitoring.remedy} changes the noise that a run begins with, but this one {why}: choose another "
            "remedy"
        )

    def _fitting(self, conditioning: Conditioning) -> Conditioning:
        """Raises ValueError for a change of attention in a batch of several prompts, whose rows share one length."""
        assert self._open is not None
        if conditioning.attention is not None and len(self._open.groups) > 1:
            raise ValueError("attention can only be changed where all pictures of a batch have one prompt")
        return conditioning

    def _first_of(self, model: GuidedModel, group: Group, sampled: Conditioning, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised prediction [B, C, H, W] of a mitigated prompt, which is also the first reading of it."""
        assert group.watch.base is not None
        with torch.no_grad():
            found = model(x, sigma, sampled)
        before = group.watch.before
        kind = before.without if before is not None and before.without else "empty prompt"
        group.watch.trace.record(Predictions(found, group.watch.base, sigma, kind))
        return found

    def _attend(self, step: Step) -> None:
        """Where a mitigation has changed the attention, the host's next evaluation attends so."""
        assert self._open is not None
        rules = [group.instead.attention for group in self._open.groups if group.instead is not None]
        if rules and rules[0] is not None:
            self._attending.enter_context(self.host.attending(step, rules[0]))

    def _ruled(self, step: Step, conditional: Tensor, without: Tensor) -> dict[int, Tensor]:
        """What the pictures of prompts with a rule for guidance go on with, [1, C, H, W] each."""
        known = self._open
        assert known is not None
        found: dict[int, Tensor] = {}
        for group in known.groups:
            if group.rule is None and self.guard is None:
                continue
            with self._guarded(group):
                own = step.of(group.images)
                x, sigma, common = self.host.scaled(own, own.x), self.host.sigma(own), self.host.common(own)
                model = GuidedModel(self.host, own, [float(sigma[0]), 0.0])
                if group.rule is None and self.guard is not None:
                    group.rule = rule_of(self.guard, model)
                both = common + conditional[group.images], common + without[group.images]
                whole = GuidedStep(x, sigma, *both, known.scale, known.evaluations, partial(model, x, sigma))
                assert group.rule is not None
                guided = group.rule(whole)
                for place, image in enumerate(group.images):
                    if not torch.equal(guided[place], whole.plain[place]):  # else the host's own goes on, to the bit
                        found[image] = guided[place : place + 1] - common[place : place + 1]
        return found

    def _setting(self, model: GuidedModel, known: Pass, watch: Watch) -> Setting:
        without = watch.trace.without or self.monitoring.without
        return Setting(
            model.fingerprint,
            model.prediction_type,
            model.latent_shape,
            known.steps,
            model.sigmas(known.steps)[0],
            known.scale,
            without,
            " | ".join(dict.fromkeys(known.negatives)) if without == "negative prompt" else "",
            "a picture" if known.from_picture else "noise",
            known.sampler,
            model.patches,
        )

    def _conditioning(
        self, model: GuidedModel, group: Group, parts: list[list[tuple[int, float]]]
    ) -> Conditioning | None:
        """What the host sampled this prompt with, with words where they can be told."""
        from modules import prompt_parser, shared

        assert self._open is not None and self._open.step is not None
        own = parts[group.images[0]]
        if len(own) != 1:
            group.watch.note(f"the prompt is joined from {len(own)} by AND, so its words are not told apart")
            return None
        known = self._open
        hires_steps = known.steps if known.title == HIRES else None
        old = bool(shared.opts.data.get("use_old_scheduling", False))
        schedules = prompt_parser.get_learned_conditioning_prompt_schedules
        schedule = schedules([group.prompt], known.first_steps, hires_steps, old)[0]
        if len(schedule) > 1:
            group.watch.note("the prompt changes during the run; what is said here is of its first part")
        text = group.watch.prompt = schedule[0][1]
        sampled = rows_of(self._open.step.text_cond, [own[0][0]])
        try:
            found = model.encode(text)
        except ValueError as error:
            group.watch.note(str(error))
            return sampled
        shared_rows = min(found.rows.shape[1], sampled.rows.shape[1])
        fits = torch.allclose(
            found.rows[:, :shared_rows].to(sampled.rows), sampled.rows[:, :shared_rows], atol=2e-2, rtol=2e-2
        )
        if not fits:
            group.watch.prompt = ""
            group.watch.note("another extension changes the conditioning, so the prompt's tokens are numbered")
            return sampled
        return found

    def _with(self, cond: Cond, parts: list[list[tuple[int, float]]], groups: list[Group]) -> Cond:
        """A copy of the host's conditioning, with other rows for the pictures of these groups."""
        rows = (cond["crossattn"] if isinstance(cond, dict) else cond).clone()
        vector = cond["vector"].clone() if isinstance(cond, dict) else None
        for group in groups:
            assert group.instead is not None
            new = attended_rows(group.instead).to(rows)
            if group.instead.attention is not None:  # the only prompt of the batch: no other rows share its length
                rows = rows[:, :1].expand(-1, new.shape[1], -1).clone()
            longest = max(rows.shape[1], new.shape[1])
            rows, new = _lengthened(rows, longest), _lengthened(new, longest)
            for image in group.images:
                place = parts[image][0][0]
                rows[place] = new[0]
                if vector is not None and "vector" in group.instead.extras:
                    vector[place] = group.instead.extras["vector"][0].to(vector)
        if not isinstance(cond, dict):
            return rows
        kind: Any = type(cond)  # the host asks its dictionaries for a shape: a copy of the same kind, filled anew
        swapped: Cond = kind({**cond, "crossattn": rows, "vector": vector}, rows.shape)
        return swapped

    def _guided_again(self, arguments: dict[str, Any]) -> Tensor:
        """Forge's guidance once more for this step, with the changed conditionings."""
        from backend.sampling.sampling_function import sampling_function_inner

        known = self._open
        assert known is not None and known.step is not None
        groups = [group for group in known.groups if group.instead is not None]
        swapped = self._with(known.step.text_cond, self._parts(known.step), groups)
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
        uncond, scale = arguments["uncond"], known.scale
        self._attend(known.step)
        try:
            again: Tensor = sampling_function_inner(
                arguments["model"], arguments["input"], arguments["sigma"], uncond, entries, scale, options
            )
        finally:
            self._attending.close()
        return again

    # --------------------------------------------------------------------------------- faults

    @contextmanager
    def _guarded(self, group: Group | None = None) -> Iterator[None]:
        """Our own faults never cost a picture; the host's interruption passes."""
        from modules import sd_samplers_common

        try:
            yield
        except sd_samplers_common.InterruptedException:
            raise
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
                text = "there was not enough memory: choose 'remove-trigger', or a smaller batch"
            else:
                text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            groups = [group] if group is not None else self._open.groups if self._open is not None else []
            if any(text not in g.watch.notes for g in groups):  # a fault of every step is told once
                log.warning("[Déjà Vu] no verdict: %s", text, exc_info=not isinstance(error, ValueError))
            for known in groups:
                known.watch.note(text)


def _repeated(step: Step, count: int) -> Step:
    """The step's level for each of the network's results."""
    level = step.level[:1].expand(count)
    return Step(step.denoiser, step.x, level, None, step.text_cond, None)


def _lengthened(rows: Tensor, length: int) -> Tensor:
    """Rows [B, N, D] with their last one repeated up to ``length``, as the host does with prompts of two lengths."""
    return (
        rows if rows.shape[1] == length else torch.cat([rows, rows[:, -1:].expand(-1, length - rows.shape[1], -1)], 1)
    )
