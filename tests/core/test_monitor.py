"""What a monitor makes of the readings of one run, on magnitudes worked out by hand."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import replace

import pytest
import torch

from sd_dejavu.calibration.calibrate import with_whole_runs
from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import Predictions
from sd_dejavu.core.trace import Trace
from sd_dejavu.core.verdict import BandStep, Explanation, Verdict, WordSignificance
from sd_dejavu.mitigations import Outcome
from sd_dejavu.report.word_image import word_image
from sd_dejavu.report.words import word_spans
from sd_dejavu.run.monitoring import Monitoring
from sd_dejavu.run.report import Report, flagged
from sd_dejavu.run.state import RunState

SETTING = Setting(
    model="abc",
    prediction_type="epsilon",
    latent_shape=(4, 2, 2),
    steps=20,
    sigma=14.6,
    guidance_scale=7.0,
    baseline="empty prompt",
)
# 199 ordinary prompts that score 0.01, 0.02, ... 1.99.
NULLS = tuple(Null("sentence", {"first step": (n / 100,)}) for n in range(1, 200))
PROFILE = Profile(SETTING, NULLS)


def predictions(*gaps: float, sigma: float = 2.0, baseline="empty prompt") -> Predictions:
    """Images whose magnitudes are the gaps: 16 numbers that differ by sigma * gap / 4 each."""
    base = torch.zeros(len(gaps), 4, 2, 2)
    moved = base + torch.tensor(gaps)[:, None, None, None] * sigma / 4
    return Predictions(moved, base, torch.full((len(gaps),), sigma), baseline)


def watch(*gaps: float, **settings) -> RunState:
    found = RunState(Monitoring(**settings), "a red fox", SETTING, PROFILE)
    found.trace.record(predictions(*gaps))
    found.trace.record(predictions(*(g / 2 for g in gaps), sigma=1.0))
    return found


def test_every_image_gets_a_verdict_of_its_own() -> None:
    first, second = watch(3.0, 0.505).verdicts()
    assert (first.score, second.score) == pytest.approx((3.0, 0.505))
    # No null reaches 3; of 199 those from 0.51 up, 149, reach 0.505. Of two images either may flag the run.
    assert first.p_value == pytest.approx(2 * 1 / 200)
    assert second.p_value == 1.0  # 2 * 150 / 200
    (alone,) = watch(0.505).verdicts()
    assert alone.p_value == pytest.approx(150 / 200)
    assert (first.flagged, second.flagged) == (True, False)
    assert first.score_per_step == ((2.0, pytest.approx(3.0)), (1.0, pytest.approx(1.5)))
    assert flagged([first, second]) is True
    assert flagged([second]) is False


def test_a_score_over_all_steps_is_their_mean() -> None:
    (verdict,) = watch(3.0, score="all steps").verdicts()
    assert verdict.score == pytest.approx((3.0 + 1.5) / 2)
    assert verdict.flagged is None and "no whole runs" in (verdict.why or "")


def test_without_a_calibration_there_is_a_score_and_no_flag() -> None:
    found = watch(3.0)
    found.profile = None
    (verdict,) = found.verdicts()
    assert verdict.score == pytest.approx(3.0)
    assert verdict.flagged is None and "nothing to compare it with yet: calibrate for these settings" in (
        verdict.why or ""
    )
    assert flagged([verdict]) is None


def test_a_calibration_for_another_noise_level_is_refused() -> None:
    found = watch(3.0)
    found.setting = replace(SETTING, sigma=7.0)
    (verdict,) = found.verdicts()
    assert verdict.flagged is None and "another setting" in (verdict.why or "")


def test_a_calibration_against_another_prompt_is_refused() -> None:
    found = RunState(Monitoring(), "a red fox", SETTING, PROFILE)
    found.trace.record(predictions(3.0, baseline="negative prompt"))
    (verdict,) = found.verdicts()
    assert verdict.baseline == "negative prompt"
    assert verdict.flagged is None and "another setting" in (verdict.why or "")


def test_what_was_not_measured_says_why_and_what_else_went_wrong() -> None:
    found = RunState(Monitoring())
    found.trace.skip(2.0, "guidance is off")
    found.note("a fault")
    found.note("a fault")
    (verdict,) = found.verdicts()
    assert verdict.score is None and verdict.flagged is None
    assert "guidance is off" in (verdict.why or "") and (verdict.why or "").count("a fault") == 1


def test_a_mitigation_keeps_the_verdict_on_what_came_in() -> None:
    found = watch(3.0)
    changed = Conditioning(torch.zeros(1, 2, 4), prompt="a fox")
    found.mitigated(Outcome(changed, 3.0, 0.3, {"words": ("red",), "reached": True}))
    found.trace.record(predictions(0.305))
    report = Report.of(found)
    assert [v.score for v in report.verdicts] == pytest.approx([3.0])
    assert [v.score for v in report.after] == pytest.approx([0.305])
    assert [v.flagged for v in (*report.verdicts, *report.after)] == [True, False]
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert document["mitigation"]["words"] == ["red"]
    assert document["mitigation"]["prompt"] == "a fox"
    assert document["mitigation"]["verdicts"][0]["label"] == "Not flagged"
    assert document["verdicts"][0]["sentence"].startswith("Likely a replay")
    assert document["setting"]["sigma"] == 14.6


@pytest.mark.parametrize("by_another", [True, False])
@pytest.mark.parametrize("score", ["first 5 steps", "all steps"])
def test_no_score_mixes_what_came_before_a_mitigation_with_what_came_after(score: str, by_another: bool) -> None:
    found = RunState(Monitoring(score=score))
    found.trace.record(predictions(3.0))
    changed = Outcome(Conditioning(torch.zeros(1, 2, 4)), 3.0, 0.3, {})
    found.mitigated(None if by_another else changed)
    for _ in range(5):
        found.trace.record(predictions(0.3))
    (verdict,) = found.verdicts()
    assert verdict.score == pytest.approx(3.0) and verdict.score_kind == "first step"
    assert any("another monitor" in note for note in found.notes) == by_another
    assert (found.outcome is None) == by_another


@pytest.mark.parametrize(
    ("score", "needed"),
    [("first step", [True, False, False]), ("first 5 steps", [True, True, False]), ("all steps", [True] * 3)],
)
def test_which_evaluations_are_worth_an_evaluation_of_our_own(score, needed: list[bool]) -> None:
    found, measured = RunState(Monitoring(score=score)), []
    for _ in range(51):
        measured.append(found.measures_next())
        found.trace.skip(1.0, "guidance was off")
    assert [measured[n] for n in (0, 4, 50)] == needed


def test_the_map_is_scaled_to_each_image_and_sized_as_asked() -> None:
    found = RunState(Monitoring())
    base = torch.zeros(2, 4, 2, 2)
    moved = base.clone()
    moved[0, :, 0, 0], moved[1, :, 1, 1] = 1.0, 5.0
    found.trace.record(Predictions(moved, base, torch.ones(2)))
    where = Report.of(found).where(16, 24, 2)
    assert where.shape == (2, 16, 24)
    assert where.flatten(1).amax(1).tolist() == pytest.approx([1.0, 1.0])
    assert where[0, 0, 0] == 1.0 and where[0, -1, -1] == 0.0
    assert where[1, -1, -1] == 1.0 and where[1, 0, 0] == 0.0
    assert not Report.missing("nothing ran").where(4, 4, 3).any()


def test_a_report_of_some_images_tells_of_them_in_their_order() -> None:
    found = watch(3.0)
    base = torch.zeros(3, 4, 2, 2)
    moved = base.clone()
    moved[0, 0, 0, 0], moved[1, 0, 0, 1], moved[2, 0, 1, 1] = 1.0, 2.0, 4.0
    found.trace = Trace()
    found.trace.record(Predictions(moved, base, torch.ones(3)))
    whole = Report.of(found)
    some = whole.of_images([2, 0, 2])
    assert [v.score for v in whole.verdicts] == pytest.approx([1.0, 2.0, 4.0])
    assert [v.score for v in some.verdicts] == pytest.approx([4.0, 1.0, 4.0])
    assert some.where(2, 2, 3).flatten(1).argmax(1).tolist() == [3, 0, 3]
    assert [v["where"] for v in some.as_json()["verdicts"]] == [
        whole.as_json()["verdicts"][place]["where"] for place in (2, 0, 2)
    ]
    missing = RunState(Monitoring())
    missing.trace.skip(2.0, "guidance is off")
    assert Report.of(missing).of_images([1]).verdicts == Report.of(missing).verdicts  # told of all at once


def test_the_word_image_shades_what_matters() -> None:
    words = (WordSignificance("red", 2, 5, 0.1, 0.0), WordSignificance("fox", 6, 9, 1.0, 1.0))
    explained = Verdict(
        "a red fox", 3.0, 0.001, True, 0.01, nulls=999, explanation=Explanation("leave one out", words, "u")
    )
    plain = word_image(replace(explained, explanation=None))
    shaded = word_image(explained)
    assert plain.shape == shaded.shape and plain.dtype == shaded.dtype

    def orange(image) -> int:
        red, green, blue = (image[..., i].astype(int) for i in range(3))
        return int(((red > 200) & (green < 220) & (blue < 190)).sum())

    assert orange(plain) == 0 and orange(shaded) > 300


def test_word_images_hold_any_text() -> None:
    for prompt in ("", "<b>" * 50, "名前 🦊 \u202eabc", "word " * 500):
        image = word_image(Verdict(prompt, None, None, None, 0.01, why="nothing was measured"))
        assert image.shape[1] == 768


def test_the_report_tells_what_is_ordinary_and_where_the_prompt_acts() -> None:
    found = watch(3.0)
    steps = (BandStep(2.0, 0.1, 0.2, 0.3), BandStep(1.0, 0.1, 0.2, 0.3))
    found.profile = replace(PROFILE, band=steps)
    document = Report.of(found).as_json()
    # The 0.95-quantile of 0.01 ... 1.99 lies at place 188.1 of 0..198.
    assert document["ordinary"] == pytest.approx({"median": 1.0, "high": 1.891})
    assert document["band"][0] == {"sigma": 2.0, "q05": 0.1, "q50": 0.2, "q95": 0.3}
    where = document["verdicts"][0]["where"]
    assert (where["width"], where["height"], b64decode(where["values"])) == (2, 2, b"\xff" * 4)
    # A band made with another sampler does not compare; the first step does.
    found.setting = replace(SETTING, sampler="heun")
    document = Report.of(found).as_json()
    assert document["band"] == [] and document["ordinary"] is not None
    found.profile = None
    assert Report.of(found).as_json()["ordinary"] is None


def test_whole_runs_add_scores_and_the_band() -> None:
    traces = [watch(gap).trace for gap in (1.0, 2.0, 3.0)]  # each halves at its second evaluation
    found = with_whole_runs(PROFILE, traces)
    assert found.nulls[1].scores == {"first step": (0.02,), "all steps": (pytest.approx(1.5),)}
    assert found.nulls[3] == PROFILE.nulls[3]
    assert [(b.sigma, b.q50) for b in found.band] == [(2.0, pytest.approx(2.0)), (1.0, pytest.approx(1.0))]
    assert (found.band[0].q05, found.band[0].q95) == pytest.approx((1.1, 2.9))
    traces[0].record(predictions(1.0, sigma=0.5))
    with pytest.raises(ValueError, match="another number of evaluations"):
        with_whole_runs(PROFILE, traces)
    traces[0].skip(0.2, "guidance was off")
    with pytest.raises(ValueError, match="guidance was off"):
        with_whole_runs(PROFILE, traces)


def test_a_prompt_without_text_shows_numbered_tokens() -> None:
    words = tuple(WordSignificance(f"token {n}", 0, 0, float(n), n / 3) for n in range(4))
    verdict = Verdict("", 3.0, 0.005, True, 0.01, nulls=199, explanation=Explanation("output gradient", words, "norm"))
    plain = word_image(replace(verdict, explanation=None))
    assert (word_image(verdict) != 255).sum() > (plain != 255).sum()
    spans = word_spans("", verdict.explanation)
    assert [f">token {n}<" in spans for n in range(4)] == [True] * 4
