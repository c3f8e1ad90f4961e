"""Today's model families in a real ComfyUI, in miniature: every number against what the network itself put out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import pytest
from comfyui_server import ComfyServer, make_home
from graphs import Graph, node

from sd_dejavu.calibration.first_step import SEED_BASE
from sd_dejavu.calibration.ordinary_prompts import ordinary_prompts

pytestmark = pytest.mark.everywhere  # each version of the host has its own way with a family

HERE = Path(__file__).parent
FLOW = ("SD3", "Flux", "Lumina2", "Z-Image", "Qwen-Image", "Wan 2.1")
FAMILIES = (*FLOW, "HunyuanDiT")
TIME_AXIS = ("Qwen-Image", "Wan 2.1")
PROMPT, NEGATIVE = "a red fox at dawn", "dull grey fog all over"  # of one length
NULLS = 20


@pytest.fixture(scope="module")
def host(comfyui: Path, comfy_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    pack = HERE.parents[1]
    home = make_home(tmp_path_factory.mktemp("families"), pack, [HERE / "family_nodes.py"], comfy_models)
    with ComfyServer(comfyui, home) as server:
        yield server


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, host: ComfyServer) -> str:
    name: str = request.param
    if name == "Z-Image" and not is_new(host):
        pytest.skip("this version of the host knows no Z-Image")
    return name


def is_new(host: ComfyServer) -> bool:
    return bool(host.object_info("DualModelGuider"))


def run_of(
    family: str,
    prompt: str = PROMPT,
    negative: str = "",
    *,
    cfg: float = 5.0,
    seed: int = 0,
    steps: int = 2,
    watched: bool = True,
    words: bool = True,
    **monitor: Any,
) -> Graph:
    """A run of 64 x 64 pixels with 'look' below the monitor and 'told' at its end."""
    loader = node("FamilyModel", family=family)
    if family == "SD3":
        loader = node("CheckpointLoaderSimple", ckpt_name=miniature.SD3)
    encode = "DejaVuTextEncode" if words else "CLIPTextEncode"
    settings = {"explain": "never", "when_flagged": "report", "without": "negative prompt", "alpha": 0.01, **monitor}
    graph = {
        "model": loader,
        "positive": node(encode, clip=["model", 1], text=prompt),
        "negative": node(encode, clip=["model", 1], text=negative),
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "look": node("OnLook", model=["model", 0]),
        "monitor": node("DejaVuMonitor", model=["look", 0], remedy="optimise", score="first step", **settings),
        "sampler": node(
            "KSampler",
            model=["monitor" if watched else "look", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "told": node("OnLooked", seen=["look", 1], samples=["sampler", 0]),
    }
    if watched:
        graph["verdict"] = node("DejaVuVerdict", monitor=["monitor", 1], samples=["sampler", 0])
    return graph


def raw_score(family: str, told: dict[str, Any]) -> float:
    """Of the network's own outputs: velocities, or for v-prediction the noise that they stand for."""
    (norm,), (sigma,) = told["norms"], told["sigma"]
    return float(norm if family in FLOW else norm / (1 + sigma**2) ** 0.5)


def document_of(outputs: dict[str, Any]) -> dict[str, Any]:
    (document,) = outputs["verdict"]["dejavu"]
    return document


def score_of(outputs: dict[str, Any]) -> float:
    (verdict,) = document_of(outputs)["verdicts"]
    assert verdict["score"], verdict["why"]
    return float(verdict["score"])


def before_sampling(graph: Graph) -> dict[str, Any]:
    """The inputs by which our own nodes know the sampler's run."""
    names = ("positive", "negative", "latent_image", "seed", "steps", "sampler_name", "scheduler", "denoise")
    return {"model": ["look", 0], **{name: graph["sampler"]["inputs"][name] for name in names}}


# ------------------------------------------------------------------------------------------ watch


