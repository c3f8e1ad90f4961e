"""What is known of one prompt's images in one run: its trace, its verdicts, and what was explained and mitigated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.profile import ORDINARY_QUANTILE, Profile, Setting
from ..core.conditioning import Conditioning, Unconditional, by_position
from ..core.denoiser import Model
from ..core.gradients import with_gradients
from ..core.guidance import GuidanceRule
from ..core.trace import NotMeasured, Trace
from ..core.verdict import Explanation, Verdict
from ..detectors import reads, scores
from ..explain import confirmed_gradient, leave_one_out, output_gradient
from ..mitigations import Outcome, Start
from .judge import NOTHING_TO_COMPARE, judge
from .monitoring import Monitoring, method_for


@dataclass(frozen=True)
class Beginning:
    """The first evaluation of a run: x [B, C, H, W] at sigma [B], and the denoised prediction without the prompt there."""

    x: Tensor
    sigma: Tensor
    base: Tensor

    def kept(self) -> Beginning:
        """The same for later, whatever the host does with its tensors."""
        return replace(self, x=self.x.clone(), sigma=self.sigma.clone(), base=self.base.clone())


@dataclass(frozen=True)
class Calibrating:
    """How far a calibration is that is made within a run: ordinary prompts measured, of how many."""

    done: int
    count: int


@dataclass
class RunState:
    """The images of one prompt in a run, of which ``images`` are the places in the batch (None: all of it).

    ``before`` is the trace up to a mitigation, where there was one; ``trace`` is what was sampled. Since a mitigation
    the run goes on with ``sampled`` and under ``rule``, where they are given.
    """

    monitoring: Monitoring
    prompt: str = ""
    setting: Setting | None = None
    profile: Profile | None = None
    images: tuple[int, ...] | None = None
    every_score: bool = False  # read for all scores that there are, as a calibration does
    trace: Trace = field(init=False)
    before: Trace | None = None
    explanation: Explanation | None = None
    outcome: Outcome | None = None
    notes: list[str] = field(default_factory=list)
    finished: bool = False
    stopped: bool = False  # ended by us at its first step
    calibrating: Calibrating | None = None  # while its own calibration is being made
    beginning: Beginning | None = field(default=None, repr=False)
    sampled: Conditioning | None = field(default=None, repr=False)
    rule: GuidanceRule | None = field(default=None, repr=False)
    pixels_a_cell: int = 8  # of the image, to each cell of the latent
    prompt_node: str | None = None  # the node of the host's workflow that holds the prompt

    def __post_init__(self) -> None:
        self.begin_again()

    def begin_again(self) -> None:
        """Readings from here on are of another run."""
        self.trace = Trace(reads() if self.every_score else reads(self.monitoring.score))

    def measures_next(self) -> bool:
        """Whether the score needs the next evaluation."""
        needed = None if self.every_score else scores()[self.monitoring.score].evaluations
        return needed is None or len(self.trace) < needed

    def note(self, text: str) -> None:
        """Something that went wrong or was left out, once."""
        if text not in self.notes:
            self.notes.append(text)

    def settle(self) -> None:
        """The run is over, or another thread shall read it: all of its numbers are on their way, without waiting."""
        self.trace.settle()
        if self.before is not None:
            self.before.settle()

    def so_far(self) -> RunState:
        """The state as it stands, for another thread: what the run adds does not show in it."""
        before = None if self.before is None else self.before.so_far()
        found = replace(self, before=before, notes=list(self.notes), beginning=None, sampled=None, rule=None)
        found.trace = self.trace.so_far()
        return found

    def mitigated(self, outcome: Outcome | None) -> None:
        """From here on the run goes on otherwise: its readings go into a trace of their own.

        ``outcome`` is None where another monitor of this run has brought that about.
        """
        if outcome is None:
            self.note("another monitor mitigates this run: the score is of the step before it did")
        self.outcome, self.before = outcome or self.outcome, self.before or self.trace
        self.begin_again()

    def find_words(self, model: Model, conditioning: Conditioning, at: Beginning) -> None:
        """Explain the prompt where its run began.

        Where no gradients can be taken, a note says why, and the words come from leaving one out at a time.
        """
        named = conditioning if conditioning.tokens else by_position(conditioning)
        view = confirmed_gradient if named.reencoding is not None else output_gradient

        def work() -> Explanation:
            found: Explanation = view.explain(model, at.x.clone(), at.sigma.clone(), named, at.base.float().clone())
            return found

        try:
            self.explanation = with_gradients(model, work)
        except (ValueError, RuntimeError) as error:  # refused, without a backward pass, or without the memory for it
            try:
                self.explanation = leave_one_out.explain_at(model, model.encode, named, at.x, at.sigma, at.base.float())
            except ValueError:
                raise error from None
            told = str(error).strip().split("\n")[0].rstrip(". ")
            self.note(f"no gradients could be taken ({told}), so the words come from leaving one out at a time")

    def find_mitigation(
        self, model: Model, conditioning: Conditioning, at: Beginning, unconditional: Conditioning | None
    ) -> Outcome:
        """What to go on with instead, by the monitor's mitigation. Needs the profile by which the run was flagged.

        ``unconditional`` is what ``at.base`` was predicted with, for methods that change the noise.
        """
        assert self.profile is not None
        with torch.inference_mode(False):
            x, sigma, base = at.x.clone(), at.sigma.clone(), at.base.float().clone()
        # Below what alpha flags, too: else a flagged image could be left as it is.
        ordinary = min(ORDINARY_QUANTILE, max(0.5, 1 - self.monitoring.alpha))
        start = Start(
            x,
            sigma,
            x,
            unconditional,
            base,
            self.profile.quantile(0.5, "first step", 1),
            0,
            self.profile.quantile(ordinary, "first step", 1),
            guided=self.setting is None or self.setting.guidance_scale != 1,
        )
        method = method_for(self.monitoring.mitigation, conditioning)
        return method.apply(model, conditioning, start, method.settings())

    def lacks_calibration(self, images: int) -> bool:
        """Whether ordinary prompts are still to be measured to judge the first step of so many images.

        As many as the monitor asks for, of as many images, may be too few for its alpha: then no more are.
        """
        if self.setting is None:
            return False
        baseline: Unconditional = self.trace.baseline or self.monitoring.baseline
        kind, alpha = self.monitoring.deciding, self.monitoring.alpha
        asked = Verdict(self.prompt, 0.0, None, None, alpha, score_kind=kind, baseline=baseline, batch=images)
        judged = self._with_p(asked)
        more = judged.nulls < self.monitoring.calibrate_first or judged.null_images < images
        return judged.lacks_calibration and more

    def verdicts(self, kind: str | None = None) -> list[Verdict]:
        """A verdict for each image, on the conditioning that came in; one without a score when nothing was read.

        Of a run that was mitigated, by the score that decides: no other step had that conditioning.
        """
        if self.before is not None:
            return self._judge(self.before, self.monitoring.deciding)
        return self._judge(self.trace, kind or self.monitoring.score)

    def is_flagged(self) -> bool:
        """Whether any image is flagged at the first step. Waits for that step alone."""
        verdicts = self._judge((self.before or self.trace).first(1), self.monitoring.deciding)
        return any(verdict.flagged for verdict in verdicts)

    def verdicts_after(self) -> list[Verdict]:
        """The same on the conditioning that was sampled instead; empty without a mitigation."""
        return self._judge(self.trace, self.monitoring.deciding) if self.before is not None else []

    def _judge(self, trace: Trace, kind: str) -> list[Verdict]:
        baseline: Unconditional = trace.baseline or self.monitoring.baseline
        empty = Verdict(
            self.prompt,
            None,
            None,
            None,
            self.monitoring.alpha,
            score_kind=kind,
            baseline=baseline,
            explanation=self.explanation,
        )
        try:
            score_of = scores()[kind]
            found = trace.score(score_of.evaluations, score_of.detector).tolist()
        except NotMeasured as error:
            return [replace(empty, why="; ".join([str(error), *self.notes]))]
        steps = [(r.sigma, r.values) for r in trace.readings]
        return [
            self._with_p(
                replace(
                    empty,
                    score=score,
                    score_per_step=tuple((s, None if v is None else v[image]) for s, v in steps),
                    batch=len(found),
                )
            )
            for image, score in enumerate(found)
        ]

    def _with_p(self, verdict: Verdict) -> Verdict:
        if self.profile is not None and self.setting is not None:
            judged = judge(verdict, replace(self.setting, baseline=verdict.baseline), self.profile)
        else:
            judged = replace(verdict, why=NOTHING_TO_COMPARE + ": calibrate for these settings")
        return judged if judged.why is None else replace(judged, why="; ".join([judged.why, *self.notes]))
