"""Runs of Automatic1111 and Forge that end early."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from host_process import RequestRefused
from webui_server import WebUIServer
from webui_watched import errors_of_ours, pixels, watched


def begun(webui: WebUIServer, **payload: Any) -> tuple[threading.Thread, list[Any]]:
    """A long run in a thread, after its first steps; its result is put into the list."""
    found: list[Any] = []
    run = threading.Thread(target=lambda: found.append(watched(webui, "a red fox", steps=150, **payload)))
    run.start()
    deadline = time.monotonic() + 60
    while (webui.progress()["state"]["sampling_step"] or 0) < 2:
        assert time.monotonic() < deadline and run.is_alive(), "the run did not begin"
        time.sleep(0.05)
    return run, found


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_a_run_that_the_user_ends_has_a_verdict(webui: WebUIServer, how: str) -> None:
    run, found = begun(webui, settings={"explain": "always"})
    webui.post_json(f"/sdapi/v1/{how}", {})
    run.join(60)
    assert not run.is_alive()
    ((generated, (document,)),) = found
    (verdict,) = document["verdicts"]
    assert generated.images and verdict["score"] > 0 and verdict["words"]
    assert 2 <= len(verdict["score_per_step"]) < 150
    assert errors_of_ours(webui) == []
    # The next run is as if nothing had been.
    plain = webui.txt2img()
    again, (document,) = watched(webui, "a red fox in the snow", {"explain": "never"})
    assert (pixels(again) == pixels(plain)).all() and len(document["verdicts"][0]["score_per_step"]) == 4


def test_of_several_images_the_skipped_one_alone_is_cut_short(webui: WebUIServer) -> None:
    run, found = begun(webui, settings={"explain": "never"}, n_iter=2)
    webui.post_json("/sdapi/v1/skip", {})
    run.join(120)
    ((_, documents),) = found
    lengths = [len(document["verdicts"][0]["score_per_step"]) for document in documents]
    assert [document["image"] for document in documents] == [0, 1]
    assert lengths[0] < 150 == lengths[1]


@pytest.mark.parametrize(
    ("size", "stage", "why"),
    [
        ({"count": 2000}, "ordinary prompts: ", "nothing was measured: it was stopped"),
        ({"count": 20, "whole_runs": 20}, "whole runs of ordinary prompts: ", "it was stopped before all whole runs"),
    ],
)
def test_calibrating_can_be_ended(webui: WebUIServer, size: dict[str, int], stage: str, why: str) -> None:
    kept = sorted((webui.home / "dejavu").rglob("*.json"))
    told: list[str] = []

    def calibrate() -> None:
        with pytest.raises(RequestRefused) as refused:
            webui.post_json("/dejavu/calibrate", {**size, "width": 64, "height": 64, "steps": 100}, 900)
        told.append(str(refused.value))

    measuring = threading.Thread(target=calibrate)
    measuring.start()
    deadline = time.monotonic() + 60
    while not (webui.progress()["textinfo"] or "").startswith(stage):
        assert time.monotonic() < deadline and measuring.is_alive(), "the measuring did not begin"
        time.sleep(0.1)
    webui.interrupt()
    measuring.join(60)
    assert not measuring.is_alive() and why in told[0]
    assert sorted((webui.home / "dejavu").rglob("*.json")) == kept
    assert webui.txt2img().images
