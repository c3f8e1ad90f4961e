"""The controller of one run, whatever the host: it takes each evaluation in, and decides how the run goes on.

A host is an adapter, :class:`Host`. It hands over an ``Evaluation`` after each model evaluation of its own
sampler, and carries out the decision that it is given:

- :class:`Go`: nothing changes.
- :class:`Stop`: the run ends here, with a sentence.
- :class:`Restart`: the run begins again from other noise.
- :class:`Again`: this evaluation is made again, and the run goes on, with what the states of these prompts say now
  (another conditioning, another attention). A mitigation that changes guidance is asked by :meth:`RunController.guided`.

Nothing here waits for the device but to stop or to mitigate, which needs the first step's score before the second step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..calibration.first_step import first_step_nulls
from ..calibration.ordinary_prompts import general_prompts
from ..calibration.profile import Profile, Setting
from ..core.conditioning import Conditioning, Unconditional
from ..core.denoiser import Evaluation, Model, Predictions
from ..core.guidance import GuidanceRule, GuidedStep
from ..core.sampling import predict
from ..mitigations import Outcome
from .faults import caught
from .monitoring import Monitoring
from .state import Beginning, Calibrating, RunState

# Of a setting's patches, those that name what is added and not what is in it: an image to follow, say.
CHANGING = {"control", "gligen", "hooks", "reference latents", "attn2", "patched attn2"}
NO_BASELINE = (
    "guidance gives nothing to measure against here, and the empty prompt needs the text encoder: encode the prompt "
    "with the Text Encode (Déjà Vu) node"
)
NO_ENCODER = "connect the text encoder (CLIP) to measure against the empty prompt"


@dataclass(frozen=True)
class Go:
    """The run goes on as it is."""


@dataclass(frozen=True)
class Stop:
    """The run ends here; ``sentence`` says why."""

    sentence: str


@dataclass(frozen=True)
class Restart:
    """The run begins again, ``moved`` [B, C, H, W] away from its x_T, in the denoiser's scale."""

    moved: Tensor


@dataclass(frozen=True)
class Again:
    """This evaluation is made again for these states, each with its ``sampled`` conditioning and ``rule``."""

    states: tuple[RunState, ...]


Decision = Go | Stop | Restart | Again
GO = Go()


AnyModel = TypeVar("AnyModel", bound=Model)


class Host(Protocol[AnyModel]):
    """All that a host has to write. ``state`` is the prompt that is meant; ``model`` is what :meth:`model` gave for it."""

    @property
    def interruptions(self) -> tuple[type[BaseException], ...]:
        """What the host itself raises to end a run."""
        ...

    def model(self, state: RunState) -> AnyModel:
        """The model as it is sampled now, for evaluations of our own on these images."""
        ...

    def prompt(self, state: RunState, model: AnyModel) -> Conditioning:
        """What the host samples the prompt with at this evaluation."""
        ...

    def unconditional(self, state: RunState, model: AnyModel, empty: bool) -> tuple[Conditioning, Unconditional] | None:
        """The empty prompt, or else what the host's own guidance measures against; None where that is not at hand."""
        ...

    def words(self, state: RunState, model: AnyModel) -> Conditioning | None:
        """The prompt with its words and tokens, as far as they can be told; the state is told what is missing."""
        ...

    def identity(self, state: RunState, model: AnyModel) -> tuple[Setting | None, Profile | None]:
        """What the scores depend on besides the prompt, and the calibration that was made for it."""
        ...

    def refuses_restart(self) -> str:
        """Why this run cannot begin again from other noise, after 'but this run'; empty where it can."""
        ...

    def progress(self) -> None:
        """Shows how far the run is. Waits for nothing."""
        ...


