"""The benchmark for cards, in its small form: on the CPU, with miniatures, on the newest ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfyui_server
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.figures  # the other tests of this folder hold what it measures, one by one


@pytest.fixture(scope="module")
def result(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if comfyui != comfyui_server.find_install():
        pytest.skip("it takes the newest ComfyUI")
    out = tmp_path_factory.mktemp("card") / "small"
    script = ROOT / "benchmarks" / "on_a_card.py"
    command = [sys.executable, str(script), "--small", "--rounds", "1", "--out", str(out)]
    environment = {**os.environ, comfyui_server.VARIABLE: str(comfyui)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return found | {"page": out.with_suffix(".md").read_text(encoding="utf-8")}


def test_the_pack_leaves_images_and_gradients_right(result: dict[str, Any]) -> None:
    assert {row["mode"] for row in result["A"]} == {"default", "--disable-dynamic-vram"}
    for row in result["A"]:
        assert "fault" not in row and not row.get("notes"), row
        if "equal" in row:
            assert row["equal"] and row["finite"] and row["weights_kept"] and row["patched"] == 0, row
        if "ratio" in row:
            assert row["ratio"] == pytest.approx(1, abs=0.01), row
        if "explain always" in row["check"] or row["check"] == "Explain":
            assert row["words"] == 12, row  # of the benchmark's prompt


def test_every_command_ran_and_memory_is_left_open(result: dict[str, Any]) -> None:
    assert {row["model"] for row in result["C"]} == {"sd15", "sdxl"}
    for row in result["C"]:
        assert row["status"] == 0 and "peak_gb" not in row, row


def test_the_page_shows_what_was_found(result: dict[str, Any]) -> None:
    page = result["page"]
    assert "CPU (miniatures)" in page and "not measured" in page
    assert [row["page"] for row in result["B"]] == ["closed", "open"]
    for row in result["B"]:
        assert (
            row["equal"] and row["sampling"]["pairs"] == 3 and 0 < row["hooks"]["ms_a_step"] < row["hooks"]["ms_a_run"]
        )
        assert f"| {row['page']} | sampling alone | 3 | {row['sampling']['ratio']:.3f} (" in page
    for row in (*result["A"], *result["C"]):
        assert f"| {row.get('check') or row['command']} |" in page
