"""The monitor is free: it asks the device for nothing while a real ComfyUI samples, and costs no image."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui_server import ComfyServer, make_home
from graphs import node, splice
from PIL import Image
from watched import demo, watched

from sd_dejavu.demo import bundled

NODES = '''
import sys
import time

import torch


def pack(name):
    return next(module for known, module in sys.modules.items() if known.endswith("sd_dejavu." + name))


class LateReadings:
    """A card that is slow: numbers are only there after they were asked for so many times. -1: as ever."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"
    plain = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "times": ("INT", {"min": -1, "max": 10000})}}

    def do(self, model, times):
        Readout = pack("core.readout").Readout
        LateReadings.plain = LateReadings.plain or Readout.ready
        asked = []

        def ready(readout):
            asked.append(readout)
            return len(asked) > times

        Readout.ready = LateReadings.plain if times < 0 else ready
        return (model,)


class BrokenReports:
    """Reports that cannot be written."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "broken": ("BOOLEAN", {})}}

    def do(self, model, broken):
        page = pack("hosts.comfyui.page")
        page.Report = Broken if broken else pack("run.report").Report
        return (model,)


class Broken:
    @classmethod
    def of(cls, watch):
        raise RuntimeError("the report is broken on purpose")


NODE_CLASS_MAPPINGS = {"LateReadings": LateReadings, "BrokenReports": BrokenReports}
'''


def _benchmark() -> Any:
    place = Path(__file__).resolve().parents[2] / "benchmarks" / "monitor_cost.py"
    spec = importlib.util.spec_from_file_location("monitor_cost", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_no_step_reads_from_the_device(comfyui: Path, sampler: str) -> None:
    wanted = {"steps": 4, "runs": 1, "nulls": 1000, "side": 64, "sampler": sampler, "options": ["--cpu"]}
    found = _benchmark().measured(comfyui, wanted)
    for page in ("closed", "open"):
        assert found[page]["device_reads"] == []
        assert found[page]["same_image"] is True
        assert found[page]["p_value"] == 1.0  # judged, against nulls that all score higher
        assert found[page]["hooks_ms_a_step"] > 0  # the hooks were seen; how long they take is the benchmark's
    assert found["reports_sent"] > 0


@pytest.fixture(scope="module")
def memorised() -> str:
    return bundled.held_out_memorised(("hard",))[0]


@pytest.fixture(scope="module")
def slow(comfyui: Path, comfy_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    folder = tmp_path_factory.mktemp("late")
    (folder / "late.py").write_text(NODES, encoding="utf-8")
    pack = comfy_home / "custom_nodes" / "sd-dejavu"
    home = make_home(tmp_path_factory.mktemp("comfyui-late"), pack, [folder / "late.py"], models=comfy_home / "models")
    with ComfyServer(comfyui, home) as server:
        yield server


def pixels(server: ComfyServer, outputs: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(outputs["save"]["images"][0]))))


@pytest.mark.parametrize("times", [3, 10_000])
def test_a_flagged_run_is_explained_when_its_score_has_arrived(slow: ComfyServer, memorised: str, times: int) -> None:
    """In a later step, or when the loop has ended: the same words, and the plain image to the bit."""
    plain = pixels(slow, slow.run(demo(memorised, steps=3, seed=5)))
    found = []
    for wait in (-1, times):
        graph = watched(demo(memorised, steps=3, seed=5), explain="flagged")
        splice(graph, "sampler", "model", "late", node("LateReadings", times=wait))
        with slow.events(f"page {times} {wait}") as events:
            outputs = slow.run(graph, client_id=f"page {times} {wait}")
            told = events.of_type("dejavu.run")
        assert (pixels(slow, outputs) == plain).all()
        (document,) = outputs["verdict"]["dejavu"]
        assert told[-1]["finished"] and told[-1]["report"]["verdicts"] == document["verdicts"]
        found.append(document)
    at_once, late = found
    assert at_once["flagged"] is True and at_once["verdicts"][0]["words"]
    assert late["verdicts"] == at_once["verdicts"] and late["notes"] == at_once["notes"] == []


def test_without_an_open_page_nothing_is_written_during_the_run(slow: ComfyServer, memorised: str) -> None:
    def run(seed: int, broken: bool) -> dict[str, Any]:
        graph = watched(demo(memorised, steps=2, seed=seed))
        splice(graph, "sampler", "model", "broken", node("BrokenReports", broken=broken))
        return slow.run(graph, client_id="page")

    before = slow.log().count("broken on purpose")
    assert run(1, True)["verdict"]["dejavu"][0]["flagged"] is True
    assert slow.log().count("broken on purpose") == before
    # With one that is open the fault is told, and costs neither the image nor the verdict.
    with slow.events("page"):
        outputs = run(2, True)
    assert outputs["save"]["images"] and outputs["verdict"]["dejavu"][0]["flagged"] is True
    assert slow.log().count("the page was not told: RuntimeError: the report is broken on purpose") == 1
    with slow.events("page") as events:
        run(3, False)
        assert events.of_type("dejavu.run")[-1]["finished"] is True