def test_the_score_is_the_networks_own_difference(host: ComfyServer, family: str) -> None:
    outputs = host.run(run_of(family))
    assert score_of(outputs) == pytest.approx(raw_score(family, outputs["told"]), rel=1e-4)
    (verdict,) = document_of(outputs)["verdicts"]
    assert verdict["baseline"] == "empty prompt"
    assert (verdict["where"]["width"], verdict["where"]["height"]) == (8, 8)
    assert len(outputs["told"]["shape"]) == (5 if family in TIME_AXIS else 4)
    assert outputs["told"]["digest"] == host.run(run_of(family, watched=False))["told"]["digest"]


def test_an_evaluation_of_our_own_is_the_hosts_for_that_prompt(host: ComfyServer, family: str) -> None:
    # In the first run the host evaluates the empty prompt, in the others we do: beside a prompt of another length.
    (told,) = [host.run(run_of(family))["told"]]
    expected = raw_score(family, told)
    for options in ({"cfg": 1.0}, {"negative": f"{NEGATIVE} and two more", "without": "empty prompt"}):
        outputs = host.run(run_of(family, **options))
        assert score_of(outputs) == pytest.approx(expected, rel=1e-4)
        assert document_of(outputs)["verdicts"][0]["baseline"] == "empty prompt"
    assert raw_score(family, host.run(run_of(family, cfg=1.0))["told"]) == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------- calibrate


def calibration_of(host: ComfyServer, family: str) -> dict[str, Any]:
    """Against the negative prompt; measured once a server and family."""
    folder = host.home / "user" / "dejavu" / "calibration"
    place = folder / f"{family} of the tests.json"
    if not place.exists():
        before = set(folder.glob("*.json"))
        graph = run_of(family, negative=NEGATIVE)
        settings = before_sampling(graph)
        for name in ("positive", "negative", "seed"):
            del settings[name]
        more = {"clip": ["model", 1], "negative": NEGATIVE, "count": NULLS, "whole_runs": 0, "cfg": 5.0}
        graph = {name: graph[name] for name in ("model", "look", "latent")}
        graph["calibrate"] = node("DejaVuCalibrate", **settings, **more)
        graph["shown"] = node("PreviewAny", source=["calibrate", 1])
        host.run(graph, timeout=300)
        (made,) = set(folder.glob("*.json")) - before
        made.rename(place)
    document: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return document


def test_nulls_are_what_the_host_gives_for_their_prompts(host: ComfyServer, family: str) -> None:
    document = calibration_of(host, family)
    prompts = [prompt for prompt, _ in ordinary_prompts(NULLS)]
    lengths = [len(prompt.split()) for prompt in prompts]
    for number in {lengths.index(min(lengths)), lengths.index(max(lengths))}:
        outputs = host.run(run_of(family, prompts[number], NEGATIVE, seed=SEED_BASE, watched=False))
        (null,) = document["nulls"][number]["scores"]["first step"]
        assert null == pytest.approx(raw_score(family, outputs["told"]), rel=1e-4)


# ------------------------------------------------------------------------------ explain, mitigate


def test_gradients_are_those_of_finite_differences(host: ComfyServer, family: str) -> None:
    graph = run_of(family, watched=False)
    links = {name: graph["sampler"]["inputs"][name] for name in ("positive", "negative", "latent_image")}
    del graph["sampler"], graph["told"], graph["monitor"]
    sigma = 0.9 if family in FLOW else 5.0
    graph["slopes"] = node("Slopes", model=["look", 0], **links, sigma=sigma, step=5e-3)
    found = host.run(graph)["slopes"]["slopes"]
    third = len(found) // 3
    by_gradient, by_difference, recomputed = found[:third], found[third : 2 * third], found[2 * third :]
    assert by_gradient[0] != 0
    assert by_gradient == pytest.approx(by_difference, rel=2e-2, abs=1.5e-3)
    assert recomputed == pytest.approx(by_gradient, rel=1e-4, abs=1e-7)  # activations computed again: the same


