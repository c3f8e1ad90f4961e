"""Watching one run of a host's own sampler: what is measured, and what to do when it is flagged.

The host's hook feeds a :class:`Watch` one guidance step at a time; the watch keeps the trace, judges each
picture of the batch when asked, and holds what was explained and mitigated on the way. It never touches
the host.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .calibration.profile import ALPHA_DEFAULT, EVALUATIONS, ORDINARY_QUANTILE, Profile, ScoreKind, Setting
from .conditioning import Baseline, Conditioning, Unconditional, by_position
from .denoiser import Model
from .explain import confirmed_gradient, leave_one_out, output_gradient
from .gradients import with_gradients
from .judge import judge
from .mitigations import Mitigation, Outcome, Start, available
from .settings import option, validate
from .trace import NotMeasured, Trace
from .verdict import BandStep, Explanation, Verdict

MAP_SIDE = 32  # of the where-map in a report

WhenFlagged = Literal["report", "stop", "mitigate"]
When = Literal["never", "flagged", "always"]
OPTIMISE = "optimise"  # through the text encoder where it is at hand, else by its output rows
OPTIMISING = ("optimise-tokens", "optimise-conditioning")
REMEDIES = (
    OPTIMISE,
    *(name for name, known in available().items() if name not in OPTIMISING and not known.needs_references),
)


def method_for(name: str, conditioning: Conditioning) -> Mitigation:
    """The mitigation of this name; for 'optimise' the one that this conditioning allows."""
    if name == OPTIMISE:
        name = OPTIMISING[0] if conditioning.reencoding else OPTIMISING[1]
    return available()[name]


@dataclass(frozen=True)
class Monitoring:
    """Settings of a monitor, the same in every host."""

    without: Baseline = option(
        "negative prompt",
        "what the prompt is measured against: the negative prompt costs nothing, the empty prompt one more model "
        "evaluation at each measured step",
        choices=get_args(Baseline),
    )
    when_flagged: WhenFlagged = option(
        "report",
        "report: say so; stop: end the run at the first step; mitigate: go on with what the remedy gives instead",
        choices=get_args(WhenFlagged),
    )
    remedy: str = option(
        OPTIMISE,
        "how to mitigate: "
        + "; ".join(f"{name}: {available()[OPTIMISING[0] if name == OPTIMISE else name].help}" for name in REMEDIES),
        choices=REMEDIES,
    )
    explain: When = option("flagged", "when to find out which words bring the score about", choices=get_args(When))
    score: ScoreKind = option("first step", "which evaluations the score averages", choices=get_args(ScoreKind))
    alpha: float = option(
        ALPHA_DEFAULT, "flag a picture when its p-value is at most this", minimum=0, maximum=1, exclusive=True
    )

    def __post_init__(self) -> None:
        validate(self)

    @property
    def changes_noise(self) -> bool:
        """Whether a flagged run begins again from other noise."""
        known = available().get(self.remedy)
        return self.when_flagged == "mitigate" and known is not None and known.touches == "noise"


@dataclass
class Watch:
    """One run. ``before`` is the trace up to a mitigation, where there was one; ``trace`` is what was drawn."""

    monitoring: Monitoring
    prompt: str = ""
    setting: Setting | None = None
    profile: Profile | None = None
    trace: Trace = field(default_factory=Trace)
    before: Trace | None = None
    explanation: Explanation | None = None
    outcome: Outcome | None = None
    notes: list[str] = field(default_factory=list)
    finished: bool = False
    stopped: bool = False  # ended by us at its first step
    base: Tensor | None = None  # the denoised prediction without the prompt at the first evaluation
    pixels_a_cell: int = 8  # of the picture, to each cell of the latent
    prompt_node: str | None = None  # the node of the host's workflow that holds the prompt

    def measures(self, evaluation: int) -> bool:
        """Whether evaluation ``evaluation`` (from 0) is one that the score needs."""
        needed = EVALUATIONS[self.monitoring.score]
        return needed is None or evaluation < needed

    def note(self, text: str) -> None:
        """Something that went wrong or was left out, once."""
        if text not in self.notes:
            self.notes.append(text)

    def settle(self) -> None:
        """The run is over, or another thread shall read it: all of its numbers are on their way, without waiting."""
        self.trace.settle()
        if self.before is not None:
            self.before.settle()

    def so_far(self) -> Watch:
        """The watch as it stands, for another thread: what the run adds does not show in it."""
        before = None if self.before is None else self.before.so_far()
        return replace(self, trace=self.trace.so_far(), before=before, notes=list(self.notes))

    def mitigated(self, outcome: Outcome) -> None:
        """From here on another conditioning is sampled: its readings go into a trace of their own."""
        self.outcome, self.before, self.trace = outcome, self.trace, Trace()

    def look_at_words(self, model: Model, conditioning: Conditioning, x: Tensor, sigma: Tensor, base: Tensor) -> None:
        """Explain at x [B, C, H, W], sigma [B]; ``base`` is the denoised prediction there without the prompt.

        Where no gradients can be taken, a note says why, and the words come from leaving one out at a time.
        """
        named = conditioning if conditioning.tokens else by_position(conditioning)
        view = confirmed_gradient if named.reencoding is not None else output_gradient

        def work() -> Explanation:
            return view.explain(model, x.clone(), sigma.clone(), named, base.float().clone())

        try:
            self.explanation = with_gradients(model, work)
        except (ValueError, RuntimeError) as error:  # refused, without a backward pass, or without the memory for it
            try:
                self.explanation = leave_one_out.explain_at(model, model.encode, named, x, sigma, base.float())
            except ValueError:
                raise error from None
            told = str(error).strip().split("\n")[0].rstrip(". ")
            self.note(f"no gradients could be taken ({told}), so the words come from leaving one out at a time")

    def find_remedy(
        self,
        model: Model,
        conditioning: Conditioning,
        x: Tensor,
        sigma: Tensor,
        base: Tensor,
        unconditional: Conditioning | None = None,
    ) -> Outcome:
        """What to go on with instead, by the monitor's remedy. Needs the profile by which the run was flagged.

        ``unconditional`` is what ``base`` was predicted with, for remedies that change the noise.
        """
        assert self.profile is not None
        with torch.inference_mode(False):
            x, sigma, base = x.clone(), sigma.clone(), base.float().clone()
        start = Start(
            x,
            sigma,
            x,
            unconditional,
            base,
            self.profile.quantile(0.5, "first step", 1),
            0,
            self.profile.quantile(ORDINARY_QUANTILE, "first step", 1),
            guided=self.setting is None or self.setting.guidance_scale != 1,
        )
        method = method_for(self.monitoring.remedy, conditioning)
        outcome = method.apply(model, conditioning, start, method.settings())
        self.mitigated(outcome)
        return outcome

    def verdicts(self, kind: ScoreKind | None = None) -> list[Verdict]:
        """A verdict for each picture, on the conditioning that came in; one without a score when nothing was read."""
        return self._judge(self.before or self.trace, kind or self.monitoring.score)

    def is_flagged(self) -> bool:
        """Whether any picture is flagged at the first step. Waits for that step alone."""
        return bool(flagged(self._judge((self.before or self.trace).first(1), "first step")))

    def verdicts_after(self) -> list[Verdict]:
        """The same on the conditioning that was sampled instead; empty without a mitigation."""
        return self._judge(self.trace, "first step") if self.before is not None else []

    def _judge(self, trace: Trace, kind: ScoreKind) -> list[Verdict]:
        without: Unconditional = trace.without or self.monitoring.without
        empty = Verdict(
            self.prompt,
            None,
            None,
            None,
            self.monitoring.alpha,
            score_kind=kind,
            without=without,
            explanation=self.explanation,
        )
        try:
            scores = trace.score(EVALUATIONS[kind]).tolist()
        except NotMeasured as error:
            return [replace(empty, why="; ".join([str(error), *self.notes]))]
        steps = [(r.sigma, r.values) for r in trace.readings]
        return [
            self._with_p(
                replace(
                    empty,
                    score=score,
                    score_per_step=tuple((s, None if v is None else v[image]) for s, v in steps),
                    batch=len(scores),
                )
            )
            for image, score in enumerate(scores)
        ]

    def _with_p(self, verdict: Verdict) -> Verdict:
        if self.profile is not None and self.setting is not None:
            judged = judge(verdict, replace(self.setting, without=verdict.without), self.profile)
        else:
            judged = replace(verdict, why="there is no calibration for this model and setting: calibrate first")
        return judged if judged.why is None else replace(judged, why="; ".join([judged.why, *self.notes]))


def flagged(verdicts: Sequence[Verdict]) -> bool | None:
    """Whether any picture is flagged; None when there is no verdict on any of them."""
    known = [v.flagged for v in verdicts if v.flagged is not None]
    return any(known) if known else None


@dataclass(frozen=True)
class Report:
    """What a front end shows of one run: a verdict for each picture, the same after a mitigation, and the rest."""

    watch: Watch
    verdicts: tuple[Verdict, ...]
    after: tuple[Verdict, ...] = ()
    images: tuple[int, ...] | None = None  # which of the run these are; None for all of them

    @classmethod
    def of(cls, watch: Watch) -> Report:
        return cls(watch, tuple(watch.verdicts()), tuple(watch.verdicts_after()))

    @classmethod
    def missing(cls, why: str) -> Report:
        """No run to speak of."""
        return cls(Watch(Monitoring(), notes=[why]), (Verdict("", None, None, None, ALPHA_DEFAULT, why=why),))

    @property
    def highest(self) -> Verdict:
        """The verdict on the image with the highest score."""
        return max(self.verdicts, key=lambda verdict: verdict.score or 0.0)

    def of_images(self, places: Sequence[int]) -> Report:
        """The same of these images only, in this order; one may come twice. What is told of all stays."""

        def chosen(verdicts: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
            return verdicts if len(verdicts) <= max(places) else tuple(verdicts[place] for place in places)

        return replace(self, verdicts=chosen(self.verdicts), after=chosen(self.after), images=tuple(places))

    def maps(self) -> Tensor:
        """Squared-difference map [images, H, W] of the last evaluation that was measured. Raises NotMeasured."""
        found = self.watch.trace.where()
        return found if self.images is None else found[list(self.images)]

    def where(self, height: int, width: int, images: int) -> Tensor:
        """Where in the picture the prompt acts, [images, height, width] in 0..1; zeros where it was not measured."""
        try:
            found = self.maps()
        except NotMeasured:
            return torch.zeros(images, height, width)
        highest = found.flatten(1).amax(1).clamp_min(1e-12)[:, None, None]
        scaled = F.interpolate((found / highest)[:, None], size=(height, width), mode="bilinear")[:, 0]
        return scaled[:images] if len(scaled) >= images else torch.zeros(images, height, width)

    def _maps(self) -> list[dict[str, Any] | None]:
        """The where-map of each picture in at most 32 x 32 bytes, row by row; None where it was not measured."""
        try:
            height, width = self.watch.trace.where().shape[1:]
        except NotMeasured:
            return [None] * len(self.verdicts)
        size = (min(height, MAP_SIDE), min(width, MAP_SIDE))
        bytes_of = (255 * self.where(*size, len(self.verdicts))).round().to(torch.uint8).cpu().numpy()
        return [
            {"width": size[1], "height": size[0], "values": b64encode(values.tobytes()).decode("ascii")}
            for values in bytes_of
        ]

    def ordinary(self) -> tuple[list[BandStep], dict[str, float] | None]:
        """What ordinary prompts give in this setting: the band of each step, and the first-step score."""
        profile, setting = self.watch.profile, self.watch.setting
        if profile is None or setting is None:
            return [], None
        setting = replace(setting, without=self.watch.trace.without or setting.without)
        band = [] if profile.setting.mismatch(setting, "all steps") else list(profile.band)
        if profile.setting.mismatch(setting, "first step") or not profile.null_scores("first step", 1):
            return band, None
        high = profile.quantile(ORDINARY_QUANTILE, "first step", 1)
        return band, {"median": profile.quantile(0.5, "first step", 1), "high": high}

    def as_json(self) -> dict[str, Any]:
        """Plain values: verdicts with their words and maps, what is ordinary, mitigation, setting, notes."""
        from .report.wording import facts, label, sentence

        def shown(verdict: Verdict) -> dict[str, Any]:
            told = {"label": label(verdict), "sentence": sentence(verdict), "facts": [list(f) for f in facts(verdict)]}
            return {**verdict.as_json(), **told}

        band, ordinary = self.ordinary()

        outcome = self.watch.outcome
        mitigation = None
        if outcome is not None:
            mitigation = {
                "score_before": outcome.score_before,
                "score_after": outcome.score_after,
                "prompt": outcome.conditioning.prompt,
                "verdicts": [shown(v) for v in self.after],
                **{k: list(v) if isinstance(v, tuple) else v for k, v in outcome.details.items()},
            }
        return {
            "format": "dejavu-report",
            "schema_version": 1,
            "prompt": self.watch.prompt,
            "prompt_node": self.watch.prompt_node,
            "flagged": flagged(self.verdicts),
            "verdicts": [{**shown(v), "where": m} for v, m in zip(self.verdicts, self._maps(), strict=True)],
            "band": [asdict(step) for step in band],
            "ordinary": ordinary,
            "mitigation": mitigation,
            "setting": None if self.watch.setting is None else asdict(self.watch.setting),
            "notes": list(self.watch.notes),
        }
