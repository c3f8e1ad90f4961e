"""A run of Automatic1111 or Forge that makes the calibration it lacks, and those after it that use it."""

from __future__ import annotations

import json

import pytest
from webui_server import WebUIServer
from webui_watched import errors_of_ours, pixels, watched

SIZE = {"width": 72, "height": 64, "steps": 3}  # no other test samples this size


def test_the_first_run_calibrates_and_those_after_it_are_judged(webui: WebUIServer) -> None:
    folder = webui.home / "dejavu" / "calibration"
    before = set(folder.glob("*.json"))
    plain = webui.txt2img(prompt="a red fox", batch_size=2, **SIZE)
    _, (unjudged, _) = watched(webui, "a red fox", batch_size=2, **SIZE)
    assert unjudged["lacks_calibration"] is True and "nothing to compare it with" in unjudged["verdicts"][0]["sentence"]
    generated, documents = watched(
        webui, "a red fox", {"calibrate_first": 20, "explain": "never"}, batch_size=2, **SIZE
    )
    assert [(pixels(generated, n) == pixels(plain, n)).all() for n in range(2)] == [True, True]
    (made,) = set(folder.glob("*.json")) - before
    try:
        assert [len(null["scores"]["first step"]) for null in json.loads(made.read_text())["nulls"]] == [2] * 20
        _, again = watched(webui, "a red fox", {"explain": "never", "alpha": 0.05}, batch_size=2, **SIZE)
        for document, other in zip(documents, again, strict=True):
            (verdict,), (known,) = document["verdicts"], other["verdicts"]
            # 20 are too few for alpha = 0.01, and enough for 0.05
            assert verdict["p_value"] == known["p_value"] is not None and verdict["nulls"] == 20
            assert verdict["flagged"] is None and document["lacks_calibration"] is True
            assert known["flagged"] in (True, False) and other["lacks_calibration"] is False
            assert verdict["score"] == pytest.approx(known["score"])
    finally:
        made.unlink()
    assert errors_of_ours(webui) == []


def test_what_calibrate_measures_is_what_the_run_itself_does(webui: WebUIServer) -> None:
    folder = webui.home / "dejavu" / "calibration"
    before = set(folder.glob("*.json"))
    watched(webui, "a red fox", {"calibrate_first": 20, "explain": "never"}, sampler_name="Euler", **SIZE)
    (made,) = set(folder.glob("*.json")) - before
    own = [null["scores"]["first step"][0] for null in json.loads(made.read_text())["nulls"]]
    made.unlink()
    told = webui.post_json("/dejavu/calibrate", {"count": 20, "sampler_name": "Euler", **SIZE})
    other = folder / told["file"]
    assert own == pytest.approx(
        [n["scores"]["first step"][0] for n in json.loads(other.read_text())["nulls"]], rel=1e-3
    )
    other.unlink()
