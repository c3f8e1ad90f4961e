"""What a flag means, by hand and by counting."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.core.verdict import BandStep, Verdict
from sd_dejavu.run.judge import judge, needed_nulls

SETTING = Setting(
    model="abc",
    prediction_type="epsilon",
    latent_shape=(4, 8, 8),
    steps=50,
    sigma=14.6,
    guidance_scale=7.5,
    baseline="empty prompt",
)


def profile(count: int, images: int = 1) -> Profile:
    """The scores 1, 2, ... count, the same for each image of a null."""
    return Profile(SETTING, tuple(Null("a", {"first step": (1.0 + i,) * images}) for i in range(count)))


def verdict(score: float, alpha: float = 0.01, images: int = 1, batch: int = 1) -> Verdict:
    return Verdict("", score, None, None, alpha, images=images, batch=batch)


@pytest.mark.parametrize(
    ("alpha", "times", "needed"),
    [
        (0.01, 1, 99),
        (0.05, 1, 19),
        (0.001, 1, 999),
        (0.03, 1, 33),
        (0.1, 1, 9),
        (1 / 3, 1, 2),
        (0.5, 1, 1),
        (0.01, 8, 799),
    ],
)
def test_with_fewer_ordinary_prompts_nothing_could_be_flagged(alpha: float, times: int, needed: int) -> None:
    # The definition of 'needed': the smallest p is times / (n + 1).
    assert times / (needed + 1) <= alpha * (1 + 1e-12) and times / needed > alpha
    assert needed_nulls(alpha, times) == needed
    highest = verdict(1e9, alpha, batch=times)
    assert judge(highest, SETTING, profile(needed)).flagged is True
    too_few = judge(highest, SETTING, profile(needed - 1)) if needed > 1 else None
    if too_few is not None:
        assert too_few.flagged is None and too_few.p_value == pytest.approx(min(1, times / needed))
        why = too_few.why or ""
        assert f"has {needed - 1:,} ordinary prompts" in why and f"at least {needed:,}: raise alpha" in why
        assert ("sample fewer images" in why) == (times > 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_p_value_does_not_depend_on_alpha(batch: int) -> None:
    found = {judge(verdict(180.5, alpha, batch=batch), SETTING, profile(199)).p_value for alpha in (1e-9, 0.01, 0.2)}
    assert found == {batch * (1 + 19) / 200}


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (1, 2), (2, 2), (3, 2), (2, 3), (1, 4)])
def test_of_ordinary_prompts_at_most_alpha_are_flagged_whatever_the_batch(images: int, batch: int) -> None:
    """Each of 60 prompts in turn against the other 59; a prompt's images are alike, but not the same."""
    numbers = random.Random(images * 10 + batch)
    level = [numbers.gauss(0, 1) for _ in range(60)]
    drawn = [tuple(one + numbers.gauss(0, 0.3) for _ in range(max(images, batch))) for one in level]
    alpha, flagged = 0.1, 0
    for left_out, scores in enumerate(drawn):
        others = [one[:images] for n, one in enumerate(drawn) if n != left_out]
        nulls = Profile(SETTING, tuple(Null("a", {"first step": one}) for one in others))
        judged = [judge(verdict(score, alpha, batch=batch), SETTING, nulls) for score in scores[:batch]]
        assert all(one.flagged is not None for one in judged)
        flagged += any(one.flagged for one in judged)
    # Exact where the nulls have as many images as the batch; counted several times it is a bound.
    assert 0 < flagged <= alpha * 60
    if batch <= images:
        assert flagged == alpha * 60


def test_no_score_and_another_setting_stay_without_a_verdict() -> None:
    silent = Verdict("", None, None, None, 0.01, why="guidance is off")
    assert judge(silent, SETTING, profile(99)) == silent
    other = judge(verdict(5.0), replace(SETTING, model="xyz"), profile(99))
    assert other.flagged is None and other.p_value is None and "for another setting" in (other.why or "")


def test_whole_runs_of_other_noise_levels_are_not_compared() -> None:
    levels = (14.6, 5.0, 2.0)
    nulls = tuple(Null("tags", {"first step": (n / 100,), "all steps": (n / 100,)}) for n in range(1, 101))
    band = tuple(BandStep(sigma, 0.1, 0.2, 0.3) for sigma in levels)
    whole = Profile(SETTING, nulls, band)
    run = Verdict("a boat", 3.0, None, None, 0.05, "all steps", score_per_step=tuple((s, 3.0) for s in levels))
    assert judge(run, SETTING, whole).flagged is True
    other = replace(run, score_per_step=((14.6, 3.0), (4.2, 3.0), (1.2, 3.0)))
    judged = judge(other, SETTING, whole)
    assert judged.p_value is None and "other noise levels" in (judged.why or "")
    assert judge(replace(other, score_kind="first step"), SETTING, whole).flagged is True
