"""Calibration profiles: conformal p-values by hand, and files that are not what they should be."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sd_dejavu.calibration.profile import Null, Ordinary, Profile, Setting, conformal_p
from sd_dejavu.calibration.store import path_for
from sd_dejavu.core.verdict import BandStep
from sd_dejavu.weights import Identity

SETTING = Setting(
    model="abc",
    prediction_type="epsilon",
    latent_shape=(4, 8, 8),
    steps=50,
    sigma=14.6,
    guidance_scale=7.5,
    baseline="empty prompt",
)


RELEASE_0_1 = (  # repr(SETTING) as it was
    "Setting(model='abc', prediction_type='epsilon', latent_shape=(4, 8, 8), steps=50, sigma=14.6, guidance_scale=7.5, "
    "without='empty prompt', negative_prompt='', begins_with='noise', sampler='')"
)


def profile(count: int = 99, style: str = "plain", start: float = 1.0) -> Profile:
    """Nulls of one image with the scores start, start + 1, ..."""
    return Profile(SETTING, tuple(Null(style, {"first step": (start + i,)}) for i in range(count)))


@pytest.mark.parametrize(
    ("score", "p"),
    [(0.0, 5 / 5), (1.0, 5 / 5), (1.5, 4 / 5), (2.0, 4 / 5), (3.0, 2 / 5), (3.1, 1 / 5)],
)
def test_conformal_p_counts_the_nulls_at_or_above_and_the_score_itself(score: float, p: float) -> None:
    assert conformal_p(score, [1.0, 2.0, 2.0, 3.0]) == p  # ties count against a flag


def test_exchangeable_scores_are_flagged_at_most_alpha_of_the_time() -> None:
    # Each of 20 different scores in turn against the other 19: exactly 1 in 20 gets p <= .05.
    scores = sorted(random.Random(0).sample(range(1000), 20))
    p_values = [conformal_p(s, scores[:i] + scores[i + 1 :]) for i, s in enumerate(scores)]
    assert sorted(p_values) == pytest.approx([k / 20 for k in range(1, 21)])


def test_p_value_by_hand() -> None:
    found = profile().p_value(97.0, SETTING)  # 97, 98, 99 are at or above
    assert (found.p, found.nulls, found.style) == (4 / 100, 99, None)


def test_nulls_of_the_same_style_are_used_where_they_suffice() -> None:
    plain, title = profile(999, "plain", 1.0), profile(998, "title", 1001.0)
    both = Profile(SETTING, plain.nulls + title.nulls)
    enough = both.p_value(995.5, SETTING, style="plain")
    assert (enough.p, enough.nulls, enough.style) == (5 / 1000, 999, "plain")  # 996..999 are above
    pooled = both.p_value(995.5, SETTING, style="title")  # only 998 of that style
    assert (pooled.p, pooled.nulls, pooled.style) == ((1 + 4 + 998) / 1998, 1997, None)
    assert both.p_value(995.5, SETTING, style="keywords").style is None
    assert both.p_value(995.5, SETTING, style="plain", batch=2).style is None  # counted twice: 1,998 would be enough


def test_an_image_of_a_batch_by_hand() -> None:
    one = profile(999)  # 1, 2, ... 999, of one image each
    found = one.p_value(990.5, SETTING, batch=4)
    assert (found.p, found.at_once, found.times) == (4 * (1 + 9) / 1000, 1, 4)
    assert one.p_value(500.0, SETTING, batch=4).p == 1.0
    three = Profile(SETTING, tuple(Null("a", {"first step": (i, -1.0, i + 0.5)}) for i in range(99)))
    found = three.p_value(90.2, SETTING, batch=3)  # the highest of each are 0.5, 1.5, ... 98.5
    assert (found.p, found.at_once, found.times) == ((1 + 9) / 100, 3, 1)
    found = three.p_value(90.2, SETTING, batch=2)  # of the first two: 0, 1, ... 98
    assert (found.p, found.at_once, found.times) == ((1 + 8) / 100, 2, 1)
    found = three.p_value(90.2, SETTING, batch=7)
    assert (found.p, found.at_once, found.times) == (pytest.approx(3 * (1 + 9) / 100), 3, 3)


def test_null_scores_average_the_first_images_of_nulls_that_have_as_many() -> None:
    nulls = (Null("a", {"first step": (1.0, 3.0, 8.0)}), Null("b", {"first step": (5.0,), "all steps": (2.0,)}))
    made = Profile(SETTING, nulls)
    assert made.null_scores("first step", 1) == (1, 5)
    assert made.null_scores("first step", 2) == (2,)
    assert made.null_scores("first step", 3, "a") == (4,)
    assert made.null_scores("first step", 1, "b") == (5,)
    assert made.null_scores("first step", 1, "c") == ()
    assert made.null_scores("first step", 3, highest=True) == (8,)
    assert made.null_scores("first step", 1, highest=True) == (1, 5)
    assert made.null_scores("all steps", 1) == (2,)
    assert made.null_scores("first 5 steps", 1) == ()


class Counted(float):
    """A score that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) < other

    def __gt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) > other


