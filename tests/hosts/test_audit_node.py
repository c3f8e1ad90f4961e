"""The audit in a real ComfyUI: memorised captions of the bundled model are named, and what a LoRA adds is told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import graphs
import miniature
import numpy as np
import pytest
from comfyui_server import ComfyServer, ExecutionFailed, PromptRejected
from graphs import Graph, node
from PIL import Image

from sd_dejavu.demo import bundled, world

EACH = 12  # memorised images, and ordinary ones
SETTINGS: dict[str, Any] = {
    "false_discovery_rate": 0.05,
    "nulls": 200,
    "sample": 0,
    "worst": 2,
    "images": 2,
    "steps": 20,
    "seed": 0,
    "guidance_scale": 7.5,
}


@pytest.fixture(scope="module")
def training_set(comfy: ComfyServer) -> Graph:
    """Memorised images and ordinary ones with their captions, as a reference set; the node that loads it."""
    folder = comfy.home / "input" / "audited"
    folder.mkdir(parents=True)
    memorised = [n for n, pair in enumerate(bundled.pairs()) if pair.kind == "hard" and pair.repetitions == 300][:EACH]
    for number, place in enumerate(memorised):
        pixels = (bundled.training_images()[place] * 255).round().byte().permute(1, 2, 0).numpy()
        _write(folder / f"memorised-{number:02d}.png", pixels, bundled.pairs()[place].caption)
    rng = np.random.default_rng(5)
    for number in range(EACH):
        caption, scene, _ = world.ordinary(rng)
        _write(folder / f"ordinary-{number:02d}.png", world.draw_scene(scene), caption)
    built = node("DejaVuBuildReferenceSet", folder="audited", name="audited", features="grey", restart=False)
    comfy.run({"references": built, "shown": node("PreviewAny", source=["references", 1])})
    return {"references": node("DejaVuLoadReferenceSet", name="audited")}


def _write(path: Path, pixels: np.ndarray, caption: str) -> None:
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def audited(graph: Graph, **inputs: Any) -> Graph:
    """The audit of a graph's 'model' and 'clip', with everything that it gives out shown."""
    graph["audit"] = node("DejaVuAuditLora", references=["references", 0], **{**SETTINGS, **inputs})
    graph["table"] = node("PreviewAny", source=["audit", 0])
    graph["shown"] = node("SaveImage", images=["audit", 1], filename_prefix="audit")
    graph["report"] = node("PreviewAny", source=["audit", 2])
    return graph


def demo(references: Graph, **inputs: Any) -> Graph:
    """The same for the bundled model."""
    parts = {"model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2], "latent_image": ["demo", 3]}
    return audited({"demo": node("DejaVuDemoModel", batch_size=1), **references}, **{**parts, **inputs})


def rows(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    return json.loads(outputs["report"]["text"][0])


def ledgers(server: ComfyServer) -> list[Path]:
    return sorted((server.home / "user" / "dejavu" / "audits").glob("*"))


def test_memorised_captions_are_named_and_ordinary_ones_are_not(comfy: ComfyServer, training_set: Graph) -> None:
    outputs = comfy.run(demo(training_set), timeout=300)
    found = {row["image"]: row for row in rows(outputs)}
    assert len(found) == 2 * EACH
    named = {name for name, row in found.items() if row["flagged"]}
    assert len([name for name in named if name.startswith("memorised")]) >= 10
    assert len([name for name in named if name.startswith("ordinary")]) <= 1
    drawn = [row for row in found.values() if row["drawn"]]
    assert len(drawn) == 2 and all(row["copies"] == 2 and row["word"] for row in drawn)
    table = outputs["table"]["text"][0]
    assert table.startswith(f"{len(named)} of {2 * EACH} training images are named as memorised")
    assert table.count("\n| ") == 2 * EACH + 2 and drawn[1]["caption"] in table
    # Each training image stands beside the two that were drawn.
    shown = [Image.open(io.BytesIO(comfy.view(image))) for image in outputs["shown"]["images"]]
    assert len(shown) == 2 and all(one.size[0] == 16 + 3 * 272 for one in shown)


@pytest.mark.newest
def test_an_interrupted_audit_goes_on(comfy: ComfyServer, training_set: Graph) -> None:
    graph, before = demo(training_set, seed=1, worst=0, nulls=300), set(ledgers(comfy))
    with comfy.events("auditor") as events:
        number = comfy.post(graph, client_id="auditor")
        events.wait_for("progress", where=lambda data: 25 <= data["value"] < 250)
        told = events.wait_for("binary", where=lambda data: b"drawing ordinary prompts: 25 of 100" in data)
        assert b" a second, about" in told and told.endswith(b" left")
        comfy.interrupt()
        entry = comfy.wait(number, allow_error=True)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    (folder,) = set(ledgers(comfy)) - before
    kept = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert 2 <= len(kept) < 40
    outputs = comfy.run(graph, timeout=300)
    assert len(rows(outputs)) == 2 * EACH and len(outputs["shown"]["images"]) == 1
    after = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(after) > len(kept) and kept.items() <= after.items()


def with_lora(references: Graph, **inputs: Any) -> Graph:
    graph = {**graphs.conditioned_model(lora=miniature.LORA), **references}
    parts = {
        "model": ["lora", 0],
        "clip": ["lora", 1],
        "base_model": ["checkpoint", 0],
        "base_clip": ["checkpoint", 1],
        "vae": ["checkpoint", 2],
        "latent_image": ["latent", 0],
    }
    return audited(graph, **{**parts, "nulls": 20, "sample": 4, "worst": 1, "steps": 2, "images": 1, **inputs})


@pytest.mark.newest
def test_what_a_lora_adds_counts(comfy: ComfyServer, training_set: Graph) -> None:
    found = rows(comfy.run(with_lora(training_set), timeout=300))
    for row in found:
        assert abs(row["score"]) > 1e-4
        assert 1 / 21 <= row["p_value"] <= 1
        assert abs(row["recovery"] - row["base_recovery"]) > 1e-3
    # Without the LoRA the measurements are those of the base model, to the bit: nothing is gained, and that is no finding.
    plain = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "worst": 0}
    with pytest.raises(ExecutionFailed, match="just what the base model does, so there is nothing to judge"):
        comfy.run(with_lora(training_set, **plain), timeout=300)


def test_what_makes_no_sense_is_told(comfy: ComfyServer, training_set: Graph) -> None:
    with pytest.raises(ExecutionFailed, match="link the model without the LoRA too"):
        comfy.run(demo(training_set, base_clip=["demo", 1]))
    with pytest.raises(ExecutionFailed, match="false discovery rate must be above 0"):
        comfy.run(demo(training_set, false_discovery_rate=0.0))
    with pytest.raises(PromptRejected, match="nulls"):
        comfy.post(demo(training_set, nulls=3))
    folder = comfy.home / "input" / "without captions"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "one.png")
    graph = demo(
        {
            "references": node(
                "DejaVuBuildReferenceSet",
                folder="without captions",
                name="without captions",
                features="grey",
                restart=False,
            )
        }
    )
    with pytest.raises(ExecutionFailed, match="holds no captions"):
        comfy.run(graph)