def test_explain_begins_where_the_sampler_does(host: ComfyServer, family: str) -> None:
    graph = run_of(family)
    graph["explain"] = node("DejaVuExplain", **before_sampling(graph))
    outputs = host.run(graph)
    (document,) = outputs["explain"]["dejavu"]
    (verdict,) = document["verdicts"]
    assert verdict["score"] == pytest.approx(score_of(outputs), rel=1e-5)
    assert max(word["significance"] for word in verdict["words"]) == 1.0


def test_a_mitigated_prompt_is_sampled_as_measured_and_beside_the_negative(host: ComfyServer, family: str) -> None:
    plain = host.run(run_of(family, negative=NEGATIVE))
    score = score_of(plain)
    graph = run_of(family, negative=NEGATIVE)
    settings = {"target": 0.8 * score, "iterations": 25, "learning_rate": 0.0, "checkpointing": False}
    graph["mitigated"] = node("DejaVuMitigate", **before_sampling(graph), **settings)
    graph["sampler"]["inputs"]["positive"] = ["mitigated", 0]
    graph["report"] = node("PreviewAny", source=["mitigated", 1])
    outputs = host.run(graph)
    document = json.loads(outputs["report"]["text"][0])
    assert document["score_before"] == pytest.approx(score, rel=1e-4)
    assert document["score_after"] < 0.9 * score
    assert score_of(outputs) == pytest.approx(document["score_after"], rel=1e-4)
    assert raw_score(family, outputs["told"]) == pytest.approx(document["score_after"], rel=1e-4)
    assert_together(outputs, 2)


def test_the_monitor_mitigates(host: ComfyServer, family: str) -> None:
    # A calibration by which this prompt is flagged: ordinary ones score at most half as much, in their own proportions.
    document = calibration_of(host, family)
    score = score_of(host.run(run_of(family, negative=NEGATIVE)))
    highest = max(null["scores"]["first step"][0] for null in document["nulls"])
    for null in document["nulls"]:
        null["scores"]["first step"] = [0.5 * score * null["scores"]["first step"][0] / highest]
    document["nulls"] *= 10
    place = host.home / "user" / "dejavu" / "calibration" / "flags all.json"
    place.write_text(json.dumps(document), encoding="utf-8")
    graph = run_of(family, negative=NEGATIVE, when_flagged="mitigate", explain="flagged", alpha=0.02)
    graph["calibration"] = node("DejaVuLoadCalibration", name=place.name)
    graph["monitor"]["inputs"]["calibration"] = ["calibration", 0]
    outputs = host.run(graph)
    document = document_of(outputs)
    assert document["flagged"], document["verdicts"][0]["why"]
    found = document["mitigation"]
    assert found["score_after"] < 0.9 * found["score_before"]
    assert found["verdicts"][0]["score"] == pytest.approx(found["score_after"], rel=1e-4)
    assert document["verdicts"][0]["words"]
    assert_together(outputs, 1)


def assert_together(outputs: dict[str, Any], steps: int) -> None:
    """In the last ``steps`` steps the prompt and the negative one went through the network in one call."""
    calls = outputs["told"]["calls"]
    levels = sorted({level for level, *_ in calls})[:steps]
    for level in levels:
        assert [sorted(which) for known, *which in calls if known == level] == [[0, 1]]


# ----------------------------------------------------------------------- what is not a plain prompt


