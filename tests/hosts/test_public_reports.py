"""What public reports say went wrong with packs that hook where ours does, tried on ours in a real ComfyUI."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import graphs
import miniature
import numpy as np
import pytest
from comfyui_server import ComfyServer, make_home
from graphs import Graph, node
from PIL import Image
from watched import demo, scores, watched

from sd_dejavu.core.settings import options_of
from sd_dejavu.demo import bundled
from sd_dejavu.mitigations import anti_memorization_guidance

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def host(comfyui: Path, comfy_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    home = make_home(tmp_path_factory.mktemp("reports"), HERE.parents[1], [HERE / "report_nodes.py"], comfy_models)
    with ComfyServer(comfyui, home) as server:
        yield server


@pytest.fixture(scope="module")
def memorised() -> str:
    return bundled.held_out_memorised(("hard",))[0]


def through(graph: Graph, *kinds: str, **inputs: Any) -> Graph:
    """The nodes of these kinds between the loaders and what takes the model; the first comes first."""
    consumer = "monitor" if "monitor" in graph else "sampler"
    for kind in kinds:
        graphs.splice(graph, consumer, "model", kind, node(kind, **inputs))
    return graph


def looked_at(graph: Graph) -> Graph:
    source = graph["monitor" if "monitor" in graph else "sampler"]["inputs"]["model"]
    graph["state"] = node("State", model=source, after=["sampler", 0])
    return graph


def pixels(host: ComfyServer, outputs: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(host.view(outputs["save"]["images"][0]))))


def document_of(outputs: dict[str, Any]) -> dict[str, Any]:
    (document,) = outputs["verdict"]["dejavu"]
    return document


def state_of(outputs: dict[str, Any]) -> dict[str, Any]:
    (state,) = outputs["state"]["state"]
    return state


# Comfy-Org/ComfyUI#16490: a schedule leaks into later runs


def test_a_prediction_type_is_that_of_its_own_run(host: ComfyServer) -> None:
    def run(velocity: bool) -> tuple[dict[str, Any], Any]:
        graph = watched(graphs.text_to_image(seed=1, steps=2))
        if velocity:
            through(graph, "ModelSamplingDiscrete", sampling="v_prediction", zsnr=False)
        outputs = host.run(graph)
        return document_of(outputs), pixels(host, outputs)

    before, drawn = run(False)
    velocity, other = run(True)
    after, again = run(False)
    assert before["setting"]["prediction_type"] == after["setting"]["prediction_type"] == "epsilon"
    assert velocity["setting"]["prediction_type"] == "v_prediction"
    assert scores(before) == scores(after) != scores(velocity)
    assert (drawn == again).all() and (drawn != other).any()


# #13989, #14276, #15255: a LoRA is patched twice, or does not go


@pytest.mark.newest
def test_nothing_of_a_lora_stays(host: ComfyServer) -> None:
    def run(**lora: Any) -> dict[str, Any]:
        graph = looked_at(watched(graphs.text_to_image(seed=2, steps=2, **lora), explain="always"))
        return host.run(graph)

    def told(outputs: dict[str, Any]) -> tuple[Any, ...]:
        document = document_of(outputs)
        words = [word["significance"] for word in document["verdicts"][0]["words"]]  # by gradients
        return document["setting"]["model"], scores(document), words

    before, with_it, after = run(), run(lora=miniature.LORA), run()
    assert told(before) == told(after)
    assert told(run(lora=miniature.LORA)) == told(with_it)
    assert not any(one == other for one, other in zip(told(before), told(with_it), strict=True))
    assert state_of(before)["weights"] == state_of(after)["weights"]
    assert (pixels(host, before) == pixels(host, after)).all()


# #15733: 'Cannot set version_counter for inference tensor'


@pytest.mark.newest
def test_fp8_weights_can_be_moved_after_an_explanation(host: ComfyServer) -> None:
    fp8 = {"unet": miniature.UNET_FP8, "weight_dtype": "fp8_e4m3fn"}
    plain = pixels(host, host.run(graphs.text_to_image(seed=3, steps=2, **fp8)))
    explained = host.run(watched(graphs.text_to_image(seed=3, steps=2, **fp8), explain="always"))
    assert document_of(explained)["verdicts"][0]["words"] and not document_of(explained)["notes"]
    host.run(graphs.text_to_image(seed=3, steps=2, checkpoint=miniature.SD3))
    host.free()  # and the first one's weights are moved away
    again = host.run(watched(graphs.text_to_image(seed=3, steps=2, **fp8), explain="always"))
    assert scores(document_of(again)) == scores(document_of(explained))
    for outputs in (explained, again, host.run(graphs.text_to_image(seed=3, steps=2, **fp8))):
        assert (pixels(host, outputs) == plain).all()


# EasyCache kept what a new conditioning gave, with its graph


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_a_cache_between_steps_keeps_nothing_of_ours(host: ComfyServer, memorised: str, cache: str) -> None:
    def run(*, cached: bool, monitored: bool = True) -> dict[str, Any]:
        graph = demo(memorised, steps=20, seed=4)
        if monitored:
            watched(graph, when_flagged="mitigate", alpha=0.02)
        through(graph, "CountedPasses")
        if cached:
            through(graph, cache, reuse_threshold=0.5, start_percent=0.0, end_percent=1.0, verbose=False)
        return host.run(looked_at(graph))

    plain, cached, without_us = run(cached=False), run(cached=True), run(cached=True, monitored=False)
    # What the mitigation works with is what the network gives, not what the cache kept of another evaluation.
    for name in ("score_before", "score_after"):
        expected = document_of(plain)["mitigation"][name]
        assert document_of(cached)["mitigation"][name] == pytest.approx(expected, rel=1e-4)
    assert state_of(cached)["graphs"] == 0
    # After the swap it skips steps as it does for any prompt: the first ones count twice, and prompts differ a little.
    assert state_of(cached)["passes"] <= state_of(without_us)["passes"] + 5


# city96/ComfyUI-GGUF#22: weights that are a pack's own tensors


def test_words_come_from_leaving_one_out_where_weights_are_a_packs_own(host: ComfyServer) -> None:
    graph = watched(graphs.text_to_image(seed=5, steps=2), explain="always")
    plain = document_of(host.run(graph))
    outputs = host.run(looked_at(through(graph, "Quantised")))
    document = document_of(outputs)
    assert scores(document) == pytest.approx(scores(plain), rel=1e-5)
    assert document["verdicts"][0]["words"]
    assert document["notes"] == [
        "no gradients could be taken (gradients cannot be taken through GGMLTensor weights: load a plain checkpoint), "
        "so the words come from leaving one out at a time"
    ]


# Skimmed_CFG#3: another pack changes the options while a run is open


def test_what_another_pack_adds_during_a_run_stays(host: ComfyServer) -> None:
    graph = watched(graphs.text_to_image(seed=6, steps=2))
    graphs.splice(graph, "sampler", "model", "ChangedOptions", node("ChangedOptions"))
    state = state_of(host.run(looked_at(graph)))
    assert state["called"] == 2 and state["left"] == [True]


# obisin/ComfyUI-DGLS#3: blocks that are on the card only while they run


def test_blocks_that_are_swapped_in_and_out_are_explained_alike(host: ComfyServer) -> None:
    def run(swapped: bool) -> dict[str, Any]:
        graph = watched(graphs.text_to_image(seed=7, steps=2), explain="always")
        if swapped:
            through(graph, "SwappedBlocks")
        return host.run(looked_at(graph))

    plain, swapped = run(False), run(True)
    assert document_of(swapped)["notes"] == document_of(plain)["notes"]
    assert state_of(swapped)["swaps"] > 0
    words = [document_of(outputs)["verdicts"][0]["words"] for outputs in (plain, swapped)]
    assert words[1] == words[0] != []
    assert state_of(swapped)["weights"] == state_of(plain)["weights"]
    assert (pixels(host, swapped) == pixels(host, plain)).all()


# After whatever we do, the host samples as before


def with_a_monitor(graph: Graph, **settings: Any) -> None:
    watched(graph, **settings)


def with_a_node_before(graph: Graph, kind: str, **settings: Any) -> None:
    sampler = graph["sampler"]["inputs"]
    for name in ("positive", "negative"):
        graph[name]["class_type"] = "DejaVuTextEncode"
    names = ("model", "positive", "negative", "latent_image", "seed", "steps", "sampler_name", "scheduler", "denoise")
    graph["before"] = node(kind, **{name: sampler[name] for name in names}, **settings)
    if kind == "DejaVuMitigate":
        graph["sampler"]["inputs"]["positive"] = ["before", 0]
    else:
        graph["shown"] = node("PreviewAny", source=["before", 1])


def with_references(graph: Graph) -> None:
    graph["references"] = node("DejaVuLoadReferenceSet", name="the bundled model's training pictures")
    settings = {known.name: known.default for known in options_of(anti_memorization_guidance.Settings)}
    links = {"vae": ["checkpoint", 2], "clip": ["checkpoint", 1], "references": ["references", 0]}
    graphs.splice(graph, "sampler", "model", "amg", node("DejaVuAMG", **links, **settings))


UPDATES = {"target": 0.01, "iterations": 3, "learning_rate": 0.0, "checkpointing": False}
ACTS: dict[str, Callable[[Graph], None]] = {
    "explained by the monitor": partial(with_a_monitor, explain="always"),
    "mitigated by the monitor": partial(with_a_monitor, when_flagged="mitigate", alpha=0.02),
    "explained before": partial(with_a_node_before, kind="DejaVuExplain"),
    "mitigated before": partial(with_a_node_before, kind="DejaVuMitigate", **UPDATES),
    "led away from references": with_references,
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_plain_sampling_is_as_before(host: ComfyServer, memorised: str, act: str, lora: bool) -> None:
    def run(number: int, act: Callable[[Graph], None] = lambda graph: None) -> dict[str, Any]:
        # The host keeps results: a denoise that means 1 too makes it draw again.
        graph = demo(memorised, steps=4, seed=8, cfg=7.5, denoise=1 - number * 1e-5)
        if lora:
            through(graph, "OwnLora")
        act(graph)
        return host.run(looked_at(graph))

    before, ours, after = run(1), run(2, ACTS[act]), run(3)
    assert (pixels(host, after) == pixels(host, before)).all()
    for outputs in (ours, after):
        assert state_of(outputs) == {**state_of(before), "graphs": 0}
    if act in ("mitigated before", "led away from references") or (act == "mitigated by the monitor" and not lora):
        assert (pixels(host, ours) != pixels(host, before)).any()
