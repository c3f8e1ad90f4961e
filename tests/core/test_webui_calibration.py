"""What calibrating takes in Automatic1111 and Forge, and what is kept of it: no host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sd_dejavu.calibration import store
from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.core.settings import named, options_of
from sd_dejavu.hosts.webui.audit import read
from sd_dejavu.hosts.webui.calibration import Calibrating, Calibration
from sd_dejavu.hosts.webui.run import Automatic1111
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
