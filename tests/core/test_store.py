"""Where profiles are kept, and which one is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.calibration.store import find, find_for_monitor, path_for, user_folder

SETTING = Setting("abc", "epsilon", (4, 8, 8), 50, 14.6, 7.5, "empty prompt")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SD_DEJAVU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def kept(setting: Setting, mark: float, path: Path | None = None) -> Profile:
    """A saved profile that can be told by its one score."""
    made = Profile(setting, (Null("a", {"first step": (mark,), "all steps": (mark,)}),))
    path = path or path_for(setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def test_the_users_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert user_folder() == tmp_path / "home"
    monkeypatch.delenv("SD_DEJAVU_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert user_folder() == Path("/data/sd-dejavu")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_folder() == Path("/home/somebody/.local/share/sd-dejavu")


@pytest.mark.parametrize(
    "changed", [{"model": "xyz"}, {"steps": 20}, {"sigma": 1.0}, {"negative_prompt": "ugly"}, {"latent_shape": (1,)}]
)
def test_each_setting_has_a_file_of_its_own(changed) -> None:
    assert path_for(replace(SETTING, **changed)) != path_for(SETTING)
    assert path_for(replace(SETTING)) == path_for(SETTING)


def test_nothing_is_found_where_nothing_is_kept() -> None:
    assert find(SETTING, "first step") is None


def test_the_exact_profile_goes_before_others_that_fit(tmp_path: Path) -> None:
    other = replace(SETTING, steps=20)
    for number, setting in enumerate([SETTING, other]):
        kept(setting, float(number))
    also = tmp_path / "brought.json"
    kept(SETTING, 9.0, also)
    assert find(SETTING, "first step", 1, [also]) == Profile.load(path_for(SETTING))
    assert find(other, "first step", 1, [also]) == Profile.load(path_for(other))


def test_another_profile_of_the_model_serves_where_it_fits_the_kind_of_score(tmp_path: Path) -> None:
    twenty = kept(replace(SETTING, steps=20), 1.0)
    kept(replace(SETTING, model="xyz"), 2.0)
    assert find(SETTING, "first step") == twenty
    assert find(SETTING, "all steps") is None
    brought = kept(SETTING, 3.0, tmp_path / "brought.json")
    assert find(SETTING, "all steps", 1, [tmp_path / "brought.json"]) == brought
    assert find(SETTING, "first step", 1, [tmp_path / "brought.json"]) == twenty  # the user's own first


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '{"format": "dejavu-calibration", "schema_version": 9}'])
def test_a_damaged_file_is_passed_over_with_one_warning_and_the_others_serve(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept(SETTING, 1.0)
    path_for(SETTING).write_text(content)
    assert find(SETTING, "first step") is None
    other = kept(replace(SETTING, steps=20), 2.0)
    brought = kept(SETTING, 3.0, tmp_path / "brought.json")
    for _ in range(3):
        assert find(SETTING, "first step", 1, [tmp_path / "brought.json"]) == other
        assert find(SETTING, "all steps", 1, [tmp_path / "brought.json"]) == brought
    (told,) = caplog.messages
    assert str(path_for(SETTING)) in told and told.startswith("[Déjà Vu] passed over: ") and "\n" not in told


def test_the_profile_that_can_serve_the_images_asked_for_is_taken(tmp_path: Path) -> None:
    kept(SETTING, 1.0)  # one image a null
    four = Profile(SETTING, tuple(Null("short", {"first step": (1.0, 2.0, 3.0, 4.0)}) for _ in range(3)))
    four.save(tmp_path / "four.json")
    assert find(SETTING, "first step", 4, [tmp_path / "four.json"]) == four
    assert find(SETTING, "first step", 5, [tmp_path / "four.json"]) is None


def test_a_file_is_read_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept(SETTING, 1.0)
    read, load = [], Profile.load
    monkeypatch.setattr(Profile, "load", lambda path: read.append(path) or load(path))
    first = find(SETTING, "first step")
    assert find(SETTING, "first step") is first and find_for_monitor(SETTING, "all steps") is first
    assert read == [path_for(SETTING)]
    kept(SETTING, 12.5)
    changed = find(SETTING, "first step")
    assert changed is not None and changed.null_scores("first step", 1) == (12.5,)
    assert read == [path_for(SETTING)] * 2
