"""Every way the host has to sample, with the monitor on: a score, or a stated 'not measured'."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product

import graphs
import miniature
import pytest
from comfyui_server import ComfyServer
from graphs import Graph, node
from watched import report, scores, watched

LONG = ", ".join(["a red fox at dawn"] * 20)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.figures)])
def test_every_sampler_and_every_scheduler(comfy: ComfyServer, newest: bool, every: bool) -> None:
    """Every sampler, with the schedulers in turn, and every scheduler; all pairs of them among the figures."""
    known = comfy.object_info("KSampler")["KSampler"]["input"]["required"]
    samplers, schedulers = known["sampler_name"][0], known["scheduler"][0]
    assert len(samplers) >= 40 and len(schedulers) >= 9
    if every and not newest:
        pytest.skip("all pairs are tried on the newest host")
    pairs = product(samplers, schedulers) if every else zip(samplers, cycle(schedulers), strict=False)
    silent = []
    for sampler, scheduler in pairs:
        graph = graphs.text_to_image(sampler=sampler, scheduler=scheduler, steps=2)
        (verdict,) = report(comfy, watched(graph))["verdicts"]
        if not (verdict["score"] and (verdict["p_value"] or "calibrat" in verdict["why"])):
            silent.append((sampler, scheduler, verdict["why"]))
    assert silent == []


def image_to_image(graph: Graph) -> None:
    graph["first"] = node("KSampler", **{**graph["sampler"]["inputs"], "seed": 99})
    graph["sampler"]["inputs"] |= {"latent_image": ["first", 0], "denoise": 0.5}


def inpainting(graph: Graph) -> None:
    image_to_image(graph)
    graph["mask"] = node("SolidMask", value=1.0, width=64, height=64)
    graphs.splice(
        graph, "sampler", "latent_image", "masked", node("SetLatentNoiseMask", mask=["mask", 0]), via="samples"
    )


def combined(graph: Graph) -> None:
    graph["other"] = node("DejaVuTextEncode", clip=["checkpoint", 1], text="an old boat")
    graphs.splice(
        graph,
        "sampler",
        "positive",
        "combined",
        node("ConditioningCombine", conditioning_2=["other", 0]),
        via="conditioning_1",
    )


def area(graph: Graph) -> None:
    """An area of the image has a prompt of its own, beside the one for all of it."""
    combined(graph)
    settings = {"width": 1.0, "height": 0.5, "x": 0.0, "y": 0.0, "strength": 1.0}
    new = node("ConditioningSetAreaPercentage", **settings)
    graphs.splice(graph, "combined", "conditioning_2", "area", new, via="conditioning")


def early_range(graph: Graph) -> None:
    graphs.splice(
        graph,
        "sampler",
        "positive",
        "range",
        node("ConditioningSetTimestepRange", start=0.0, end=0.6),
        via="conditioning",
    )


def late_negative(graph: Graph) -> None:
    graphs.splice(
        graph,
        "sampler",
        "negative",
        "range",
        node("ConditioningSetTimestepRange", start=0.5, end=1.0),
        via="conditioning",
    )


WAYS: dict[str, tuple[dict[str, object], Callable[[Graph], None] | None]] = {
    "image to image": ({}, image_to_image),
    "inpainting": ({}, inpainting),
    "combined": ({}, combined),
    "area": ({}, area),
    "early range": ({}, early_range),
    "late negative": ({}, late_negative),
    "a LoRA": ({"lora": miniature.LORA}, None),
    "two lengths": ({"prompt": LONG}, None),
    "long negative": ({"negative": LONG}, None),
    "SD3": ({"checkpoint": miniature.SD3}, None),
    "fp16 file": ({"unet": miniature.UNET_FP16}, None),
    "fp8": ({"unet": miniature.UNET_FP8, "weight_dtype": "fp8_e4m3fn"}, None),
    "scaled fp8": ({"unet": miniature.UNET_SCALED_FP8}, None),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cfg", [1.0, 7.0])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_prepare_a_run(comfy: ComfyServer, newest: bool, way: str, cfg: float, batch: int) -> None:
    """On older hosts one image with guidance, and several without."""
    if not newest and (batch == 1) == (cfg == 1):
        pytest.skip("tried on the newest host")
    options, change = WAYS[way]
    graph = graphs.text_to_image(seed=int(cfg), steps=3, cfg=cfg, batch=batch, **options)  # type: ignore[arg-type]
    if change is not None:
        change(graph)
    document = report(comfy, watched(graph))
    assert len(scores(document)) == batch
    assert all(score > 0 for score in scores(document))
    assert comfy.log().count("[Déjà Vu] no verdict") == 0


def test_a_negative_out_of_its_range_is_no_score(comfy: ComfyServer) -> None:
    # Without an encoder there is nothing else to measure against, and the host's zeros are not a prediction.
    graph = graphs.text_to_image(negative="blurry", seed=2)
    late_negative(graph)
    (verdict,) = report(comfy, watched(graph, words=False))["verdicts"]
    assert verdict["score"] is None and verdict["score_per_step"] == []
    assert "Text Encode" in verdict["why"]


def test_a_prompt_for_a_part_of_the_image_is_no_score(comfy: ComfyServer) -> None:
    graph = graphs.text_to_image(seed=8)
    settings = {"width": 1.0, "height": 0.5, "x": 0.0, "y": 0.0, "strength": 1.0}
    new = node("ConditioningSetAreaPercentage", **settings)
    graphs.splice(graph, "sampler", "positive", "area", new, via="conditioning")
    (verdict,) = report(comfy, watched(graph))["verdicts"]
    assert verdict["score"] is None and "whole image" in verdict["why"]


GUIDERS = {
    "CFGGuider": {"cfg": 7.0, "negative": ["negative", 0]},
    "BasicGuider": {},
    "DualCFGGuider": {
        "cond2": ["other", 0],
        "negative": ["negative", 0],
        "cfg_conds": 7.0,
        "cfg_cond2_negative": 5.0,
        "style": "regular",
    },
    "PerpNegGuider": {"negative": ["other", 0], "empty_conditioning": ["negative", 0], "cfg": 7.0, "neg_scale": 1.0},
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_every_guider(comfy: ComfyServer, guider: str) -> None:
    graph = graphs.custom_sampling(seed=4)
    known = comfy.object_info(guider)[guider]["input"]["required"]
    inputs = {"model": ["checkpoint", 0], **GUIDERS[guider]}
    prompt = next(name for name in ("positive", "conditioning", "cond1") if name in known)
    graph["guider"] = node(guider, **{k: v for k, v in inputs.items() if k in known}, **{prompt: ["positive", 0]})
    graph["other"] = node("DejaVuTextEncode", clip=["checkpoint", 1], text="an old boat")
    document = report(comfy, watched(graph))
    (plain,) = scores(report(comfy, watched(graphs.text_to_image(seed=4))))
    # Whatever the guider does with them, the prompt is measured against the empty one at the same noise.
    assert scores(document) == pytest.approx([plain], rel=1e-3)
    assert document["verdicts"][0]["baseline"] == "empty prompt"


def test_the_advanced_and_the_custom_sampler_node(comfy: ComfyServer) -> None:
    graph = graphs.text_to_image(seed=6)
    inputs = graph["sampler"]["inputs"]
    advanced = {"add_noise": "enable", "noise_seed": inputs.pop("seed"), "start_at_step": 0, "end_at_step": 10_000}
    inputs.pop("denoise")
    graph["sampler"] = node("KSamplerAdvanced", **inputs, **advanced, return_with_leftover_noise="disable")
    (first,) = scores(report(comfy, watched(graph)))
    graph = graphs.text_to_image(seed=6)
    inputs = graph["sampler"]["inputs"]
    graph["method"] = node("KSamplerSelect", sampler_name="euler")
    graph["sigmas"] = node("BasicScheduler", model=inputs["model"], scheduler="normal", steps=4, denoise=1.0)
    kept = {name: inputs[name] for name in ("model", "positive", "negative", "latent_image", "cfg")}
    custom = {"add_noise": True, "noise_seed": 6, "sampler": ["method", 0], "sigmas": ["sigmas", 0]}
    graph["sampler"] = node("SamplerCustom", **kept, **custom)
    (second,) = scores(report(comfy, watched(graph)))
    (plain,) = scores(report(comfy, watched(graphs.text_to_image(seed=6))))
    assert [first, second] == pytest.approx([plain, plain], rel=1e-6)
