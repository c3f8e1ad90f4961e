"""The controller of a run, with a host made by hand: what it measures, decides and leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hand_made import SHAPE, LinearDenoiser, encoder

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import Evaluation
from sd_dejavu.core.guidance import GuidedStep
from sd_dejavu.run.controller import GO, Again, Restart, RunController, Stop
from sd_dejavu.run.monitoring import Monitoring
from sd_dejavu.run.report import Report
from sd_dejavu.run.state import RunState

SETTING = Setting(
    model="abc",
    prediction_type="epsilon",
    latent_shape=SHAPE,
    steps=20,
    sigma=2.0,
    guidance_scale=7.0,
    baseline="empty prompt",
)
PROFILE = Profile(SETTING, tuple(Null("sentence", {"first step": (n / 100,)}) for n in range(1, 200)))
ENCODE = encoder({"red": 1.0, "fox": 0.1})
NEGATIVE = Conditioning(torch.full((1, 2, 4), 0.25))


class Interrupted(Exception):
    """What the host raises when its user ends a run."""


@dataclass
class Hand:
    """A host whose prompts, unconditional and faults are given."""

    network: LinearDenoiser = field(default_factory=LinearDenoiser)
    negative: tuple[Conditioning, str] | None = None
    encoder: bool = True
    restart: str = ""
    shown: int = 0
    interruptions = (Interrupted,)

    def model(self, state: RunState) -> LinearDenoiser:
        return self.network

    def prompt(self, state: RunState, model: LinearDenoiser) -> Conditioning:
        return ENCODE(state.prompt)

    def unconditional(self, state, model, empty):
        if empty:
            return (ENCODE(""), "empty prompt") if self.encoder else None
        return self.negative

    def words(self, state: RunState, model: LinearDenoiser) -> Conditioning | None:
        return ENCODE(state.prompt)

    def identity(self, state: RunState, model: LinearDenoiser):
        return SETTING, PROFILE

    def refuses_restart(self) -> str:
        return self.restart

    def progress(self) -> None:
        self.shown += 1


def run_of(host: Hand, prompts: Sequence[str] = ("red fox",), images: int = 1, **settings) -> RunController:
    monitoring = Monitoring(**{"explain": "never", **settings})
    places = [tuple(range(n * images, (n + 1) * images)) for n in range(len(prompts))]
    states = [RunState(monitoring, prompt, images=own) for prompt, own in zip(prompts, places, strict=True)]
    return RunController(host, monitoring, states)


def seen(*gaps: float, kind: str = "empty prompt", sigma: float = 2.0) -> Evaluation:
    """Images whose magnitudes are the gaps: 4 numbers that differ by sigma * gap / 2 each."""
    base = torch.zeros(len(gaps), *SHAPE)
    moved = base + torch.tensor(gaps)[:, None, None, None] * sigma / 2
    return Evaluation(base, torch.full((len(gaps),), sigma), moved, base, kind)  # type: ignore[arg-type]


def scores(controller: RunController) -> list[list[float | None]]:
    return [[verdict.score for verdict in state.verdicts()] for state in controller.states]


def test_what_guidance_gives_is_measured_as_it_is_and_nothing_is_evaluated() -> None:
    host = Hand()
    controller = run_of(host, ("red fox", "fox"), images=2)
    assert controller.evaluation(seen(3.0, 0.5, 1.0, 0.1)) == GO
    assert scores(controller) == [pytest.approx([3.0, 0.5]), pytest.approx([1.0, 0.1])]
    assert host.network.calls == []
    assert all(state.setting == SETTING and state.profile is PROFILE for state in controller.states)


def test_without_guidance_both_predictions_are_evaluations_of_our_own() -> None:
    host = Hand()
    controller = run_of(host)
    x = torch.zeros(1, *SHAPE)
    controller.evaluation(Evaluation(x, torch.full((1,), 2.0)))
    expected = float((ENCODE("red fox").rows.sum(1) - ENCODE("").rows.sum(1)).norm())
    assert scores(controller) == [pytest.approx([expected])]
    assert len(host.network.calls) == 2
    controller.evaluation(Evaluation(x, torch.full((1,), 1.0)))  # not a step of the score
    assert len(host.network.calls) == 2
    assert "only the steps of the score" in (controller.states[0].trace.readings[1].why or "")


@pytest.mark.parametrize("kind", ["negative prompt", "zeroed prompt", "prompt left out"])
def test_the_empty_prompt_is_the_default_baseline_whatever_guidance_has(kind: str) -> None:
    host = Hand(negative=(NEGATIVE, kind))
    controller = run_of(host)
    controller.evaluation(seen(3.0, kind=kind))
    assert [torch.equal(given.rows, ENCODE("").rows) for _, given in host.network.calls] == [True]
    assert controller.states[0].trace.baseline == "empty prompt"


def test_the_negative_prompt_is_a_choice() -> None:
    host = Hand(negative=(NEGATIVE, "negative prompt"))
    controller = run_of(host, baseline="negative prompt")
    controller.evaluation(seen(3.0, kind="negative prompt"))
    assert host.network.calls == [] and controller.states[0].trace.baseline == "negative prompt"
    off = run_of(Hand(negative=(NEGATIVE, "negative prompt")), baseline="negative prompt")
    off.evaluation(Evaluation(torch.zeros(1, *SHAPE), torch.full((1,), 2.0)))
    expected = float((ENCODE("red fox").rows.sum(1) - NEGATIVE.rows.sum(1)).norm())
    assert scores(off) == [pytest.approx([expected])]


def test_without_the_text_encoder_the_hosts_own_unconditional_serves_and_is_named() -> None:
    controller = run_of(Hand(negative=(NEGATIVE, "negative prompt"), encoder=False))
    controller.evaluation(seen(3.0, kind="negative prompt"))
    (state,) = controller.states
    assert scores(controller) == [pytest.approx([3.0])] and state.trace.baseline == "negative prompt"
    assert any("measured against the negative prompt" in note for note in state.notes)
    nothing = run_of(Hand(encoder=False))
    nothing.evaluation(Evaluation(torch.zeros(1, *SHAPE), torch.full((1,), 2.0)))
    assert scores(nothing) == [[None]] and "text encoder" in (nothing.states[0].verdicts()[0].why or "")


def test_a_flagged_run_is_stopped_with_a_sentence_and_others_go_on() -> None:
    assert run_of(Hand(), when_flagged="stop").evaluation(seen(0.5)) == GO
    controller = run_of(Hand(), ("fox", "red fox"), when_flagged="stop")
    decision = controller.evaluation(seen(0.5, 3.0))
    assert isinstance(decision, Stop) and "p ≤ 0.005" in decision.sentence and "Nothing is broken" in decision.sentence
    assert [state.stopped for state in controller.states] == [False, True]


def test_only_the_flagged_prompt_goes_on_with_another_conditioning() -> None:
    host = Hand()
    controller = run_of(host, ("fox", "red fox"), when_flagged="mitigate", mitigation="remove-trigger")
    decision = controller.evaluation(seen(0.5, 3.0))
    assert isinstance(decision, Again)
    (changed,) = decision.states
    assert changed is controller.states[1] and changed.sampled is not None and changed.sampled.prompt == "fox"
    assert controller.states[0].sampled is None and controller.states[0].before is None
    controller.evaluation(seen(0.1), (changed,))  # the same evaluation again, of that prompt alone
    report = Report.of(changed)
    assert [v.score for v in report.verdicts] == pytest.approx([3.0])
    assert [v.score for v in report.after] == pytest.approx([0.1])
    assert scores(controller)[0] == pytest.approx([0.5])


def test_one_flagged_image_among_seven_is_really_mitigated() -> None:
    network = LinearDenoiser(gain=1.0)
    controller = run_of(Hand(network), images=8, when_flagged="mitigate", mitigation="guidance-transition", alpha=0.05)
    # Magnitudes |1 + mean of x| * 2.2, as the strengths of the words sum up to 1.1: 5.0 and seven of 0.5.
    means = torch.tensor([5.0, *[0.5] * 7]) / 2.2 - 1
    x, sigma = means[:, None, None, None].expand(8, *SHAPE), torch.full((8,), 2.0)
    both = network(x, sigma, ENCODE("red fox")), network(x, sigma, ENCODE(""))
    decision = controller.evaluation(Evaluation(x, sigma, *both))
    assert scores(controller) == [pytest.approx([5.0, *[0.5] * 7])]
    assert isinstance(decision, Again)
    (state,) = decision.states
    assert state.rule is not None and state.sampled is None
    step = GuidedStep(x, sigma, *both, 7.0, 0, lambda conditioning: x)
    guided = controller.guided(state, step)
    same = [torch.equal(ours, plain) for ours, plain in zip(guided, step.plain, strict=True)]
    assert same == [False] + [True] * 7


def test_what_a_large_alpha_flags_is_mitigated_too() -> None:
    """A magnitude of 1.705, as the one of the test above; 29 of 199 ordinary prompts score as high, so p is 30 / 200."""
    network = LinearDenoiser(gain=1.0)
    x, sigma = torch.full((1, *SHAPE), 1.705 / 2.2 - 1), torch.full((1,), 2.0)
    given = Evaluation(x, sigma, network(x, sigma, ENCODE("red fox")), network(x, sigma, ENCODE("")))
    for alpha, expected in ((0.1, GO), (0.2, Again)):
        controller = run_of(Hand(network), when_flagged="mitigate", mitigation="remove-trigger", alpha=alpha)
        decision = controller.evaluation(given)
        (state,) = controller.states
        assert [v.p_value for v in state.verdicts()] == pytest.approx([0.15])
        if expected == GO:
            assert decision == GO and state.outcome is None
        else:
            assert isinstance(decision, Again) and state.outcome is not None
            assert state.sampled is not None and state.sampled.prompt == "fox"
            assert state.outcome.score_after < state.outcome.score_before


@pytest.mark.parametrize("restart", ["", "begins with an image"])
def test_a_run_begins_again_from_other_noise_where_it_can(restart: str) -> None:
    host = Hand(network=LinearDenoiser(gain=4.0), restart=restart)
    controller = run_of(host, ("fox", "red fox"), when_flagged="mitigate", mitigation="batch-wise-noise")
    x = torch.full((2, *SHAPE), 3.0)
    base = torch.zeros(2, *SHAPE)
    given = Evaluation(x, torch.full((2,), 2.0), base + torch.tensor([0.25, 3.0])[:, None, None, None], base)
    decision = controller.evaluation(given)
    if restart:
        assert decision == GO
        assert any("but this run begins with an image" in note for note in controller.states[1].notes)
        return
    assert isinstance(decision, Restart)
    assert not decision.moved[0].any() and bool(decision.moved[1].any())
    assert [len(state.trace) for state in controller.states] == [0, 0]
    assert controller.states[0].before is None and controller.states[1].before is not None


def test_our_faults_are_told_once_and_the_hosts_interruption_passes(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hand):
        def unconditional(self, state, model, empty):
            raise RuntimeError("the encoder is gone")

    controller = run_of(Broken(), score="all steps")
    for sigma in (2.0, 1.0):
        assert controller.evaluation(seen(3.0, kind="negative prompt", sigma=sigma)) == GO
    assert controller.states[0].notes == ["RuntimeError: the encoder is gone"]
    assert len([r for r in caplog.records if "the encoder is gone" in r.getMessage()]) == 1

    class Ended(Hand):
        def model(self, state):
            raise Interrupted

    with pytest.raises(Interrupted):
        run_of(Ended()).evaluation(seen(3.0))


def test_a_fault_of_one_prompt_costs_the_others_nothing() -> None:
    class Picky(Hand):
        def identity(self, state, model):
            if state.prompt == "fox":
                raise ValueError("no identity for a fox")
            return SETTING, PROFILE

    controller = run_of(Picky(), ("fox", "red fox"), when_flagged="stop")
    assert isinstance(controller.evaluation(seen(3.0, 3.0)), Stop)
    assert controller.states[0].notes == ["no identity for a fox"] and controller.states[1].notes == []


def test_words_are_found_when_the_score_has_arrived_or_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Hand()
    monitoring = Monitoring(explain="flagged")
    state = RunState(monitoring, "red fox")
    controller = RunController(host, monitoring, [state], explains_later=True)
    arrived = False
    monkeypatch.setattr(type(state.trace), "ready", lambda self, count: arrived)
    x = seen(3.0)
    controller.evaluation(x)
    assert state.explanation is None and state.beginning is not None
    assert state.beginning.x.data_ptr() != x.x.data_ptr()  # the host may change its own
    controller.evaluation(seen(1.0, sigma=1.0))
    assert state.explanation is None
    arrived = True
    controller.evaluation(seen(1.0, sigma=0.5))
    assert state.explanation is not None and state.explanation.top.text == "red"
    last = RunState(monitoring, "red fox")
    controller = RunController(host, monitoring, [last], explains_later=True)
    arrived = False
    controller.evaluation(seen(3.0))
    controller.explain()
    assert last.explanation is not None
    controller.end()
    assert last.finished and last.beginning is None


def test_runs_within_runs_and_beside_each_other_know_nothing_of_each_other() -> None:
    """A host that samples something of its own in the midst of a run: each has a controller of its own."""
    outer, inner = run_of(Hand()), run_of(Hand(), ("fox",))
    outer.evaluation(seen(3.0))
    inner.evaluation(seen(0.1))
    inner.end()
    outer.evaluation(seen(2.0, sigma=1.0))
    outer.end()
    assert scores(outer) == [pytest.approx([3.0])] and scores(inner) == [pytest.approx([0.1])]
    assert [len(c.states[0].trace) for c in (outer, inner)] == [2, 1]


def test_an_interrupted_run_is_not_finished_and_holds_nothing_of_the_host() -> None:
    controller = run_of(Hand(), explain="always", when_flagged="mitigate", mitigation="remove-trigger")
    controller.evaluation(seen(3.0))
    controller.end(finished=False)
    (state,) = controller.states
    assert not state.finished
    assert state.beginning is None and state.sampled is None and state.rule is None


def test_what_cannot_be_measured_says_why_and_the_run_is_known_all_the_same() -> None:
    controller = run_of(Hand())
    first = seen(3.0)
    controller.evaluation(Evaluation(first.x, first.sigma, missing="the prompt acts on an area"))
    (verdict,) = controller.states[0].verdicts()
    assert verdict.score is None and "acts on an area" in (verdict.why or "")
    assert controller.states[0].setting == SETTING


# ---------------------------------------------------------------------- calibrating within a run

NAMES = [f"w{number}" for number in range(1, 200)]
STRENGTHS = encoder({name: number / 200 for number, name in enumerate(NAMES, 1)})  # a magnitude of number / 100 each


class Uncalibrated(Hand):
    """A host without a calibration, whose model encodes prompts of known strengths."""

    def __init__(self, profile: Profile | None = None, setting: Setting = SETTING) -> None:
        super().__init__()
        self.network.encode = STRENGTHS  # type: ignore[method-assign]
        self.profile, self.setting, self.seen, self.kept = profile, setting, [], []

    def identity(self, state: RunState, model: LinearDenoiser):
        return self.setting, self.profile

    def progress(self) -> None:
        (state,) = self.states
        if state.calibrating is not None:
            self.seen.append((state.calibrating.done, state.calibrating.count))

    def begin(self, **settings) -> RunController:
        monitoring = Monitoring(**{"explain": "never", **settings})
        self.states = [RunState(monitoring, "red fox")]
        return RunController(
            self, monitoring, self.states, ordinary=lambda model, count: NAMES[:count], keep=self.kept.append
        )


@pytest.mark.parametrize("images", [1, 3])
def test_a_run_without_a_calibration_makes_its_own_first(images: int) -> None:
    host = Uncalibrated()
    controller = host.begin(calibrate_first=120)
    gaps = [1.105, *[0.1] * (images - 1)]
    controller.evaluation(seen(*gaps))
    (profile,) = host.kept
    assert profile.setting == SETTING and profile.ordinary == "generated"
    assert [null.scores["first step"] for null in profile.nulls] == [
        pytest.approx([number / 100] * images, abs=1e-5) for number in range(1, 121)
    ]
    # 10 of 120 ordinary prompts score as high as 1.105: p = (1 + 10) / (1 + 120)
    verdict = controller.states[0].verdicts()[0]
    assert verdict.p_value == pytest.approx(11 / 121) and verdict.nulls == 120 and not verdict.lacks_calibration
    assert host.seen == [(done, 120) for done in range(121)] and controller.states[0].calibrating is None
    assert controller.states[0].notes == []


def test_a_calibration_that_is_there_is_not_made_again() -> None:
    fitting, unasked = Uncalibrated(PROFILE), Uncalibrated()
    fitting.begin(calibrate_first=500).evaluation(seen(3.0))
    controller = unasked.begin()
    controller.evaluation(seen(3.0))
    assert fitting.kept == unasked.kept == [] and fitting.network.calls == unasked.network.calls == []
    (verdict,) = controller.states[0].verdicts()
    assert verdict.lacks_calibration and Report.of(controller.states[0]).as_json()["lacks_calibration"] is True
    # 30 are too few for alpha, and as many as were asked for: to measure them again would change nothing.
    few = Uncalibrated(Profile(SETTING, PROFILE.nulls[:30]))
    few.begin(calibrate_first=30).evaluation(seen(3.0))
    assert few.kept == []
    few.begin(calibrate_first=100).evaluation(seen(3.0))
    assert [len(made.nulls) for made in few.kept] == [100]


def test_one_for_another_setting_gives_way_and_a_run_from_an_image_cannot_make_its_own() -> None:
    other = Uncalibrated(Profile(replace(SETTING, sigma=7.0), PROFILE.nulls))
    other.begin(calibrate_first=100).evaluation(seen(3.0))
    assert [made.setting for made in other.kept] == [SETTING]
    from_image = Uncalibrated(setting=replace(SETTING, begins_with="an image"))
    controller = from_image.begin(calibrate_first=100)
    controller.evaluation(seen(3.0))
    assert from_image.kept == [] and "begins with an image" in controller.states[0].notes[0]
    (verdict,) = controller.states[0].verdicts()
    assert verdict.score == pytest.approx(3.0) and verdict.flagged is None


def test_against_the_negative_prompt_ordinary_prompts_are_measured_too() -> None:
    host = Uncalibrated(setting=replace(SETTING, baseline="negative prompt", negative_prompt="grey"))
    host.negative = (NEGATIVE, "negative prompt")
    host.begin(calibrate_first=99, baseline="negative prompt").evaluation(seen(3.0, kind="negative prompt"))
    # 4 numbers, number / 200 - (0.25 + 0.25) each
    expected = [2 * abs(number / 200 - 0.5) for number in range(1, 100)]
    assert [null.scores["first step"][0] for null in host.kept[0].nulls] == pytest.approx(expected, abs=1e-5)


def test_the_hosts_interruption_ends_a_calibration_and_nothing_is_kept() -> None:
    host = Uncalibrated()
    controller = host.begin(calibrate_first=100)
    host.progress = lambda: _interrupt(controller.states[0])  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        controller.evaluation(seen(3.0))
    assert host.kept == [] and controller.states[0].calibrating is None


def _interrupt(state: RunState) -> None:
    if state.calibrating is not None and state.calibrating.done == 7:
        raise Interrupted


def test_a_calibration_of_fewer_images_does_not_keep_a_batch_from_its_own() -> None:
    single = Profile(SETTING, tuple(Null("sentence", {"first step": (n / 100,)}) for n in range(1, 101)))
    host = Uncalibrated(single)
    controller = host.begin(calibrate_first=100)
    controller.evaluation(seen(3.0, 0.1, 0.1))  # three images: 100 ordinary prompts of one count three times
    assert [len(null.scores["first step"]) for null in host.kept[0].nulls] == [3] * 100
    assert controller.states[0].verdicts()[0].flagged is True


def test_prompts_of_one_run_share_the_calibration_that_the_first_of_them_made() -> None:
    host = Uncalibrated()
    monitoring = Monitoring(explain="never", calibrate_first=100)
    states = [RunState(monitoring, prompt, images=(place,)) for place, prompt in enumerate(("red fox", "fox"))]

    def refuse(made: Profile) -> None:
        host.kept.append(made)
        raise ValueError("the folder cannot be written")

    host.progress = lambda: None  # type: ignore[method-assign]
    controller = RunController(host, monitoring, states, ordinary=lambda model, count: NAMES[:count], keep=refuse)
    controller.evaluation(seen(3.0, 0.1))
    assert len(host.kept) == 1 and [state.verdicts()[0].flagged for state in states] == [True, False]


def test_a_calibration_with_what_changes_from_run_to_run_is_of_that_run_alone() -> None:
    host = Uncalibrated(setting=replace(SETTING, patches="control, output_block_patch"))
    controller = host.begin(calibrate_first=100)
    controller.evaluation(seen(3.0))
    assert host.kept == [] and controller.states[0].verdicts()[0].flagged is True
    assert "control may be another in the next" in controller.states[0].notes[0]
