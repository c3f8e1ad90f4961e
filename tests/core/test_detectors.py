"""Detectors by hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sd_dejavu
from sd_dejavu import detectors
from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.detectors import Observed, available, scores
from sd_dejavu.detectors.tiled_l2 import tiled_distance

WIDEST = """
from ..core.denoiser import Predictions
from . import Detector
from .magnitude import difference


def read(predictions: Predictions):
    return difference(predictions).abs().flatten(1).amax(1)


DETECTORS = (Detector("widest", "the widest difference in one place", read=read, scores={"widest, first step": 1}),)
"""


def test_scores_of_release_0_1_keep_their_names_and_places() -> None:
    assert list(scores())[:3] == ["first step", "first 5 steps", "all steps"]
    assert [(s.detector, s.evaluations) for s in list(scores().values())[:3]] == [
        ("magnitude", 1),
        ("magnitude", 5),
        ("magnitude", None),
    ]
    assert {"letter_case": "prompt", "magnitude": "predictions", "tiled_l2": "images"}.items() <= {
        name: d.needs for name, d in available().items()
    }.items()


def test_a_new_file_is_choosable_everywhere_and_has_p_values_of_its_own(tmp_path: Path) -> None:
    """One file in a copy of the package: check, monitors, calibrate and bench offer it, and it judges a run."""
    core = Path(sd_dejavu.__file__).parent
    shutil.copytree(core, tmp_path / "sd_dejavu", ignore=shutil.ignore_patterns("__pycache__", "model"))
    (tmp_path / "sd_dejavu" / "detectors" / "widest.py").write_text(WIDEST)
    probe = """
import torch
from sd_dejavu.calibration.calibrate import calibrate
from sd_dejavu.cli.main import parser
from sd_dejavu.core.denoiser import Evaluation
from sd_dejavu.hosts.webui.controls import OPTIONS
from sd_dejavu.run.measure import Measurement, measure, setting_of, verdict_on
from sd_dejavu.run.monitoring import Monitoring
from sd_dejavu.run.state import RunState
from hand_made import LinearDenoiser, encoder
import sd_dejavu

assert sd_dejavu.__file__.startswith(HOME), sd_dejavu.__file__
name = "widest, first step"
assert parser().parse_args(["check", "--score", name, "a"]).score == name
assert parser().parse_args(["bench", "--detectors", "widest"]).detectors == ["widest"]
assert name in next(o for o in OPTIONS if o.name == "score").choices
model = LinearDenoiser()
model.encode = encoder({"red": 3.0, "fox": 1.0})
wanted = Measurement(score=name, images=1, alpha=0.1)
profile = calibrate(model, ["fox"] * 19, wanted)
ordinary = profile.nulls[0].scores
rows = model.encode("fox").rows.sum(1) - model.encode("").rows.sum(1)
assert abs(ordinary[name][0] - float(rows.abs().max())) < 1e-4 and abs(ordinary["first step"][0] - float(rows.norm())) < 1e-4
(measured,) = measure(model, ["red fox"], wanted)
verdict = verdict_on(measured, wanted, setting_of(model, wanted), profile)
assert verdict.flagged and abs(verdict.p_value - 1 / 20) < 1e-9 and verdict.score_kind == name
state = RunState(Monitoring(score=name, alpha=0.1), "red fox", setting_of(model, wanted), profile)
base = torch.zeros(1, 1, 2, 2)
moved = base.clone(); moved[0, 0, 1, 1] = 50.0
state.trace.record(Evaluation(base, torch.ones(1), moved, base).predictions)
assert state.is_flagged() and state.verdicts()[0].score == 50.0
"""
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]; HOME = {str(tmp_path)!r}\n"
    )
    found = subprocess.run([sys.executable, "-c", script + probe], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr


def test_two_detectors_with_one_name_for_a_score_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = replace(available()["magnitude"], name="twin")
    monkeypatch.setattr(detectors, "available", lambda: {**available(), "twin": twin})
    with pytest.raises(ValueError, match="two detectors call a score 'first step': magnitude and twin"):
        detectors.scores.__wrapped__()


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("The Great Wave off Kanagawa", 4 / 5),
        ("a small boat", 0.0),
        ("Été 4K - Paris, iPhone", 2 / 3),  # '4K' and '-' start with no letter
        ("1234 !", 0.0),
        ("", 0.0),
    ],
)
def test_letter_case_is_the_share_of_capitalised_words(prompt: str, share: float) -> None:
    assert available()["letter_case"].score(Observed(prompt)) == pytest.approx(share)


def test_the_magnitude_detector_averages_what_was_run() -> None:
    detector = available()["magnitude"]
    assert detector.score(Observed("", torch.tensor([[1.0, 2.0], [3.0, 6.0]]))) == 3
    with pytest.raises(ValueError, match="needs the readings"):
        detector.score(Observed(""))


def test_tiled_distance_is_the_rms_of_the_worst_tile() -> None:
    a, b = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    b[1, 2, 4], b[1, 3, 5] = 0.6, 0.8  # both in the tile of rows 2-3, columns 4-5, of 12 elements
    b[0, 7, 7] = 0.9  # alone in its tile
    assert tiled_distance(a, b).item() == pytest.approx(((0.36 + 0.64) / 12) ** 0.5)
    assert tiled_distance(b, a).item() == tiled_distance(a, b).item()


def test_tiled_distance_equals_a_loop_over_tiles_and_leaves_the_rest_out() -> None:
    a, b = seeded_noise((3, 14, 9), 0, 2)
    tiles = [
        np.sqrt(np.mean((a - b)[:, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2].numpy() ** 2))
        for i in range(4)
        for j in range(4)
    ]
    assert tiled_distance(a, b).item() == pytest.approx(float(max(tiles)))
    b[:, 12:], b[:, :, 8:] = 99, 99  # beyond the last whole tile
    assert tiled_distance(a, b).item() == pytest.approx(float(max(tiles)))


def test_tiled_l2_scores_minus_the_mean_over_all_pairs() -> None:
    # Even images of .1, .2 and .5: the distances of the pairs are .1, .4 and .3.
    images = torch.tensor([0.1, 0.2, 0.5]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    detector = available()["tiled_l2"]
    assert detector.score(Observed("", images=images)) == pytest.approx(-0.8 / 3)
    for too_few in (None, images[:1]):
        with pytest.raises(ValueError, match="at least 2 images"):
            detector.score(Observed("", images=too_few))