@pytest.mark.parametrize("style", [None, "plain"])
def test_a_hundred_thousand_nulls_are_sorted_once_and_looked_up_by_bisection(style: str | None) -> None:
    order = random.Random(1)
    made = {count: order.sample(range(count), count) for count in (1_000, 100_000)}
    for count, scores in made.items():
        found = Profile(SETTING, tuple(Null("plain", {"first step": (float(s),)}) for s in scores))
        # Unsorted as they are, and with ties counted against a flag: the highest ten are count - 10 and up.
        assert found.p_value(count - 10.0, SETTING, style=style).p == pytest.approx(11 / (count + 1))
        assert found.null_scores("first step", 1, style) is found.null_scores("first step", 1, style)
        Counted.comparisons = 0
        assert conformal_p(Counted(count - 9.5), found.null_scores("first step", 1, style)) == 10 / (count + 1)
        assert 0 < Counted.comparisons <= math.ceil(math.log2(count + 1))


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_has_no_p_value(score: float) -> None:
    with pytest.raises(ValueError, match="no p-value"):
        profile().p_value(score, SETTING)


@pytest.mark.parametrize(
    ("changed", "kind", "sentence"),
    [
        ({"model": "xyz"}, "first step", "model is 'xyz' here but was 'abc' when the profile was made"),
        ({"prediction_type": "flow"}, "first step", "prediction type is 'flow' here but was 'epsilon'"),
        ({"latent_shape": (4, 9, 8)}, "first step", r"latent shape is \(4, 9, 8\) here but was \(4, 8, 8\)"),
        ({"sigma": 14.7}, "first step", "sigma is 14.7 here but was 14.6"),
        ({"baseline": "negative prompt"}, "first step", "baseline is 'negative prompt' here but was 'empty prompt'"),
        ({"steps": 20}, "all steps", "steps is 20 here but was 50"),
        ({"guidance_scale": 5.0}, "first 5 steps", "guidance scale is 5.0 here but was 7.5"),
        ({"negative_prompt": "ugly"}, "all steps", "negative prompt is 'ugly' here but was ''"),
    ],
)
def test_another_setting_is_refused_with_the_difference(changed, kind, sentence: str) -> None:
    other = replace(SETTING, **changed)
    whole = Profile(SETTING, tuple(Null("a", {kind: (float(i),)}) for i in range(99)))
    with pytest.raises(ValueError, match=f"for another setting: {sentence}.*; calibrate for this setting"):
        whole.p_value(1.0, other, kind)


@pytest.mark.parametrize(
    ("made", "run", "same"),
    [
        ("", "", True),
        ("clip skip 2", "clip skip 2", True),
        ("", "clip skip 2", False),
        ("control", "", False),
        ("attn2, control", "control, attn2", True),
        ("clip skip 2", "text encoder unknown", True),
        ("control, clip skip 2", "text encoder unknown", False),
        ("control, clip skip 2", "control, text encoder unknown", True),
    ],
)
def test_what_a_host_adds_is_part_of_the_setting(made: str, run: str, same: bool) -> None:
    kept, here = replace(SETTING, patches=made), replace(SETTING, patches=run)
    assert (kept.mismatch(here, "first step") is None) == same
    if not same:
        assert f"patches are {run!r} here but was {made!r}" in (kept.mismatch(here, "first step") or "")


def test_a_profile_of_release_0_1_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    profile().save(path)
    document = json.loads(path.read_text())
    del document["setting"]["patches"], document["setting"]["text_encoder"]
    document["setting"]["without"] = document["setting"].pop("baseline")
    path.write_text(json.dumps(document))
    assert Profile.load(path) == profile()
    assert path_for(SETTING, tmp_path).name == "abc-" + hashlib.sha256(RELEASE_0_1.encode()).hexdigest()[:8] + ".json"


