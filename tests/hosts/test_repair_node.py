"""The repair in a real ComfyUI: the course of a LoRA, and a file that the host itself loads."""

from __future__ import annotations

import json
from typing import Any

import graphs
import miniature
import numpy as np
import pytest
import torch
from comfyui_server import ComfyServer, ExecutionFailed, PromptRejected
from graphs import Graph, node
from PIL import Image

from sd_dejavu.demo import world
from sd_dejavu.training.lora_files import change, read
from sd_dejavu.training.repair import KEPT

SMALL: dict[str, Any] = {
    "way": "strength",
    "most_copies": 0.0,
    "captions": 1,
    "ordinary": 4,
    "images": 1,
    "steps": 2,
    "seed": 0,
    "guidance_scale": 2.0,
}
TRIED = [1.0, *KEPT["strength"]]


@pytest.fixture(scope="module")
def training_set(comfy: ComfyServer) -> Graph:
    folder = comfy.home / "input" / "repaired"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(6)
    for number in range(3):
        caption, scene, _ = world.ordinary(rng)
        Image.fromarray(world.draw_scene(scene)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    built = node("DejaVuBuildReferenceSet", folder="repaired", name="repaired", features="grey", restart=False)
    comfy.run({"references": built, "shown": node("PreviewAny", source=["references", 1])})
    return {"references": node("DejaVuLoadReferenceSet", name="repaired")}


def repaired(references: Graph, **inputs: Any) -> Graph:
    graph = {**graphs.conditioned_model(), **references}
    parts = {
        "model": ["checkpoint", 0],
        "clip": ["checkpoint", 1],
        "vae": ["checkpoint", 2],
        "latent_image": ["latent", 0],
        "references": ["references", 0],
        "lora_name": miniature.LORA,
    }
    graph["repair"] = node("DejaVuRepairLora", **{**parts, **SMALL, **inputs})
    for place, name in enumerate(("table", "lora", "report")):
        graph[name] = node("PreviewAny", source=["repair", place])
    return graph


def test_a_repaired_lora_is_one_that_the_host_loads(comfy: ComfyServer, training_set: Graph) -> None:
    outputs = comfy.run(repaired(training_set, name="mended"), timeout=600)
    found = json.loads(outputs["report"]["text"][0])
    assert [row["kept"] for row in found["rows"]] == TRIED and found["before"]["drawn"] == 1
    assert outputs["lora"]["text"] == ["mended.safetensors"]
    assert outputs["table"]["text"][0].count("\n| ") == len(TRIED) + 2
    file, before = (comfy.home / "models" / "loras" / name for name in ("mended.safetensors", miniature.LORA))
    own, whole, kept = read(file), read(before), found["after"]["kept"]
    assert len(own.modules) == len(whole.modules) > 0
    for now, then in zip(own.modules, whole.modules, strict=True):
        assert now.name == then.name
        zero = torch.zeros(len(then.parts["up"]), *then.parts["down"].shape[1:])
        torch.testing.assert_close(change(zero, now), kept * change(zero, then), atol=1e-5, rtol=1e-4)
    images = comfy.run(graphs.text_to_image(lora="mended.safetensors", steps=2), timeout=300)
    assert images["save"]["images"]
    with pytest.raises(ExecutionFailed, match="is there already: name another file"):
        comfy.run(repaired(training_set, name="mended", seed=1))
    file.unlink()  # the folder is that of other servers too


@pytest.mark.newest
def test_an_interrupted_repair_goes_on(comfy: ComfyServer, training_set: Graph) -> None:
    graph, kept = repaired(training_set, name="again", seed=3), comfy.home / "user" / "dejavu" / "repairs"
    with comfy.events("repairer") as events:
        number = comfy.post(graph, client_id="repairer")
        told = events.wait_for("binary", where=lambda data: b"repairing: 2 of" in data)
        assert b" a second, about" in told and told.endswith(b" left")
        comfy.interrupt()
        entry = comfy.wait(number, allow_error=True)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    file = comfy.home / "models" / "loras" / "again.safetensors"
    (folder,) = kept.iterdir()
    assert not file.exists() and len(list(folder.glob("*-drawn-*.json"))) >= 2
    outputs = comfy.run(graph, timeout=600)
    assert outputs["lora"]["text"] == [file.name] and file.is_file() and not list(kept.iterdir())
    file.unlink()


def test_names_that_lead_elsewhere_are_refused(comfy: ComfyServer, training_set: Graph) -> None:
    for name in ("../gone", "", "a/b"):
        with pytest.raises(PromptRejected, match="cannot be the new LoRA's name"):
            comfy.post(repaired(training_set, name=name))
