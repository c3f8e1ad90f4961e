"""Which workflows have their Monitor linked to the text encoder of the prompt, before ComfyUI runs them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "sd_dejavu" / "hosts" / "comfyui" / "graph.py"


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module alone: the rest of its package wants ComfyUI."""
    utils = ModuleType("comfy_execution.utils")
    utils.get_executing_context = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_execution", ModuleType("comfy_execution"))
    monkeypatch.setitem(sys.modules, "comfy_execution.utils", utils)
    spec = importlib.util.spec_from_file_location("dejavu_graph_alone", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def workflow(negative: str = "", **monitor: Any) -> dict[str, Any]:
    return {
        "1": node("CheckpointLoaderSimple"),
        "3": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "4": node("CLIPTextEncode", clip=["9", 0], text=negative),
        "5": node("DejaVuMonitor", **{"model": ["1", 0], "without": "empty prompt", "calibrate_first": 0, **monitor}),
        "6": node("KSampler", model=["5", 0], positive=["3", 0], negative=["4", 0], seed=3),
        "7": node("DejaVuVerdict", monitor=["5", 1], samples=["6", 0]),
    }


@pytest.mark.parametrize(
    ("given", "linked"),
    [
        (workflow(), False),  # the negative prompt is known to be empty
        (workflow("blurry"), True),
        (workflow("blurry", without="negative prompt"), False),
        (workflow(calibrate_first=100), True),
        (workflow("blurry", without="negative prompt", calibrate_first=100), True),
        (workflow("blurry") | {"4": node("ConditioningZeroOut", conditioning=["3", 0])}, True),
        (workflow("blurry") | {"6": node("KSampler", model=["1", 0], positive=["3", 0], negative=["4", 0])}, False),
        (workflow("blurry") | {"3": node("LoadConditioning")}, False),
        (workflow("blurry") | {"3": node("Loop", conditioning=["3", 0])}, False),
    ],
)
def test_a_monitor_is_linked_where_it_needs_the_encoder(graph: ModuleType, given: dict[str, Any], linked: bool) -> None:
    graph.link_encoders(given)
    assert given["5"]["inputs"].get("clip") == (["1", 1] if linked else None)


def test_one_that_is_linked_stays_as_it_is(graph: ModuleType) -> None:
    given = workflow("blurry", clip=["8", 2])
    graph.link_encoders(given)
    assert given["5"]["inputs"]["clip"] == ["8", 2]


def test_it_is_found_behind_guiders_loras_and_conditioning_nodes(graph: ModuleType) -> None:
    given = {
        "2:5": node("DejaVuMonitor", model=["1", 0], without="empty prompt", calibrate_first=100),
        "11": node("LoraLoaderModelOnly", model=["2:5", 0]),
        "12": node("CFGGuider", model=["11", 0], positive=["13", 0], negative=["4", 0]),
        "13": node("ControlNetApplyAdvanced", positive=["14", 0], negative=["4", 0]),
        "14": node("ConditioningCombine", conditioning_1=["2:3", 0], conditioning_2=["4", 0]),
        "2:3": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "4": node("CLIPTextEncode", clip=["9", 0], text=""),
        "6": node("SamplerCustomAdvanced", guider=["12", 0], noise=["15", 0]),
    }
    graph.link_encoders(given)
    assert given["2:5"]["inputs"]["clip"] == ["1", 1]


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"1": None},
        {"1": 3, "5": node("DejaVuMonitor")},
        {"5": {"class_type": "DejaVuMonitor"}},
        {"5": {"class_type": "DejaVuMonitor", "inputs": []}},
    ],
)
def test_what_is_no_workflow_is_left_as_it_is(graph: ModuleType, broken: dict[str, Any]) -> None:
    before = repr(broken)
    graph.link_encoders(broken)
    assert repr(broken) == before