def test_a_profile_under_the_models_former_name_serves_it_and_no_other() -> None:
    old = replace(SETTING, model="e6e99610c4", text_encoder="")
    assert old.mismatch(replace(SETTING, model=Identity("abc", "e6e99610c4")), "first step") is None
    for other in (Identity("abc", "e6e99610c5"), Identity("abc"), "abc"):
        assert "model is 'abc' here but was 'e6e99610c4'" in (
            old.mismatch(replace(SETTING, model=other), "first step") or ""
        )


@pytest.mark.parametrize(
    ("made", "run", "same"), [("ab", "", True), ("", "ab", True), ("ab", "ab", True), ("ab", "c", False)]
)
def test_text_encoders_are_compared_where_both_are_known(made: str, run: str, same: bool) -> None:
    kept, here = replace(SETTING, text_encoder=made), replace(SETTING, text_encoder=run)
    why = f"text encoder is {run!r} here but was {made!r} when the profile was made"
    assert kept.mismatch(here, "first step") == (None if same else why)


def test_the_identity_of_a_model_is_saved_as_its_digits(tmp_path: Path) -> None:
    made = replace(profile(), setting=replace(SETTING, model=Identity("abc", "e6e99610c4")))
    assert "e6e99610c4" not in json.dumps(asdict(made.setting)) and asdict(made.setting) == asdict(SETTING)
    made.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile()
    assert path_for(made.setting, tmp_path) == path_for(SETTING, tmp_path)


def test_stray_blanks_of_a_negative_prompt_make_no_other_setting() -> None:
    against = replace(SETTING, baseline="negative prompt", negative_prompt="blurry,  lowres ")
    assert against.mismatch(replace(against, negative_prompt="blurry, lowres"), "first step") is None
    assert against.mismatch(replace(against, negative_prompt="blurry,lowres"), "first step") is not None


@pytest.mark.parametrize(
    "changed", [{"sigma": 14.6001}, {"steps": 20}, {"guidance_scale": 5.0}, {"negative_prompt": "ugly"}, {}]
)
def test_the_first_step_does_not_depend_on_what_comes_after_it(changed) -> None:
    assert SETTING.mismatch(replace(SETTING, **changed), "first step") is None


def test_measured_against_a_negative_prompt_its_text_matters_from_the_first_step() -> None:
    ugly = replace(SETTING, baseline="negative prompt", negative_prompt="ugly")
    assert ugly.mismatch(ugly, "first step") is None
    assert "'blurry'" in (ugly.mismatch(replace(ugly, negative_prompt="blurry"), "first step") or "")


@pytest.mark.parametrize(("q", "value"), [(0.0, 10.0), (0.5, 30.0), (0.25, 20.0), (0.3, 22.0), (1.0, 50.0)])
def test_quantiles_interpolate_between_sorted_nulls(q: float, value: float) -> None:
    scores = (30.0, 10.0, 50.0, 20.0, 40.0)
    made = Profile(SETTING, tuple(Null("a", {"first step": (s,)}) for s in scores))
    assert made.quantile(q) == pytest.approx(value)  # place q * 4 among 10, 20, 30, 40, 50
    with pytest.raises(ValueError, match="no ordinary prompts for the first step with 2 images"):
        made.quantile(q, images=2)


# ------------------------------------------------------------------------------------ files


FULL = Profile(
    replace(SETTING, negative_prompt='"Ünicode" \\ 夜', baseline="negative prompt"),
    (Null("plain", {"first step": (1.25, 2.5), "all steps": (3.0,)}), Null("títle", {"first step": (4.0, 5.0)})),
    (BandStep(14.6, 1.0, 2.0, 3.0), BandStep(0.5, 0.1, 0.2, 0.3)),
)


@pytest.mark.parametrize("made", [FULL, Profile(SETTING, ()), profile(3)])
def test_a_saved_profile_loads_as_it_was(made: Profile, tmp_path: Path) -> None:
    made.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == made