class RunController(Generic[AnyModel]):
    """One run: all of its prompts share each evaluation."""

    def __init__(
        self,
        host: Host[AnyModel],
        monitoring: Monitoring,
        states: Sequence[RunState],
        rule: Callable[[AnyModel], GuidanceRule] | None = None,
        explains_later: bool = False,
        ordinary: Callable[[AnyModel, int], Sequence[str]] = lambda model, count: general_prompts(count),
        keep: Callable[[Profile], object] = lambda made: None,
    ) -> None:
        """``rule`` makes a guidance rule for each prompt that no mitigation has given one. Where the run calibrates,
        ``ordinary`` gives so many ordinary prompts for the model, and ``keep`` keeps what was made of them; it may raise
        ValueError where it does not.

        With ``explains_later`` a flagged prompt's words are found when its score has arrived, which may be some
        evaluations later, or when :meth:`explain` is called: for a host whose model can still be asked then.
        """
        self.host, self.monitoring, self.states = host, monitoring, tuple(states)
        self._make_rule, self._explains_later = rule, explains_later
        self._ordinary, self._keep = ordinary, keep
        self._decided = False
        self._made: list[Profile] = []  # calibrations, by earlier prompts of this run
        self._unexplained: list[tuple[RunState, AnyModel]] = []

    # -------------------------------------------------------------------------------- the host

    def evaluation(self, seen: Evaluation, states: Sequence[RunState] | None = None) -> Decision:
        """Take one evaluation in, of all prompts or of ``states`` alone; how the run goes on."""
        for state in self.states if states is None else states:
            with self.faults(state):
                self._record(state, seen.of(state.images if states is None else None))
        decision: Decision = GO
        if not self._decided:
            with self.faults():
                decision = self._decide(seen)
            self._decided = True
        else:
            self.explain(wait=False)
        with self.faults():
            self.host.progress()
        return decision

    def guided(self, state: RunState, step: GuidedStep) -> Tensor:
        """The guided prediction [B, C, H, W] of a prompt's images: what its rule makes of it, or the host's own."""
        found = step.plain
        with self.faults(state):
            if state.rule is None and self._make_rule is not None:
                state.rule = self._make_rule(self.host.model(state))
            if state.rule is not None:
                found = state.rule(step)
        return found

    def explain(self, wait: bool = True) -> None:
        """Find the words that are wanted and not found yet: all, or of prompts whose score has arrived."""
        waiting, self._unexplained = self._unexplained, []
        for state, model in waiting:
            if wait or self.monitoring.explain == "always" or state.trace.ready(1):
                with self.faults(state):
                    self._explained(state, model)
            else:
                self._unexplained.append((state, model))

    def end(self, finished: bool = True) -> None:
        """The run is over; without ``finished`` it was interrupted. Nothing of the host is held any longer."""
        self._unexplained = []
        for state in self.states:
            state.finished = state.finished or finished
            state.beginning = state.sampled = state.rule = None
            if state.outcome is not None:  # the way back through a text encoder would hold it
                conditioning = replace(state.outcome.conditioning, reencoding=None)
                state.outcome = replace(state.outcome, conditioning=conditioning)
            with self.faults(state):
                state.settle()

    def faults(self, state: RunState | None = None) -> AbstractContextManager[None]:
        """Catches our own faults; those of one prompt, or of the run, are told with its verdicts."""
        states = self.states if state is None else (state,)

        def tell(text: str) -> bool:
            new = any(text not in known.notes for known in states)
            for known in states:
                known.note(text)
            return new

        return caught(self.host.interruptions, tell)

    # --------------------------------------------------------------------------------- reading

    def _record(self, state: RunState, seen: Evaluation) -> None:
        found = seen.missing or self._predictions(state, seen)
        if isinstance(found, str):
            state.trace.skip(seen.sigma[0], found)
            return
        if not self._decided:
            state.beginning = Beginning(seen.x, seen.sigma, found.unconditional)
        state.trace.record(found)

    def _predictions(self, state: RunState, seen: Evaluation) -> Predictions | str:
        """Both predictions, with evaluations of our own for what guidance did not give; or why there are none."""
        conditional, unconditional, kind = seen.conditional, seen.unconditional, seen.kind
        if conditional is None or unconditional is None or self._replaced(kind):
            if not state.measures_next():
                return "guidance does not tell it here, and only the steps of the score are measured"
            model = self.host.model(state)
            if (baseline := self._baseline(state, model, seen)) is not None:
                unconditional, kind = predict(model, seen.x, seen.sigma, baseline[0]), baseline[1]
            elif unconditional is None:
                return NO_BASELINE
            else:
                state.note(f"measured against the {kind}: {NO_ENCODER}")
            if conditional is None:
                conditional = predict(model, seen.x, seen.sigma, self.host.prompt(state, model))
        return Predictions(conditional, unconditional, seen.sigma, kind)

    def _baseline(
        self, state: RunState, model: AnyModel, seen: Evaluation
    ) -> tuple[Conditioning, Unconditional] | None:
        """What to predict with in the place of what guidance gave; None where nothing better is at hand."""
        own, kind = None, seen.kind
        if seen.unconditional is None and (own := self.host.unconditional(state, model, empty=False)) is not None:
            kind = own[1]
        if self._replaced(kind) or (own is None and seen.unconditional is None):
            return self.host.unconditional(state, model, empty=True) or own
        return own

    def _replaced(self, kind: Unconditional) -> bool:
        """Whether the empty prompt takes the place of such an unconditional prediction, where it is at hand.

        No calibration can be made against what no text encodes to.
        """
        wanted = self.monitoring.baseline == "empty prompt" and kind != "empty prompt"
        return wanted or kind in ("zeroed prompt", "prompt left out")

    # -------------------------------------------------------------------------------- deciding

    def _decide(self, seen: Evaluation) -> Decision:
        """At the first evaluation: judge, explain, and stop or mitigate where that is asked for."""
        models: list[tuple[RunState, AnyModel]] = []
        for state in self.states:
            with self.faults(state):
                model = self.host.model(state)
                state.setting, state.profile = self.host.identity(state, model)
                models.append((state, model))
                self._calibrate(state, model)
        self.host.progress()
        wanted = self.monitoring
        if wanted.when_flagged == "report" and wanted.explain == "never":
            for state in self.states:
                state.beginning = None
            return GO  # nothing to decide, so nothing is waited for
        measured = [(state, model) for state, model in models if state.beginning is not None]
        if wanted.when_flagged == "report":
            self._unexplained = measured
            self.explain(wait=not self._explains_later)
            for state, _ in self._unexplained:
                assert state.beginning is not None
                state.beginning = state.beginning.kept()
            return GO
        changed, moved = [], torch.zeros_like(seen.x)
        for state, model in measured:
            with self.faults(state):
                words = self._explained(state, model)
                if not state.is_flagged():
                    continue
                if wanted.when_flagged == "stop":
                    state.stopped = True
                    self.host.progress()
                    return Stop(_stop_sentence(state))
                outcome = self._mitigated(state, model, words)
                if outcome is not None and outcome.x is not None:
                    assert state.beginning is not None
                    moved[slice(None) if state.images is None else list(state.images)] = outcome.x.to(
                        moved
                    ) - state.beginning.x.to(moved)
                elif outcome is not None:
                    changed.append(state)
        if moved.any():
            for state in self.states:
                state.begin_again()
            return Restart(moved)
        return Again(tuple(changed)) if changed else GO

    def _calibrate(self, state: RunState, model: AnyModel) -> None:
        """Where that is asked for and no calibration fits: measure ordinary prompts now, as this prompt was measured."""
        begin, count = state.beginning, self.monitoring.calibrate_first
        if not count or begin is None or not state.lacks_calibration(len(begin.x)):
            return
        assert state.setting is not None
        if state.setting.begins_with != "noise":
            raise ValueError("ordinary prompts are measured from noise, and this run begins with an image")
        for made in self._made:
            before, state.profile = state.profile, made
            if not state.lacks_calibration(len(begin.x)):
                return
            state.profile = before
        base = self._measured_against(state, model)
        assert base is not None
        prompts, images = self._ordinary(model, count), len(begin.x)
        at_once = max(2, 2 * images)  # as many as the host evaluates together, both of whose predictions fit

        def on_prompt() -> None:
            assert state.calibrating is not None
            state.calibrating = replace(state.calibrating, done=state.calibrating.done + 1)
            self.host.progress()

        state.calibrating = Calibrating(0, count)
        try:
            self.host.progress()
            with torch.no_grad():
                nulls = first_step_nulls(model, prompts, base[0], float(begin.sigma[0]), images, at_once, on_prompt)
        finally:
            state.calibrating = None
        setting = replace(state.setting, baseline=state.trace.baseline or base[1])
        state.profile = Profile(setting, tuple(nulls.values()), ordinary="generated")
        self._made.append(state.profile)
        if changing := sorted(set(state.setting.patches.split(", ")) & CHANGING):
            raise ValueError(
                f"the calibration is of this run alone and is not kept: {', '.join(changing)} may be another in the next"
            )
        self._keep(state.profile)

    def _measured_against(self, state: RunState, model: AnyModel) -> tuple[Conditioning, Unconditional] | None:
        """What the first reading was measured against, or the next best thing that is at hand."""
        found = self.host.unconditional(state, model, empty=False)
        if found is None or found[1] != state.trace.baseline:
            found = self.host.unconditional(state, model, empty=True) or found
        return found

    def _mitigated(self, state: RunState, model: AnyModel, words: Conditioning | None) -> Outcome | None:
        """What a flagged prompt goes on with; None where its conditioning cannot be told apart."""
        if self.monitoring.changes_noise and (why := self.host.refuses_restart()):
            raise ValueError(
                f"{self.monitoring.mitigation} changes the noise that a run begins with, but this run {why}: choose another "
                "mitigation"
            )
        conditioning = words or self.host.words(state, model)
        if conditioning is None:
            return None
        unconditional = self._measured_against(state, model)
        assert state.beginning is not None
        outcome = state.find_mitigation(
            model, conditioning, state.beginning, None if unconditional is None else unconditional[0]
        )
        if outcome.attention is not None and len(self.states) > 1:
            raise ValueError("attention can only be changed where all images of a batch have one prompt")
        state.mitigated(outcome)
        state.rule = outcome.rule() if outcome.rule else state.rule
        state.sampled = outcome.conditioning if outcome.conditioning is not conditioning else None
        return outcome

    def _explained(self, state: RunState, model: AnyModel) -> Conditioning | None:
        """Explain a prompt if that is wanted; the conditioning that was explained. Waits for its score."""
        wanted = self.monitoring.explain
        if wanted == "never" or (wanted == "flagged" and not state.is_flagged()):
            return None
        conditioning = self.host.words(state, model)
        if conditioning is not None:
            assert state.beginning is not None
            with self.faults(state):
                state.find_words(model, conditioning, state.beginning)
        return conditioning


def _stop_sentence(state: RunState) -> str:
    from ..report.wording import sentence

    verdicts = state.verdicts(state.monitoring.deciding)
    worst = min((v for v in verdicts if v.p_value is not None), key=lambda v: v.p_value or 0.0)
    return (
        f"Déjà Vu ended this run at its first step. {sentence(worst)}. Nothing is broken: change the prompt, or set the "
        "monitor to report."
    )
