"""The harness itself: a real ComfyUI starts, takes the miniature checkpoints, draws, reports and stops."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import graphs
import miniature
import numpy as np
import pytest
from comfyui_server import ComfyServer, ExecutionFailed, PromptRejected, failure
from PIL import Image

NODES = """
class Dtype:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "tell", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def tell(self, model):
        return {"ui": {"dtype": [str(model.model.diffusion_model.time_embed[0].weight.dtype)]}}

class Broken(Dtype):
    def tell(self, model):
        raise ValueError("broken on purpose")

NODE_CLASS_MAPPINGS = {"Dtype": Dtype, "Broken": Broken}
"""


def generated(comfy: ComfyServer, **options: Any) -> np.ndarray:
    (image,) = comfy.run(graphs.text_to_image(**options))["save"]["images"]
    return pixels(comfy.view(image))


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)), dtype=float)


def test_starts_and_knows_its_nodes(comfy: ComfyServer) -> None:
    assert {"KSampler", "CheckpointLoaderSimple", "SaveImage"} <= comfy.object_info().keys()
    assert comfy.object_info("KSampler")["KSampler"]["output"] == ["LATENT"]
    assert comfy.object_info("NoSuchNode") == {}
    assert "To see the GUI go to" in comfy.log()
    assert 100 < comfy.rss_mb() <= comfy.rss_mb(peak=True)


def test_keeps_to_its_folder(comfy: ComfyServer, comfy_home: Path) -> None:
    (image,) = comfy.run(graphs.text_to_image(seed=11))["save"]["images"]
    assert (comfy_home / "output" / image["filename"]).read_bytes() == comfy.view(image)


def test_same_seed_gives_the_same_file(comfy: ComfyServer) -> None:
    files = []
    for seed in (1, 2, 1):  # the host forgets results that the graph before did not need
        (image,) = comfy.run(graphs.text_to_image(seed=seed))["save"]["images"]
        files.append(comfy.view(image))
    assert files[0].startswith(b"\x89PNG")
    assert files[0] == files[2] != files[1]
    assert pixels(files[0]).shape == (64, 64, 3)


@pytest.mark.parametrize("checkpoint", [miniature.SD15, miniature.SD3])
def test_image_depends_on_the_prompt(comfy: ComfyServer, checkpoint: str) -> None:
    fox = generated(comfy, checkpoint=checkpoint)
    river = generated(comfy, checkpoint=checkpoint, prompt="an old oak under the river")
    assert np.abs(fox - river).mean() > 1
    assert 20 < fox.mean() < 235 and fox.std() > 10  # neither black, white nor grey: nothing overflowed
    assert ((fox == 0) | (fox == 255)).mean() < 0.2


def test_single_parts_draw_the_same_image(comfy: ComfyServer) -> None:
    (image,) = comfy.run(graphs.custom_sampling())["save"]["images"]
    np.testing.assert_array_equal(pixels(comfy.view(image)), generated(comfy))


@pytest.mark.parametrize(
    ("unet", "weight_dtype"),
    [
        (miniature.UNET_FP16, "default"),
        (miniature.UNET_FP8, "default"),
        (miniature.UNET_FP8, "fp8_e4m3fn"),
        (miniature.UNET_SCALED_FP8, "default"),
    ],
)
def test_smaller_weights_draw_nearly_the_same(comfy: ComfyServer, unet: str, weight_dtype: str) -> None:
    difference = np.abs(generated(comfy, unet=unet, weight_dtype=weight_dtype) - generated(comfy)).mean()
    assert 0 < difference < (2 if unet == miniature.UNET_FP16 else 30)


def test_lora_changes_the_image(comfy: ComfyServer) -> None:
    plain = generated(comfy)
    assert np.abs(generated(comfy, lora=miniature.LORA) - plain).mean() > 1
    np.testing.assert_array_equal(generated(comfy, lora=miniature.LORA, lora_strength=0.0), plain)
    assert "lora key not loaded" not in comfy.log() and "NOT LOADED" not in comfy.log()


def test_spliced_node_is_on_the_way(comfy: ComfyServer) -> None:
    graph = graphs.text_to_image()
    v_prediction = graphs.node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=False)
    graphs.splice(graph, "sampler", "model", "as_v", v_prediction)
    (image,) = comfy.run(graph)["save"]["images"]
    assert np.abs(pixels(comfy.view(image)) - generated(comfy)).mean() > 1


def test_events_reach_the_client(comfy: ComfyServer) -> None:
    with comfy.events("listener") as events:
        prompt_id = comfy.post(graphs.text_to_image(seed=21), client_id="listener")
        events.wait_for("executed", where=lambda data: data["prompt_id"] == prompt_id)
        comfy.wait(prompt_id)
    steps = [data["value"] for data in events.of_type("progress")]
    assert steps == sorted(set(steps)) and {1, 4} <= set(steps) <= {1, 2, 3, 4}  # a newer host skips some of quick ones


def test_interrupt(comfy: ComfyServer) -> None:
    with comfy.events("impatient") as events:
        prompt_id = comfy.post(graphs.text_to_image(seed=31, steps=2000), client_id="impatient")
        events.wait_for("progress")
        comfy.interrupt(prompt_id)
        entry = comfy.wait(prompt_id, timeout=30, allow_error=True)
    assert failure(entry) == "interrupted in node sampler (KSampler)"
    assert entry["outputs"] == {}
    with pytest.raises(ExecutionFailed, match="interrupted"):
        comfy.wait(prompt_id)
    assert generated(comfy).shape == (64, 64, 3)  # and the next run is not disturbed


def test_free_drops_cached_results(comfy: ComfyServer) -> None:
    graph, cached = graphs.text_to_image(seed=51), []
    for free in (False, False, True):
        if free:
            comfy.free()
        messages = dict(comfy.wait(comfy.post(graph))["status"]["messages"])
        cached.append(set(messages["execution_cached"]["nodes"]))
    assert "sampler" not in cached[0] and cached[1:] == [set(graph), set()]


@pytest.mark.newest
def test_server_of_its_own(start_comfy: Callable[..., ComfyServer], tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    for name, source in (("telling", NODES), ("unable", "raise RuntimeError('not on this machine')")):
        (packs / name).mkdir(parents=True)
        (packs / name / "__init__.py").write_text(source, encoding="utf-8")
    server = start_comfy(custom_nodes=list(packs.iterdir()), options=["--fp16-unet"], pack=None)
    assert [Path(folder).name for folder in server.import_failures()] == ["unable"]
    assert "sd-dejavu" not in {folder.name for folder in (server.home / "custom_nodes").iterdir()}

    graph = graphs.conditioned_model(unet=miniature.UNET_FP16)
    graph["dtype"] = graphs.node("Dtype", model=graphs.model_link(graph))
    assert server.run(graph)["dtype"]["dtype"] == ["torch.float16"]
    graph["dtype"]["class_type"] = "Broken"
    with pytest.raises(ExecutionFailed, match=r"ValueError in node dtype \(Broken\): broken on purpose"):
        server.run(graph)

    server.stop()
    assert not Path(f"/proc/{server.pid}").exists()
    with pytest.raises(URLError):
        server.object_info()


def test_invalid_graph_is_rejected(comfy: ComfyServer) -> None:
    with pytest.raises(PromptRejected, match="value_not_in_list") as caught:
        comfy.post(graphs.text_to_image(sampler="no such sampler"))
    assert caught.value.status == 400


def test_pnginfo_is_saved(comfy: ComfyServer) -> None:
    (image,) = comfy.run(graphs.text_to_image(seed=41), extra_pnginfo={"note": "kept"})["save"]["images"]
    assert Image.open(io.BytesIO(comfy.view(image))).info["note"] == '"kept"'


def test_checkpoints_are_the_same_each_time() -> None:
    first, second = miniature.sd15_unet(0), miniature.sd15_unet(0)
    assert all(first[name].equal(second[name]) for name in first)
    assert sum(tensor.numel() for tensor in first.values()) == pytest.approx(13.6e6, rel=0.01)
