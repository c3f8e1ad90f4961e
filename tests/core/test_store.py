"""Where profiles are kept, and which one is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.calibration.store import HoldsMore, Size, check_kept, find, find_for_monitor, keep, path_for, user_folder
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


def test_a_host_also_looks_where_the_command_line_keeps_its_own(tmp_path: Path) -> None:
    host = tmp_path / "host"
    told = kept(SETTING, 1.0)
    run = replace(SETTING, steps=4, sampler="Euler", text_encoder="ab")
    assert find(run, "first step", folder=host) == told
    assert not host.exists() and path_for(run, host).parent == host
    own = kept(SETTING, 2.0, path_for(SETTING, host))
    assert find(run, "first step", folder=host) == own  # among equals
    assert find(run, "first step") == told


def test_profiles_under_a_models_former_name_are_found(tmp_path: Path) -> None:
    old = kept(replace(SETTING, model="[old] e6"), 1.0, path_for(replace(SETTING, model="[old] e6"), tmp_path))
    assert find(SETTING, "first step", folder=tmp_path) is None
    assert find(replace(SETTING, model=Identity("abc", "[old] e6")), "first step", folder=tmp_path) == old


def test_a_folder_that_cannot_be_read_costs_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    own = kept(SETTING, 1.0, path_for(SETTING, tmp_path / "host"))
    monkeypatch.delenv("SD_DEJAVU_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert find(SETTING, "first step", folder=tmp_path / "host") == own
    assert "Could not determine home directory" in caplog.text


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


# ------------------------------------------------------------------------------------- what is kept


def holding(prompts: int, whole_runs: int = 0, images: int = 1) -> Profile:
    scores = (0.5,) * images
    whole = {"first step": scores, "all steps": scores}
    nulls = [Null("a", dict(whole if number < whole_runs else {"first step": scores})) for number in range(prompts)]
    return Profile(SETTING, tuple(nulls))


def test_the_size_of_a_calibration_is_counted() -> None:
    assert Size.of(holding(5, 2, 3)) == Size(5, 2, 3)
    assert Size.of(Profile(SETTING, ())) == Size(0, 0, 0)
    assert str(Size(1200, 20, 4)) == "1,200 ordinary prompts, 20 of them as whole runs (images a prompt: 4)"


@pytest.mark.parametrize("fewer", [(119, 2, 2), (120, 1, 2), (120, 2, 1), (500, 0, 2)])
def test_a_calibration_that_holds_more_is_replaced_only_when_asked(fewer: tuple[int, int, int]) -> None:
    path = path_for(SETTING)
    keep(holding(120, 2, 2), path)
    before = path.read_bytes()
    for refused in (lambda: keep(holding(*fewer), path), lambda: check_kept(path, Size(*fewer))):
        with pytest.raises(
            HoldsMore, match=f"^the calibration {path.name} is kept: it holds 120 .* ask for 'replace'$"
        ):
            refused()
    assert path.read_bytes() == before
    keep(holding(*fewer), path, replace=True)
    assert Profile.load(path) == holding(*fewer)


@pytest.mark.parametrize("as_many", [(120, 2, 2), (121, 2, 2), (120, 3, 2), (120, 2, 3)])
def test_one_that_holds_as_much_replaces_it(as_many: tuple[int, int, int]) -> None:
    path = path_for(SETTING)
    keep(holding(120, 2, 2), path)
    check_kept(path, Size(*as_many))
    keep(holding(*as_many), path)
    assert Profile.load(path) == holding(*as_many)


def test_what_is_no_calibration_has_nothing_to_lose() -> None:
    path = path_for(SETTING)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    keep(holding(20), path)
    assert Profile.load(path) == holding(20)
