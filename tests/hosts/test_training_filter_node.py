"""The training filter under ComfyUI's own Train LoRA node, on a real host.

The host draws samples and noise levels from random numbers that no seed fixes, so two trainings cannot be compared
number by number: here either everything is left out, and nothing may be learned, or nothing is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import graphs
import miniature
import pytest
from comfyui_server import ComfyServer, EventStream
from graphs import Graph, node
from PIL import Image
from safetensors.torch import load_file

STEPS = 3


def training(
    server: ComfyServer,
    name: str,
    images: int = 1,
    batch_size: int = 1,
    checkpoint: str = miniature.SD15,
    **settings: Any,
) -> Graph:
    """The LoRA is saved by the node of the host's version, from where its training puts it out."""
    saves = next(kind for kind in ("SaveLoRA", "SaveLoRANode") if server.object_info(kind))
    trains = server.object_info("TrainLoraNode")["TrainLoraNode"]
    newer = {key: spec[1]["default"] for key, spec in trains["input"]["required"].items() if "default" in spec[1]}
    graph = graphs.conditioned_model(checkpoint=checkpoint, batch=images)
    wanted = {
        "filter": "threshold",
        "filter_threshold": 2.0,
        "filter_quantile": 0.9,
        "filter_levels": 10,
        "filter_history": 1000,
        "filter_warm_up": 100,
        "filter_every": 1,
    }
    graph["filter"] = node(
        "DejaVuTrainingFilter", model=graphs.model_link(graph), empty=["negative", 0], **{**wanted, **settings}
    )
    own = {
        "batch_size": batch_size,
        "grad_accumulation_steps": 1,
        "steps": STEPS,
        "learning_rate": 0.01,
        "rank": 2,
        "optimizer": "Adam",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "existing_lora": "[None]",
    }
    links = {"model": ["filter", 0], "latents": ["latent", 0], "positive": ["positive", 0]}
    graph["train"] = node("TrainLoraNode", **{**newer, **links, **own})
    graph["save"] = node(saves, lora=["train", trains["output"].index("LORA_MODEL")], prefix=f"loras/{name}")
    return graph


def learned(server: ComfyServer, home: Path, graph: Graph) -> tuple[float, str]:
    """The largest of the weights that begin at zero, and what the node said."""
    prefix = graph["save"]["inputs"]["prefix"]
    with server.events(f"told-{Path(prefix).name}") as events:
        server.run(graph, client_id=events.client_id)
        told = _told(events)
    (file,) = (home / "output").glob(f"{prefix}*.safetensors")
    begun = ("lora_down.weight", ".diff", ".diff_b")  # this host begins with a random up and a down of zeros
    values = [value for key, value in load_file(file).items() if key.endswith(begun)]
    assert values
    return max(float(value.abs().max()) for value in values), told


def _told(events: EventStream) -> str:
    """The lines on the nodes: binary messages of the kind 3 with the node's name before them."""
    pieces = [data for data in events.of_type("binary") if data[:4] == b"\0\0\0\3"]
    return " ".join(piece[8 + int.from_bytes(piece[4:8], "big") :].decode() for piece in pieces)


def test_what_is_left_out_is_not_learned(comfy: ComfyServer, comfy_home: Path) -> None:
    change, told = learned(comfy, comfy_home, training(comfy, "everything", filter_threshold=0.001))
    assert change == 0
    assert f"left {STEPS} of {STEPS} samples out of the loss" in told


@pytest.mark.parametrize(
    ("name", "settings"),
    [("high", {"filter_threshold": 10_000.0}), ("warming", {"filter": "quantile"}), ("off", {"filter": "none"})],
)
def test_what_stays_is_learned(comfy: ComfyServer, comfy_home: Path, name: str, settings: dict[str, Any]) -> None:
    change, told = learned(comfy, comfy_home, training(comfy, name, **settings))
    assert change > 0
    assert ("left 0 of 3 samples" in told) == (name != "off")


def test_batches_are_measured_sample_by_sample(comfy: ComfyServer, comfy_home: Path) -> None:
    change, told = learned(
        comfy, comfy_home, training(comfy, "batch", images=3, batch_size=2, filter_threshold=10_000.0)
    )
    assert change > 0
    assert f"left 0 of {2 * STEPS} samples" in told


def test_a_finding_holds_for_the_images_next_showings(comfy: ComfyServer, comfy_home: Path) -> None:
    """The image is number 0, and zlib.crc32(b"0") is 4108050209, which 3 divides with 2 over: measured at its second
    showing, so it goes at its second and third."""
    change, told = learned(comfy, comfy_home, training(comfy, "held", filter_threshold=0.001, filter_every=3))
    assert change > 0
    assert f"left 2 of {STEPS} samples out of the loss" in told


def test_samplers_draw_as_ever(comfy: ComfyServer) -> None:
    graph = graphs.text_to_image(seed=6)
    plain = comfy.view(comfy.run(graph)["save"]["images"][0])
    held = training(comfy, "unused")["filter"]["inputs"] | {"filter_threshold": 0.001}
    graphs.splice(graph, "sampler", "model", "filter", node("DejaVuTrainingFilter", **held))
    seen = comfy.view(comfy.run(graph)["save"]["images"][0])
    first, second = (Image.open(io.BytesIO(data)).tobytes() for data in (plain, seen))
    assert first == second


@pytest.mark.parametrize(("limit", "left"), [(0.001, STEPS), (10_000.0, 0)])
def test_flow_models_are_measured(comfy: ComfyServer, comfy_home: Path, limit: float, left: int) -> None:
    graph = training(comfy, f"flow-{left}", checkpoint=miniature.SD3, filter_threshold=limit)
    change, told = learned(comfy, comfy_home, graph)
    assert (change > 0) == (left == 0)
    assert f"left {left} of {STEPS} samples out of the loss" in told