def test_a_file_has_one_null_a_line_and_nine_digits(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    Profile(SETTING, (Null("a", {"first step": (1 / 3,)}), Null("b", {"first step": (2e5 / 3,)}))).save(path)
    assert [line for line in path.read_text().splitlines() if "style" in line] == [
        '  {"style": "a", "scores": {"first step": [0.333333333]}},',
        '  {"style": "b", "scores": {"first step": [66666.6667]}}',
    ]


def change(place: list, value) -> str:
    """The file of FULL with one entry replaced (or, with ``value`` of ..., taken out)."""
    document = {
        "format": "dejavu-calibration",
        "schema_version": 1,
        "setting": {
            "model": "abc", "prediction_type": "epsilon", "latent_shape": [4, 8, 8], "steps": 50, "sigma": 14.6,
            "guidance_scale": 7.5, "baseline": "empty prompt", "negative_prompt": "",
        },
        "band": [{"sigma": 1.0, "q05": 1.0, "q50": 2.0, "q95": 3.0}],
        "nulls": [{"style": "a", "scores": {"first step": [1.0]}}],
    }  # fmt: skip
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return json.dumps(document)


def test_the_document_these_faults_are_made_from_is_sound(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(change(["schema_version"], 1))
    assert Profile.load(tmp_path / "p.json").setting == SETTING


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        ("[1, 2]", "is not a Déjà Vu calibration profile"),
        ('{"format": "other"}', "is not a Déjà Vu calibration profile"),
        (change(["schema_version"], 2), "has schema version 2, this program reads 1: calibrate again"),
        (change(["schema_version"], ...), "has schema version None"),
        (change(["setting"], ...), "is damaged"),
        (change(["setting"], [1]), "is damaged"),
        (change(["setting", "sigma"], ...), "is damaged"),
        (change(["setting", "sigma"], "high"), "is damaged"),
        (change(["setting", "guidance_scale"], None), "is damaged"),
        (change(["setting", "colour"], "red"), "is damaged"),
        (change(["setting", "latent_shape"], 4), "is damaged"),
        (change(["setting", "latent_shape"], [math.inf]), "is damaged"),
        (change(["band"], ...), "is damaged"),
        (change(["band", 0, "q05"], ...), "is damaged"),
        (change(["band", 0, "q05"], "low"), "is damaged"),
        (change(["band", 0], 3), "is damaged"),
        (change(["nulls"], ...), "is damaged"),
        (change(["nulls"], 3), "is damaged"),
        (change(["nulls", 0], "x"), "is damaged"),
        (change(["nulls", 0, "style"], ...), "is damaged"),
        (change(["nulls", 0, "scores"], [5]), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], ["high"]), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], [math.nan]), "is damaged"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"format": ' + "[" * 100_000, "is not valid JSON"),
        (change(["nulls"], {}), "is damaged"),
        (change(["nulls"], "ab"), "is damaged"),
        (change(["band"], {}), "is damaged"),
        (change(["nulls", 0, "style"], 3), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], "12"), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], {"1": 2}), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], True), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], [True]), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], ["1"]), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], [-1.0]), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], [10**400]), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], []), "is damaged"),
        (change(["setting", "sigma"], "14.6"), "is damaged"),
        (change(["setting", "sigma"], math.inf), "is damaged"),
        (change(["setting", "sigma"], True), "is damaged"),
        (change(["setting", "latent_shape"], "488"), "is damaged"),
        (change(["setting", "latent_shape"], ["4", "8"]), "is damaged"),
        (change(["setting", "model"], {"name": "abc"}), "is damaged"),
        (change(["setting", "steps"], None), "is damaged"),
        (change(["setting", "steps"], "20"), "is damaged"),
        (change(["setting", "steps"], True), "is damaged"),
        (change(["setting", "model"], 7), "is damaged"),
        (change(["setting", "patches"], True), "is damaged"),
        (change(["setting", "text_encoder"], 7), "is damaged"),
        (change(["setting", "negative_prompt"], 7), "is damaged"),
        (change(["nulls", 0, "scores", "first step"], [1e308, 1e308]), "is damaged"),
        (change(["setting", "negative_prompt"], ["ugly"]), "is damaged"),
        (change(["band", 0, "q05"], math.nan), "is damaged"),
        (change(["band", 0, "q05"], "1"), "is damaged"),
    ],
)
def test_a_file_that_is_no_profile_gives_one_sentence(content: str | bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=sentence) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        Profile.load(tmp_path / "none.json")


@pytest.mark.parametrize("ordinary", ["generated", "recombined", "own list"])
def test_which_ordinary_prompts_it_was_made_with_is_kept(tmp_path: Path, ordinary: Ordinary) -> None:
    path = tmp_path / "made.json"
    replace(profile(), ordinary=ordinary).save(path)
    assert Profile.load(path).ordinary == ordinary


def test_a_profile_of_release_0_1_does_not_say_which_and_another_word_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    profile().save(path)
    assert "ordinary" not in json.loads(path.read_text(encoding="utf-8"))
    assert Profile.load(path).ordinary is None
    for word in ("mine", ["generated"], 1):
        document = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**document, "ordinary": word}), encoding="utf-8")
        with pytest.raises(ValueError, match="damaged"):
            Profile.load(path)
