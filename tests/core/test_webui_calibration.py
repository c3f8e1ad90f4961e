"""What calibrating takes in Automatic1111 and Forge, and what is kept of it: no host."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_reference_build import data, write

from sd_dejavu.calibration import store
from sd_dejavu.calibration.first_step import PROMPTS_A_SEED
from sd_dejavu.calibration.profile import Null, Ordinary, Profile, Setting
from sd_dejavu.core.settings import named, options_of
from sd_dejavu.hosts.webui.audit import read
from sd_dejavu.hosts.webui.calibration import Calibrating, Calibration, networks_of
from sd_dejavu.hosts.webui.references import Building, build_set, guard_of
from sd_dejavu.hosts.webui.run import Automatic1111
from sd_dejavu.hosts.webui.work import Telling, calibrated
from sd_dejavu.run.measure import Measurement

SETTING = Setting(
    model="abc",
    prediction_type="epsilon",
    latent_shape=(4, 8, 8),
    steps=20,
    sigma=14.6,
    guidance_scale=7.5,
    baseline="empty prompt",
)


def asked(body: str) -> Calibrating:
    """From the body of a request."""
    return Calibrating(**named(json.loads(body), options_of(Calibrating), "calibrating"))


def test_an_empty_object_takes_the_defaults() -> None:
    assert asked("{}") == Calibrating(1000, 512, 512, 20, "Euler", "Automatic", "", False)
    assert asked('{"count": 20.0, "width": 64, "replace": true}') == Calibrating(20, 64, replace=True)


@pytest.mark.parametrize("name", ["count", "width", "height", "steps"])
def test_every_number_is_bounded_on_both_sides(name: str) -> None:
    (known,) = (o for o in options_of(Calibrating) if o.name == name)
    for inside in (known.minimum, known.maximum):
        assert getattr(Calibrating(**{name: inside}), name) == inside
    for wrong in (known.minimum - 1, known.maximum + 1, -8, 0, 10**12, None, "64", 64.5, True, float("nan"), [64]):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            asked(json.dumps({name: wrong}))


def test_the_steps_are_those_of_every_measurement() -> None:
    steps = [next(o for o in options_of(kind) if o.name == "steps") for kind in (Calibrating, Measurement)]
    assert len({(known.minimum, known.maximum) for known in steps}) == 1


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"width": 65}, "width must be a multiple of 8, not 65"),
        ({"height": 2047}, "height must be a multiple of 8, not 2047"),
        ({"sampler_name": None}, "sampler name must be text, not None"),
        ({"negative_prompt": 5}, "negative prompt must be text, not 5"),
        ({"replace": "false"}, "replace must be true or false, not 'false'"),
        ({"colour": 1}, "calibrating has no argument colour"),
        ({"count": 20, "whole_runs": 21}, "whole runs must be at most the 20 of count, not 21"),
        ({"networks": "a red fox"}, "networks must be like '<lora:name:1>', one after another, not 'a red fox'"),
    ],
)
def test_what_makes_no_sense_is_told(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}"):
        asked(json.dumps(values))


@pytest.mark.parametrize(
    "name",
    ["strength", "width", "height", "false_discovery_rate", "nulls", "sample", "worst", "images", "steps", "seed"],
)
def test_every_number_of_an_audit_is_bounded_on_both_sides(name: str) -> None:
    for wrong in (-1, 10**20, None, "7", float("nan")):
        with pytest.raises(ValueError, match=f"^{name.replace('_', ' ')} must be "):
            read({"references": "cats", name: wrong})


def test_as_many_prompts_as_it_takes_to_flag_a_batch() -> None:
    asked = Calibrating(count=100, steps=20)
    assert asked.enough_for("first step", 0.01) == asked
    assert asked.enough_for("first step", 0.01, batch=4).count == 400  # 399 would do
    assert asked.enough_for("first step", 0.001).count == 1000
    whole = asked.enough_for("all steps", 0.01)
    assert (whole.count, whole.whole_runs) == (100, 100)
    # 100 predictions are as many as those of two images and a half of 20 steps with guidance.
    assert (asked.images, whole.images) == (2, 102)


def test_networks_are_taken_out_of_a_prompt() -> None:
    assert networks_of("<lora:a b:0.5> a <red> fox, 1 < 2 > 0 <hypernet:x:1>") == "<lora:a b:0.5> <hypernet:x:1>"
    assert Calibrating(networks="<lora:a b:0.5> <hypernet:x:1>").size == "512 x 512"


def test_the_page_is_told_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(shared=SimpleNamespace(state=state)))
    Telling()("ordinary prompts", 25, 1000)
    assert state.textinfo == "ordinary prompts: 25 of 1,000"
    assert (state.job_no, state.job_count, state.sampling_step, state.sampling_steps) == (0, 1, 25, 1000)


def test_whole_runs_are_added_to_the_first_steps_that_are_kept(tmp_path: Path) -> None:
    run = dataclasses.replace(SETTING, sampler="Euler", guidance_scale=7.0)
    other = Profile(SETTING, profile(120).nulls, ordinary="generated")
    store.keep(other, store.path_for(SETTING, tmp_path))

    def found(ordinary: Ordinary = "generated", **asked: Any) -> Profile | None:
        return Calibration(Automatic1111(), Calibrating(**asked), tmp_path, lambda done: None)._to_go_on_with(
            run, ordinary
        )

    more = found(count=100, whole_runs=100)
    assert more is not None and more.setting == run and more.nulls == other.nulls and more.band == ()
    assert found(count=100) is None  # asked for none, they are measured anew
    assert found(count=121, whole_runs=20) is None
    assert found(count=100, whole_runs=100, replace=True) is None
    assert found("recombined", count=100, whole_runs=100) is None


def test_what_is_told_begins_with_what_it_is_good_for() -> None:
    told = calibrated(profile(120), Calibrating(width=768), 0.01)
    assert told[0] == "Ready: from now on images of this checkpoint at 768 x 512 get a verdict."
    assert told[1].startswith("120 ordinary prompts")
    told = calibrated(profile(40), Calibrating(), 0.01)
    assert told[0] == "No verdict yet: at alpha = 0.01 that takes at least 99 ordinary prompts."
    assert told[1].startswith("40 ordinary prompts")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"folder": " ", "name": "x"}, "name the folder"),
        ({"folder": "/a", "name": ""}, "give the set a name"),
        ({"folder": "/a", "name": "../x"}, r"a set cannot be kept as '\.\./x'"),
        ({"folder": "/a", "name": ".x"}, "a set cannot be kept"),
        ({"folder": "/a", "name": "x", "features": "dinov2"}, "features must be one of"),
    ],
)
def test_a_reference_set_that_cannot_be_built_is_told_of(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Building(**values)


def test_a_reference_set_is_built_as_the_trainer_read_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"4_red fox/a.png": data(1), "cover.png": data(2)})
    wanted = {"folder": str(folder), "name": "foxes"}
    (tmp_path / "sets").mkdir()

    def told(**more: Any) -> str:
        return build_set(Building(**wanted, **more), tmp_path / "sets", lambda stage, done, total: None)

    assert told() == (
        "Ready: 1 different images, 1 with a caption. Kept as foxes. 1 image of a folder, read as kohya's trainer reads it "
        "(guessed from its numbered folders): captions from .txt files, else the folder's name; repeated as the folders' names "
        "say. Left out: 1 image beside the numbered folders:   cover.png: kohya's trainer reads the images of numbered folders "
        "only"
    )
    with pytest.raises(ValueError, match=r"^gone\.toml: cannot be read: No such file or directory$"):
        told(trainer_config=str(folder / "gone.toml"))
    (tmp_path / "config.json").write_text('{"datasets": [{"subsets": [{"image_dir": "x/4_red fox"}]}]}')
    with pytest.raises(ValueError, match="made from another source or with other settings"):
        told(trainer_config=str(tmp_path / "config.json"))
    assert "read as a plain trainer reads it" in told(trainer="plain", restart=True)


def profile(prompts: int) -> Profile:
    return Profile(SETTING, tuple(Null("plain", {"first step": (0.5,)}) for _ in range(prompts)))


def measured(folder: Path, prompts: int, replace: bool = False) -> Calibration:
    calibration = Calibration(Automatic1111(), Calibrating(replace=replace), folder, lambda done: None)
    calibration.profile = profile(prompts)
    return calibration


def test_what_is_measured_is_kept_unless_more_would_be_lost(tmp_path: Path) -> None:
    found, path = measured(tmp_path, 120).kept()
    assert found == profile(120) == Profile.load(path) and path.parent == tmp_path
    with pytest.raises(store.HoldsMore, match="holds 120"):
        measured(tmp_path, 20).kept()
    assert Profile.load(path) == profile(120)
    measured(tmp_path, 20, replace=True).kept()
    assert Profile.load(path) == profile(20)


def test_where_nothing_was_measured_it_says_why(tmp_path: Path) -> None:
    calibration = Calibration(Automatic1111(), Calibrating(), tmp_path, lambda done: None)
    with pytest.raises(ValueError, match="nothing was measured: it was stopped"):
        calibration.kept()
    calibration.fault = RuntimeError("no such model")
    with pytest.raises(ValueError, match="nothing was measured: no such model"):
        calibration.kept()
    calibration.fault = store.HoldsMore("more is kept")
    with pytest.raises(store.HoldsMore, match=r"^more is kept$"):
        calibration.kept()
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_is_not_there_is_told_of_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^no reference set is chosen: build one of your images and captions in the tab"
    ):
        guard_of(tmp_path, "")
    (tmp_path / "cats.safetensors").touch()
    with pytest.raises(ValueError, match=r"^there is no reference set 'dogs': choose one of the list$"):
        guard_of(tmp_path, "dogs")


def test_an_audit_on_the_page_goes_in_the_smallest_pieces() -> None:
    asked = read({"references": "foxes", "nulls": 200})
    assert asked.wanted.partition == PROMPTS_A_SEED and asked.wanted.nulls == 200
    with pytest.raises(ValueError, match="partition"):  # no argument of the page's
        read({"references": "foxes", "partition": 100})
