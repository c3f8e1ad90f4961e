"""Gradients while the host streams its weights, without a card: stand-ins in the host's own Python; see the probe."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import host_process
import pytest

HERE = Path(__file__).parent
LOOSE = {"bf16, LoRA": 0.05}  # the plain network is rounded to bf16 with its LoRA, the host adds that to bf16 weights


@pytest.fixture(scope="module")
def probed(comfyui: Path) -> dict[str, Any]:
    command = [str(host_process.python(comfyui)), str(HERE / "gradient_probe.py"), str(HERE.parents[1]), "--cpu"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=comfyui, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_gradients_are_right_though_each_layers_memory_is_taken_over(probed: dict[str, Any]) -> None:
    for name, case in probed["cases"].items():
        assert case["worst"] < LOOSE.get(name, 1e-5), name
        assert case["graph that keeps weights"] != "right", name  # so the stand-in does what it is for


def test_all_that_moves_weights_runs_as_in_sampling(probed: dict[str, Any]) -> None:
    for name, case in probed["cases"].items():
        assert case["casts"] > 12, name  # every layer on the way there and again on the way back
        assert not case["wrong_mode"] and not case["wrong_thread"], name  # inference mode, the sampling thread
        assert case["open"] == 0, name  # every weight was given back


def test_nothing_stays_changed(probed: dict[str, Any]) -> None:
    for name, case in probed["cases"].items():
        assert case["kept"] and case["patched"] == 0, name


def test_weights_of_another_pack_are_refused_with_a_sentence(probed: dict[str, Any]) -> None:
    told = probed["refusals"]
    assert "GGMLTensor weights: load a plain checkpoint" in told["foreign weights"]
    assert "load a plain checkpoint" in told["foreign layer"]
    assert told["foreign weights: without gradients"] and told["foreign layer: without gradients"]


def test_a_weight_counts_as_what_the_network_computes_with(probed: dict[str, Any]) -> None:
    found = probed["fingerprints"]
    assert found["cast on the way"] == found["held"] != found["file"]