def zeroed(graph: Graph) -> Graph:
    graph["zeroed"] = node("ConditioningZeroOut", conditioning=["positive", 0])
    graph["sampler"]["inputs"]["negative"] = ["zeroed", 0]
    return graph


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_a_zeroed_negative_is_called_so(host: ComfyServer, family: str, cfg: float) -> None:
    # Without an encoder at hand there is nothing else to measure against.
    outputs = host.run(zeroed(run_of(family, cfg=cfg, words=False)))
    (verdict,) = document_of(outputs)["verdicts"]
    assert verdict["baseline"] == "zeroed prompt" and verdict["p_value"] is None
    assert score_of(outputs) == pytest.approx(raw_score(family, outputs["told"]), rel=1e-4)
    # With one it is the empty prompt, for which a calibration can be made.
    found = host.run(zeroed(run_of(family, cfg=cfg)))
    assert document_of(found)["verdicts"][0]["baseline"] == "empty prompt"
    assert score_of(found) == pytest.approx(raw_score(family, host.run(run_of(family))["told"]), rel=1e-4)


def test_a_video_is_not_measured(host: ComfyServer) -> None:
    graph = run_of("Wan 2.1", explain="always")
    graph["latent"] = node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1)
    outputs = host.run(graph)
    (verdict,) = document_of(outputs)["verdicts"]
    assert verdict["score"] is None and "a video (2 latents long)" in verdict["sentence"]
    assert outputs["told"]["shape"] == [1, 16, 2, 8, 8]


def test_nodes_before_sampling_begin_with_the_samplers_latent(host: ComfyServer) -> None:
    # Newer versions scale an empty latent by the ratio that came with it, older ones know of none.
    graph = run_of("Lumina2")
    graph["latent"] = node("RatioLatent", side=4, ratio=16)
    graph["explain"] = node("DejaVuExplain", **before_sampling(graph))
    outputs = host.run(graph)
    side = 8 if is_new(host) else 4
    assert outputs["told"]["shape"][-2:] == [side, side]
    (document,) = outputs["explain"]["dejavu"]
    assert document["verdicts"][0]["score"] == pytest.approx(score_of(outputs), rel=1e-5)


@pytest.mark.parametrize(("cfg", "has_negative"), [(5.0, True), (1.0, True), (1.0, False)])
def test_two_models_of_one_guider(host: ComfyServer, cfg: float, has_negative: bool) -> None:
    if not is_new(host):
        pytest.skip("this version of the host has no DualModelGuider")
    graph = run_of("Lumina2")
    plain = score_of(host.run(graph))
    inputs = graph["sampler"]["inputs"]
    negative = {"negative": ["negative", 0]} if has_negative else {}
    guider = {"model": ["monitor", 0], "model_negative": ["model", 0], "positive": ["positive", 0], "cfg": cfg}
    graph |= {
        "guider": node("DualModelGuider", **guider, **negative),
        "noise": node("RandomNoise", noise_seed=inputs["seed"]),
        "method": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["model", 0], scheduler="simple", steps=2, denoise=1.0),
    }
    links = {"noise": "noise", "guider": "guider", "sampler": "method", "sigmas": "sigmas", "latent_image": "latent"}
    graph["sampler"] = node("SamplerCustomAdvanced", **{socket: [name, 0] for socket, name in links.items()})
    outputs = host.run(graph)
    assert document_of(outputs)["verdicts"][0]["baseline"] == "empty prompt"
    assert score_of(outputs) == pytest.approx(plain, rel=1e-4)


def test_several_devices(host: ComfyServer) -> None:
    """A stand-in for a run on several devices, whose work is done without gradients: what we evaluate is not."""
    if not is_new(host):
        pytest.skip("this version of the host has one device a run")
    plain = host.run(run_of("Lumina2", cfg=1.0, explain="always"))
    graph = run_of("Lumina2", cfg=1.0, explain="always")
    graph["devices"] = node("SeveralDevices", model=["model", 0])
    graph["look"]["inputs"]["model"] = ["devices", 0]
    outputs = host.run(graph)
    assert score_of(outputs) == pytest.approx(score_of(plain), rel=1e-5)
    first, second = (document_of(found)["verdicts"][0]["words"] for found in (plain, outputs))
    assert [w["significance"] for w in second] == pytest.approx([w["significance"] for w in first], rel=1e-3)
