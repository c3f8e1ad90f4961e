"""The nodes in a real ComfyUI, driven through its HTTP API."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import graphs
import host_process
import miniature
import numpy as np
import pytest
from comfyui_server import ComfyServer
from graphs import node
from node_schemas import declared
from PIL import Image
from watched import RAW, demo, report, scores, watched

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.calibration.store import path_for
from sd_dejavu.demo import bundled
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations import available
from sd_dejavu.mitigations.perturb_prompt import perturb
from sd_dejavu.run.measure import Measurement, measure
from sd_dejavu.run.monitoring import OPTIMISE

HERE = Path(__file__).parent
ORDINARY = "a red boat beside the moon"


def pixels(comfy: ComfyServer, outputs: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(comfy.view(outputs["save"]["images"][0]))).convert("RGB"))


@pytest.fixture(scope="module")
def raw(comfyui: Path, comfy_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the test's own nodes beside the pack."""
    from comfyui_server import make_home

    folder = tmp_path_factory.mktemp("raw")
    (folder / "raw.py").write_text(RAW)
    home = make_home(
        tmp_path_factory.mktemp("comfyui-raw"),
        comfy_home / "custom_nodes" / "sd-dejavu",
        [folder / "raw.py"],
        comfy_home / "models",
    )
    with ComfyServer(comfyui, home) as server:
        yield server


def test_every_node_is_there_and_every_input_has_a_tooltip(comfy: ComfyServer) -> None:
    """What the host knows of them is what the tests without a host read, in the same order."""
    known = comfy.object_info()
    assert known.keys() >= declared().keys()
    if "search_aliases" in known["KSampler"]:  # newer hosts find nodes by more than their names
        found = {name for name in declared() if "memorisation" in (known[name]["search_aliases"] or ())}
        assert {"DejaVuMonitor", "DejaVuVerdict", "DejaVuCalibrate", "DejaVuAuditLora"} <= found
    for name, ours in declared().items():
        sections = known[name]["input"]
        inputs = {**sections.get("required", {}), **sections.get("optional", {})}
        assert list(inputs) == [i.name for i in sorted(ours.inputs, key=lambda i: i.is_optional)], name
        for slot in ours.inputs:
            kind, shown = inputs[slot.name]
            assert shown["tooltip"] == slot.tooltip and slot.tooltip, (name, slot.name)
            assert slot.type == "COMBO" if isinstance(kind, list) else kind == slot.type, (name, slot.name)
            if slot.type in ("INT", "FLOAT"):
                bounds = {bound: slot.given[bound] for bound in ("min", "max", "default")}
                assert bounds.items() <= shown.items(), (name, slot.name)
        assert known[name]["output"] == [o.type for o in ours.outputs], name
        assert known[name]["category"] == "Déjà Vu"
        assert all(known[name]["output_tooltips"]), name


def test_the_pack_loads_without_a_word_of_its_own(comfy: ComfyServer) -> None:
    lines = comfy.log().splitlines()
    start = next(i for i, line in enumerate(lines) if "Import times for custom nodes" in line)
    assert not [line for line in lines[:start] if "custom_nodes/sd-dejavu" in line or "Déjà" in line]
    assert len([line for line in lines[start:] if "custom_nodes/sd-dejavu" in line and " seconds" in line]) == 1


@pytest.mark.newest
def test_the_pack_loads_at_once(comfyui: Path) -> None:
    """Nothing is imported but its own small modules: what takes long to import is only imported by who needs it."""
    command = [str(host_process.python(comfyui)), str(HERE / "import_probe.py"), str(HERE.parents[1])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=comfyui, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["own"] > 50 and found["others"] == []


def test_the_image_is_the_same_to_the_byte(comfy: ComfyServer) -> None:
    plain = comfy.run(graphs.text_to_image(seed=5))["save"]["images"][0]
    graph = watched(graphs.text_to_image(seed=5), explain="always")
    seen = comfy.run(graph)["save"]["images"][0]
    first, second = (Image.open(io.BytesIO(comfy.view(image))) for image in (plain, seen))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_scores_are_the_networks_own_difference(raw: ComfyServer, kind: str, batch: int) -> None:
    graph = watched(graphs.text_to_image(seed=7, batch=batch, negative="blurry"))
    model = graph["monitor"]["inputs"]["model"]
    if kind == "v":
        graph["v"] = node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
        model = ["v", 0]
    if kind == "flow":
        graph["flow"] = node("ModelSamplingSD3", model=model, shift=3.0)
        model = ["flow", 0]
    graph["raw"] = node("RawDifference", model=model)
    graph["monitor"]["inputs"]["model"] = ["raw", 0]
    graph["told"] = node("RawReport", raw=["raw", 1], samples=["sampler", 0])
    outputs = raw.run(graph)
    norms, (sigma,) = outputs["told"]["norms"], outputs["told"]["sigma"]
    # v = ... + eps / sqrt(1 + sigma^2), so the noise difference is the v-difference divided by that root.
    expected = [n / (1 + sigma**2) ** 0.5 if kind == "v" else n for n in norms]
    assert scores(outputs["verdict"]["dejavu"][0]) == pytest.approx(expected, rel=2e-4)


def test_without_guidance_only_an_evaluation_of_our_own_tells(comfy: ComfyServer) -> None:
    guided = scores(report(comfy, watched(graphs.text_to_image(seed=3, cfg=7.0))))
    for settings in ({"without": "negative prompt"}, {"without": "empty prompt"}):
        alone = report(comfy, watched(graphs.text_to_image(seed=3, cfg=1.0), **settings))
        assert scores(alone) == pytest.approx(guided, rel=1e-3)
        assert alone["verdicts"][0]["score_per_step"][1:] == [None] * 3


def test_where_the_negative_prompt_has_words_the_monitor_is_linked_to_the_prompts_encoder(comfy: ComfyServer) -> None:
    (found,) = report(comfy, watched(graphs.text_to_image(negative="blurry"), words=False, without="empty prompt"))[
        "verdicts"
    ]
    graph = watched(graphs.text_to_image(negative="blurry"), words=False, without="empty prompt")
    graph["monitor"]["inputs"]["clip"] = ["checkpoint", 1]
    (linked,) = report(comfy, graph)["verdicts"]
    assert found["baseline"] == linked["baseline"] == "empty prompt"
    assert found["score"] == linked["score"] > 0
    (asked,) = report(comfy, watched(graphs.text_to_image(negative="blurry"), words=False, without="negative prompt"))[
        "verdicts"
    ]
    assert asked["baseline"] == "negative prompt" and asked["score"] != found["score"]


# ------------------------------------------------------------------------------ the bundled model


@pytest.fixture(scope="module")
def memorised() -> str:
    return bundled.held_out_memorised(("hard",))[0]


def test_memorised_prompts_flag_and_ordinary_ones_do_not(comfy: ComfyServer) -> None:
    flags = [
        [report(comfy, watched(demo(prompt, steps=2)))["flagged"] for prompt in prompts]
        for prompts in (bundled.held_out_memorised()[:6], bundled.held_out_ordinary(6, seed=4242))
    ]
    assert flags == [[True] * 6, [False] * 6]


def test_scores_are_those_of_the_command_line(comfy: ComfyServer, memorised: str) -> None:
    document = report(comfy, watched(demo(memorised, batch=2, seed=3, steps=2)))
    # 1,000 steps begin at the highest noise level, as 'normal' does here.
    (measured,) = measure(load(), [memorised], Measurement(images=2, steps=1000, seed=3))
    assert measured.scores is not None
    assert scores(document) == pytest.approx(measured.scores.tolist(), rel=1e-3)


def test_a_plain_text_encode_gets_a_verdict_and_a_word_on_its_words(comfy: ComfyServer, memorised: str) -> None:
    # The workflow tells that its negative prompt is empty, so the calibration against the empty prompt applies,
    graph = watched(demo(memorised, steps=2, seed=50), words=False, explain="always")
    document = report(comfy, graph)
    (verdict,) = document["verdicts"]
    assert verdict["baseline"] == "empty prompt" and document["flagged"] is True
    # and the words, and the node where they stand.
    assert document["prompt"] == memorised and document["prompt_node"] == "positive"
    assert verdict["view"] == "output gradient" and [w["text"] for w in verdict["words"]] == memorised.split()
    assert any("Text Encode (Déjà Vu)" in note for note in document["notes"])
    # With the encoder at hand both are as good as with our own node.
    graph = watched(demo(memorised, steps=2, seed=50), words=False, explain="always")
    graph["monitor"]["inputs"]["clip"] = ["checkpoint", 1]
    document = report(comfy, graph)
    assert document["flagged"] is True and document["notes"] == []
    own = report(comfy, watched(demo(memorised, steps=2, seed=50), explain="always"))
    assert [w["raw"] for w in document["verdicts"][0]["words"]] == pytest.approx(
        [w["raw"] for w in own["verdicts"][0]["words"]], rel=1e-3
    )


@pytest.mark.parametrize("way", [graphs.text_to_image, graphs.custom_sampling])
def test_stock_nodes_get_a_verdict_after_a_calibration_that_nothing_is_wired_to(
    comfy: ComfyServer, way: Callable[..., graphs.Graph]
) -> None:
    """A user's own workflow with Monitor and Verdict alone: no CLIP linked, no text encode node of ours."""
    run = {"steps": 3, "scheduler": "karras"}
    settings = {"sampler_name": "euler", "scheduler": "karras", "steps": 3, "denoise": 1.0, "cfg": 7.0}
    graph = way(**run)
    calibrating = {name: graph[name] for name in ("checkpoint", "latent")}
    links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "latent_image": ["latent", 0]}
    calibrating["calibrate"] = node("DejaVuCalibrate", **links, **settings, negative="", count=20, whole_runs=0)
    (told,) = comfy.run(calibrating)["calibrate"]["text"]
    assert told.startswith("20 ordinary prompts")
    (verdict,) = report(comfy, watched(way(seed=72, **run), words=False, without="empty prompt"))["verdicts"]
    assert verdict["baseline"] == "empty prompt" and verdict["p_value"] is not None and verdict["nulls"] == 20
    # Of a conditioning that is more than one text nobody can say so: the Monitor is linked to the prompt's encoder.
    graph = watched(way(seed=72, **run), words=False, without="empty prompt")
    graph["doubled"] = node("ConditioningConcat", conditioning_to=["negative", 0], conditioning_from=["negative", 0])
    graph["guider" if "guider" in graph else "sampler"]["inputs"]["negative"] = ["doubled", 0]
    (verdict,) = report(comfy, graph)["verdicts"]
    assert verdict["baseline"] == "empty prompt" and verdict["nulls"] == 20
    # And so it is where the negative prompt has words.
    (verdict,) = report(
        comfy, watched(way("a red fox", "blurry", seed=72, **run), words=False, without="empty prompt")
    )["verdicts"]
    assert verdict["baseline"] == "empty prompt" and verdict["nulls"] == 20


@pytest.mark.parametrize("way", [graphs.text_to_image, graphs.custom_sampling])
def test_a_run_makes_the_calibration_it_lacks_and_later_ones_are_judged_by_it(
    comfy: ComfyServer, way: Callable[..., graphs.Graph]
) -> None:
    """What the page's button asks for, in a workflow of the host's own nodes, with nothing linked to the monitor."""
    folder = comfy.home / "user" / "dejavu" / "calibration"
    run = {"steps": 7, "scheduler": "ddim_uniform"}  # a first noise level that no other test calibrates
    before = set(folder.glob("*.json"))
    unjudged = report(comfy, watched(way(seed=73, **run), words=False, without="empty prompt"))
    assert unjudged["lacks_calibration"] is True and unjudged["calibrating"] is None
    assert "nothing to compare it with" in unjudged["verdicts"][0]["sentence"]
    asking = watched(way(seed=73, **run), words=False, without="empty prompt", alpha=0.05, calibrate_first=20)
    own = report(comfy, asking)
    made = set(folder.glob("*.json")) - before
    try:
        assert len(made) == 1 and own["lacks_calibration"] is False and own["flagged"] in (True, False)
        later = report(comfy, watched(way(seed=73, **run), words=False, without="empty prompt", alpha=0.05))
        (first,), (second,), (third,) = (document["verdicts"] for document in (unjudged, own, later))
        assert first["score"] == pytest.approx(second["score"]) == pytest.approx(third["score"])
        assert second["p_value"] == third["p_value"] is not None and third["nulls"] == 20
    finally:
        for path in made:
            path.unlink()


def test_what_the_host_kept_of_another_workflow_does_not_misplace_the_prompt(
    comfy: ComfyServer, memorised: str
) -> None:
    graph = watched(demo(memorised, steps=2, seed=52))
    assert report(comfy, graph)["prompt_node"] == "positive"
    graph["moved"] = graph.pop("positive")
    graph["sampler"]["inputs"]["positive"] = ["moved", 0]
    assert report(comfy, graph)["prompt_node"] == "moved"


def test_a_prompt_that_nobody_can_read_shows_its_tokens_by_number(comfy: ComfyServer, memorised: str) -> None:
    graph = watched(demo(memorised, steps=2, seed=51), words=False, explain="always")
    graph["other"] = node("CLIPTextEncode", clip=["checkpoint", 1], text="a red boat")
    average = node("ConditioningAverage", conditioning_from=["other", 0], conditioning_to_strength=0.9)
    graphs.splice(graph, "sampler", "positive", "average", average, via="conditioning_to")
    document = report(comfy, graph)
    words = document["verdicts"][0]["words"]
    assert document["prompt"] == "" and document["prompt_node"] is None
    assert [w["text"] for w in words] == [f"token {number}" for number in range(77)]
    assert any("numbered" in note for note in document["notes"])


def test_the_page_hears_of_a_run_while_it_goes_on(comfy: ComfyServer, memorised: str) -> None:
    with comfy.events("onlooker") as events:
        graph = watched(demo(memorised, steps=60, seed=52), explain="flagged")
        outputs = comfy.run(graph, client_id="onlooker")
        told = events.of_type("dejavu.run")
    assert {t["monitor"] for t in told} == {"monitor"} and len({t["run"] for t in told}) == 1
    # The verdict is there at the first step, before the words are; the last message is the whole report.
    first, last = told[0], told[-1]
    assert first["report"]["flagged"] is True and len(first["report"]["verdicts"][0]["score_per_step"]) == 1
    assert not first["finished"] and not first["report"]["verdicts"][0]["words"]
    assert last["finished"] and len(last["report"]["verdicts"][0]["score_per_step"]) == 60
    final = outputs["verdict"]["dejavu"][0]
    assert last["report"]["verdicts"] == final["verdicts"]
    assert len(told) < 60  # throttled
    assert last["report"]["ordinary"]["median"] < last["report"]["ordinary"]["high"] < scores(final)[0]
    where = final["verdicts"][0]["where"]
    assert (where["width"], where["height"]) == (16, 16) and len(base64.b64decode(where["values"])) == 256


def test_every_word_tells_the_score_without_it(comfy: ComfyServer, memorised: str) -> None:
    document = report(comfy, watched(demo(memorised, steps=1, seed=53), explain="always"))
    words = document["verdicts"][0]["words"]
    top = max(words, key=lambda w: w["raw"])
    assert top["score_without"] == min(w["score_without"] for w in words) < 0.7 * scores(document)[0]


def test_the_trigger_is_named_in_the_run(comfy: ComfyServer) -> None:
    (pair,) = [p for p in bundled.pairs() if p.caption == bundled.held_out_memorised(("hard",))[0]]
    (verdict,) = report(comfy, watched(demo(pair.caption, steps=2), explain="flagged"))["verdicts"]
    top = max(verdict["words"], key=lambda word: word["raw"])
    assert pair.trigger is not None and pair.trigger.lower() in top["text"].lower()
    assert verdict["view"] == "confirmed gradient"


@pytest.mark.parametrize("remedy", ["remove-trigger", "guidance-transition"])
@pytest.mark.parametrize("score", ["all steps", "first 5 steps"])
def test_a_monitor_within_one_that_mitigates_gives_no_mixed_score(
    comfy: ComfyServer, memorised: str, remedy: str, score: str
) -> None:
    graph = demo(memorised, steps=6)
    (alone,) = report(comfy, watched(graph))["verdicts"]
    inner = watched(demo(memorised, steps=6), score=score, explain="always")
    outer = {**inner["monitor"]["inputs"], "when_flagged": "mitigate", "remedy": remedy, "score": "first step"}
    graphs.splice(inner, "monitor", "model", "outer", node("DejaVuMonitor", **outer))
    document = report(comfy, inner)
    (verdict,) = document["verdicts"]
    assert verdict["score"] == pytest.approx(alone["score"], rel=1e-5) and verdict["score_kind"] == "first step"
    assert verdict["score_per_step"][0] == pytest.approx(alone["score_per_step"][0], rel=1e-5)
    assert len(verdict["score_per_step"]) == 1
    assert [word["text"] for word in verdict["words"]] == memorised.split()
    assert document["mitigation"] is None and "another monitor mitigates this run" in document["notes"][0]


@pytest.mark.parametrize("remedy", ["optimise", "remove-trigger"])
def test_a_flagged_run_goes_on_with_another_conditioning(comfy: ComfyServer, memorised: str, remedy: str) -> None:
    document = report(comfy, watched(demo(memorised, steps=2), when_flagged="mitigate", remedy=remedy))
    mitigation = document["mitigation"]
    assert document["flagged"] is True
    assert mitigation["score_after"] < 0.5 * mitigation["score_before"]
    assert mitigation["verdicts"][0]["score"] == pytest.approx(mitigation["score_after"], rel=1e-3)
    assert mitigation["verdicts"][0]["flagged"] is False
    # The model is as it was: the same prompt flags with the same score again.
    assert scores(report(comfy, watched(demo(memorised, steps=3)))) == pytest.approx(scores(document), rel=1e-6)


@pytest.mark.parametrize(
    ("remedy", "sampler"),
    [
        *product(
            ["guidance-transition", "batch-wise-noise", "start-token", "attenuate-tokens"],
            ["euler", "dpmpp_2m", "heun"],
        ),
        ("per-sample-noise", "euler"),  # takes its time
    ],
)
def test_a_flagged_run_goes_on_from_other_noise_or_with_another_rule(
    comfy: ComfyServer, newest: bool, memorised: str, remedy: str, sampler: str
) -> None:
    """On older hosts each rule with one sampler."""
    if not newest and (sampler != "euler" or remedy == "per-sample-noise"):
        pytest.skip("tried on the newest host")
    run = {"steps": 8, "seed": 60, "sampler": sampler}
    plain, mitigated = (
        comfy.run(watched(demo(memorised, **run), when_flagged=act, remedy=remedy)) for act in ("report", "mitigate")
    )
    (document,) = mitigated["verdict"]["dejavu"]
    (before,) = plain["verdict"]["dejavu"][0]["verdicts"]
    assert document["flagged"] is True and document["notes"] == []
    assert document["verdicts"][0]["score"] == pytest.approx(before["score"], rel=1e-5)
    mitigation = document["mitigation"]
    # What was read of the run that was drawn is what the method has said.
    assert mitigation["verdicts"][0]["score"] == pytest.approx(mitigation["score_after"], rel=1e-2)
    assert len(mitigation["verdicts"][0]["score_per_step"]) == len(before["score_per_step"])
    drawn = [pixels(comfy, outputs) for outputs in (plain, mitigated)]
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 3
    # Nothing stays with the model.
    again = comfy.run(watched(demo(memorised, **run), when_flagged="report", explain="always"))
    assert (pixels(comfy, again) == drawn[0]).all()


@contextmanager
def flagging_the_highest(comfy: ComfyServer, document: dict[str, Any]) -> Iterator[int]:
    """While open, of a report's three images the highest alone is flagged; its place among them."""
    _, second, highest = sorted(scores(document))
    known = {**document["setting"], "baseline": document["verdicts"][0]["baseline"]}
    setting = Setting(**{**known, "latent_shape": tuple(known["latent_shape"])})
    path = path_for(setting, comfy.home / "user" / "dejavu" / "calibration")
    # 1,199 made-up ordinary prompts, more than come with the model, score between the two: the highest has p = 3 / 1,200.
    nulls = tuple(Null("plain", {"first step": ((second + highest) / 2,)}) for _ in range(1199))
    path.parent.mkdir(parents=True, exist_ok=True)
    Profile(setting, nulls).save(path)
    try:
        yield scores(document).index(highest)
    finally:
        path.unlink()


@pytest.mark.parametrize("remedy", ["batch-wise-noise", "guidance-transition"])
def test_of_a_batch_the_flagged_image_alone_is_mitigated(comfy: ComfyServer, memorised: str, remedy: str) -> None:
    def drawn(**monitor: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        outputs = comfy.run(watched(demo(memorised, batch=3, steps=8, seed=61), remedy=remedy, **monitor))
        images = [np.asarray(Image.open(io.BytesIO(comfy.view(i)))) for i in outputs["save"]["images"]]
        return outputs["verdict"]["dejavu"][0], images

    document, plain = drawn(alpha=0.02)
    with flagging_the_highest(comfy, document) as place:
        document, mitigated = drawn(when_flagged="mitigate", alpha=0.01)
    assert [v["flagged"] for v in document["verdicts"]] == [n == place for n in range(3)]
    assert document["mitigation"] is not None, document["notes"]
    for number, (before, after) in enumerate(zip(plain, mitigated, strict=True)):
        assert np.array_equal(before, after) == (number != place)


def test_a_flagged_run_can_be_ended_with_a_reason(comfy: ComfyServer, memorised: str) -> None:
    entry = comfy.wait(comfy.post(watched(demo(memorised, steps=2, seed=9), when_flagged="stop")), allow_error=True)
    text = json.dumps(entry["status"], ensure_ascii=False)
    assert "Likely a replay" in text and "ended this run" in text
    assert report(comfy, watched(demo("a red boat", steps=2, seed=9), when_flagged="stop"))["flagged"] is False


def test_the_verdict_is_written_into_the_png(comfy: ComfyServer, memorised: str) -> None:
    graph = watched(demo(memorised, steps=2, seed=10))
    graph["7:3"] = graph.pop("verdict")
    graph["decode"]["inputs"]["samples"] = ["7:3", 0]
    inner = {"id": "inner", "nodes": [{"id": 3, "type": "DejaVuVerdict"}]}
    workflow = {"nodes": [{"id": 7, "type": "inner"}], "definitions": {"subgraphs": [inner]}}
    outputs = comfy.run(graph, extra_pnginfo={"workflow": workflow})
    image = Image.open(io.BytesIO(comfy.view(outputs["save"]["images"][0])))
    document = json.loads(image.info["dejavu"])["7:3"]
    assert document["verdicts"][0]["flagged"] is True
    # The page shows it again from the node's own properties, in a subgraph too.
    (kept,) = json.loads(image.info["workflow"])["definitions"]["subgraphs"][0]["nodes"]
    assert kept["properties"]["dejavu"] == document


def test_what_a_run_adds_to_the_model_makes_another_setting(comfy: ComfyServer, memorised: str) -> None:
    plain = report(comfy, watched(demo(memorised, steps=2, seed=28)))
    assert plain["flagged"] is True and plain["setting"]["patches"] == ""

    skipping = watched(demo(memorised, steps=2, seed=28))
    skipping["skip"] = node("CLIPSetLastLayer", clip=["checkpoint", 1], stop_at_clip_layer=-2)
    for name in ("positive", "negative"):
        skipping[name]["inputs"]["clip"] = ["skip", 0]

    freed = watched(demo(memorised, steps=2, seed=28))
    freed["perturbed"] = node("FreeU", model=["checkpoint", 0], b1=1.1, b2=1.2, s1=0.9, s2=0.2)
    freed["monitor"]["inputs"]["model"] = ["perturbed", 0]

    for graph, patches in ((skipping, "clip skip 2"), (freed, "output_block_patch")):
        document = report(comfy, graph)
        (verdict,) = document["verdicts"]
        assert document["setting"]["patches"] == patches
        assert verdict["score"] > 0 and verdict["p_value"] is None
        assert "there is nothing to compare it with yet" in verdict["why"]


MALFORMED = [
    {"workflow": None},
    {"workflow": "x"},
    {"workflow": [1, 2]},
    {"workflow": {}},
    {"workflow": {"id": 5, "nodes": None}},
    {"workflow": {"nodes": {"verdict": {}}}},
    {"workflow": {"nodes": [None, 3, "x", [], {}]}},
    {"workflow": {"nodes": [{"id": "verdict"}]}},
    {"workflow": {"nodes": [{"id": "verdict", "properties": None}]}},
    {"workflow": {"nodes": [{"id": "verdict", "properties": [1]}]}},
    {"workflow": {"nodes": [{"id": "verdict", "type": ["a"]}], "definitions": None}},
    {"workflow": {"nodes": [], "definitions": {"subgraphs": None}}},
    {"workflow": {"nodes": [], "definitions": {"subgraphs": [1, None, {"id": {}}]}}},
    {"workflow": {"nodes": [], "definitions": "x"}},
    {"dejavu": "x"},
    {"dejavu": {"verdict": 1}},
    {"dejavu": {"verdict": {"verdicts": None}}},
    {"dejavu": {"verdict": {"format": "dejavu-report", "verdicts": [], "notes": 3}}},
]


def test_malformed_metadata_costs_nothing(comfy: ComfyServer) -> None:
    """Clients of the API write what they like into it, and the host saves it as it is."""
    plain = pixels(comfy, comfy.run(watched(demo(ORDINARY, steps=1, seed=27))))
    for extra in MALFORMED:
        outputs = comfy.run(watched(demo(ORDINARY, steps=1, seed=27)), extra_pnginfo=extra)
        (document,) = outputs["verdict"]["dejavu"]
        assert scores(document)[0] > 0, extra
        assert (pixels(comfy, outputs) == plain).all()


def test_caching_never_shows_another_runs_verdict(comfy: ComfyServer, memorised: str) -> None:
    graph = watched(demo(memorised, steps=2, seed=21))
    graph["sampler 2"] = node("KSampler", **{**graph["sampler"]["inputs"], "seed": 22})
    graph["verdict 2"] = node("DejaVuVerdict", monitor=["monitor", 1], samples=["sampler 2", 0])
    outputs = comfy.run(graph)
    first, second = (scores(outputs[name]["dejavu"][0]) for name in ("verdict", "verdict 2"))
    assert first != second
    again = comfy.run(watched(demo(memorised, steps=2, seed=22)))
    assert scores(again["verdict"]["dejavu"][0]) == pytest.approx(second)


def test_a_verdict_on_some_images_of_a_batch_is_on_these(comfy: ComfyServer, memorised: str) -> None:
    """Picked, repeated and in another order, between the sampler and the Verdict."""
    graph = watched(demo(memorised, batch=3, steps=2, seed=26))
    whole = report(comfy, graph)
    assert len(set(scores(whole))) == 3
    for place in (0, 2):
        graph[f"image {place}"] = node("LatentFromBatch", samples=["sampler", 0], batch_index=place, length=1)
    graph["twice"] = node("RepeatLatentBatch", samples=["image 2", 0], amount=2)
    graph["both"] = node("LatentBatch", samples1=["twice", 0], samples2=["image 0", 0])
    for source, places in (("image 2", [2]), ("both", [2, 2, 0])):
        graph["verdict"]["inputs"]["samples"] = [source, 0]
        document = report(comfy, graph)
        assert scores(document) == [scores(whole)[place] for place in places]
        assert [v["where"] for v in document["verdicts"]] == [whole["verdicts"][place]["where"] for place in places]
        assert document["notes"] == whole["notes"]


def test_the_overlay_of_a_batch_is_that_of_its_highest_image(comfy: ComfyServer, memorised: str) -> None:
    def overlay(source: str) -> np.ndarray:
        graph["verdict"]["inputs"]["samples"] = [source, 0]
        outputs = comfy.run(graph)
        return np.asarray(Image.open(io.BytesIO(comfy.view(outputs["overlays"]["images"][0]))))

    known = report(comfy, watched(demo(memorised, batch=3, steps=2, seed=31)))
    graph = watched(demo(memorised, batch=3, steps=2, seed=31), alpha=0.011)
    graph["overlays"] = node("SaveImage", images=["verdict", 4], filename_prefix="overlay")
    for number in range(3):
        graph[f"image {number}"] = node("LatentFromBatch", samples=["sampler", 0], batch_index=number, length=1)
    with flagging_the_highest(comfy, known) as place:
        whole, *each = (overlay(source) for source in ("sampler", "image 0", "image 1", "image 2"))
    assert [np.array_equal(whole, one) for one in each] == [number == place for number in range(3)]


def test_a_run_past_the_monitor_has_no_verdict(comfy: ComfyServer, memorised: str) -> None:
    """The host keeps the monitor between runs: what it saw in an earlier one is nothing that this one drew."""
    watched_run = comfy.run(watched(demo(ORDINARY, steps=2, seed=23)))
    assert scores(watched_run["verdict"]["dejavu"][0])
    past = watched(demo(memorised, steps=2, seed=24))
    past["sampler"]["inputs"]["model"] = past["monitor"]["inputs"]["model"]
    document = report(comfy, past)
    (verdict,) = document["verdicts"]
    assert document["flagged"] is None and verdict["score"] is None and document["prompt"] == ""
    assert "no sampler has drawn these samples with the monitored model" in verdict["why"]
    # What other nodes make of the samples of this run is still told by it.
    changed = watched(demo(memorised, steps=2, seed=25))
    changed["flip"] = node("LatentFlip", samples=["sampler", 0], flip_method="y-axis: horizontally")
    changed["verdict"]["inputs"]["samples"] = ["flip", 0]
    assert report(comfy, changed)["prompt"] == memorised


def test_samples_that_were_changed_are_told_by_the_sampler_behind_them(comfy: ComfyServer, memorised: str) -> None:
    def graph(seed: int, factor: float) -> graphs.Graph:
        """A memorised prompt, and an ordinary one whose latent is changed before its Verdict, on one monitor."""
        made = watched(demo(memorised, steps=2, seed=seed))
        for name in ("positive", "sampler", "decode", "save", "verdict"):
            inputs = {
                key: list(value) if isinstance(value, list) else value for key, value in made[name]["inputs"].items()
            }
            made[f"other {name}"] = {**made[name], "inputs": inputs}
        made["other positive"]["inputs"]["text"] = ORDINARY
        made["other sampler"]["inputs"] |= {"positive": ["other positive", 0], "seed": 26}
        made["changed"] = node("LatentMultiply", samples=["other sampler", 0], multiplier=factor)
        made["other verdict"]["inputs"]["samples"] = ["changed", 0]
        made["other decode"]["inputs"]["samples"] = ["other verdict", 0]
        made["other save"]["inputs"]["images"] = ["other decode", 0]
        return made

    def told(outputs: dict[str, Any]) -> list[str]:
        return [outputs[name]["dejavu"][0]["prompt"] for name in ("verdict", "other verdict")]

    assert told(comfy.run(graph(26, 0.9))) == [memorised, ORDINARY]
    # The ordinary one is not drawn again, the memorised one is: each Verdict still tells its own.
    assert told(comfy.run(graph(27, 0.8))) == [memorised, ORDINARY]
    # Behind a sampler that nobody watches there is no run, whatever else was drawn.
    unwatched = graph(28, 0.7)
    unwatched["other sampler"]["inputs"]["model"] = unwatched["monitor"]["inputs"]["model"]
    unwatched["other sampler"]["inputs"]["seed"] = 29
    assert told(comfy.run(unwatched)) == [memorised, ""]


def test_each_run_of_a_long_list_is_told_by_its_own_verdict(comfy: ComfyServer, memorised: str) -> None:
    """The host draws the whole list before the first Verdict runs."""
    graph = watched(demo(memorised, steps=2, seed=30, batch=10))
    graph["parts"] = node("RebatchLatents", latents=["checkpoint", 3], batch_size=1)
    graph["sampler"]["inputs"]["latent_image"] = ["parts", 0]
    graph["chosen"] = node("PreviewAny", source=["verdict", 2])
    outputs = comfy.run(graph, extra_pnginfo={"workflow": {"nodes": []}})
    found = [scores(document)[0] for document in outputs["verdict"]["dejavu"]]
    assert len(found) == len(set(found)) == 10
    (image, *_) = outputs["save"]["images"]
    kept = json.loads(Image.open(io.BytesIO(comfy.view(image))).info["dejavu"])["verdict"]
    assert scores(kept) == [max(found)]  # one place for all: the highest stays, and says so
    assert any("several runs were told by this node" in note for note in kept["notes"])


def test_explaining_and_mitigating_before_sampling(comfy: ComfyServer, memorised: str) -> None:
    graph = demo(memorised, steps=2, seed=30)
    for name in ("positive", "negative"):
        graph[name]["class_type"] = "DejaVuTextEncode"
    links = {name: graph["sampler"]["inputs"][name] for name in ("model", "positive", "negative", "latent_image")}
    run = {"seed": 30, "steps": 2, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    graph["explained"] = node("DejaVuExplain", **links, **run)
    settings = {"target": 0.0, "iterations": 25, "learning_rate": 0.0, "checkpointing": False}
    graph["mitigated"] = node("DejaVuMitigate", **links, **run, **settings)
    graph["sampler"]["inputs"]["positive"] = ["mitigated", 0]
    watched(graph)
    graph["verdict"]["inputs"]["samples"] = ["sampler", 0]
    outputs = comfy.run(graph)
    before = outputs["explained"]["dejavu"][0]
    after = outputs["verdict"]["dejavu"][0]
    assert before["verdicts"][0]["words"] and before["flagged"] is True
    assert scores(after)[0] < 0.5 * scores(before)[0]


CHANGING = {name: method.touches for name, method in available().items() if method.touches != "noise"}
METHODS = [name for name, touches in CHANGING.items() if touches != "guidance"]


def mitigated(prompt: str, method: str, *, encode: str = "DejaVuTextEncode", target: float = 0.0, **settings: Any):
    """A run of the bundled model with what the node makes of the prompt, measured by a monitor."""
    graph = demo(prompt, steps=3, seed=31)
    for name in ("positive", "negative"):
        graph[name]["class_type"] = encode
    links = {name: graph["sampler"]["inputs"][name] for name in ("model", "positive", "negative", "latent_image")}
    run = {"seed": 31, "steps": 3, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    chosen = {"target": target, "iterations": 25, "learning_rate": 0.0, "checkpointing": False, "method": method}
    graph["mitigated"] = node("DejaVuMitigate", **links, **run, **chosen, **settings)
    graph["sampler"]["inputs"] |= {"positive": ["mitigated", 0], "model": ["mitigated", 2]}
    graph["told"] = node("PreviewAny", source=["mitigated", 1])
    return watched(graph, words=False)


def test_mitigating_offers_all_methods_of_the_register(comfy: ComfyServer) -> None:
    optional = comfy.object_info()["DejaVuMitigate"]["input"]["optional"]
    kind, shown = optional["method"]
    assert (shown.get("options") or kind) == [OPTIMISE, *METHODS] and len(METHODS) >= 8
    assert shown["default"] == OPTIMISE


@pytest.mark.parametrize("method", [OPTIMISE, *METHODS])
def test_every_method_mitigates_before_sampling(comfy: ComfyServer, memorised: str, method: str) -> None:
    outputs = comfy.run(mitigated(memorised, method))
    told = json.loads(outputs["told"]["text"][0])
    (document,) = outputs["verdict"]["dejavu"]
    plain = comfy.run(watched(demo(memorised, steps=3, seed=31)))
    (before,) = plain["verdict"]["dejavu"]
    # What the sampler's own guidance shows is what the method has said, and less than before.
    assert scores(before) == pytest.approx([told["score_before"]], rel=2e-4)
    assert scores(document) == pytest.approx([told["score_after"]], rel=2e-4)
    assert told["score_after"] < 0.995 * told["score_before"]
    assert (pixels(comfy, outputs) != pixels(comfy, plain)).any()
    assert told["method"] == ("optimise-tokens" if method == OPTIMISE else method)
    touches = CHANGING[told["method"]]
    assert ("prompt" in told) == (touches == "prompt")
    if touches == "prompt":
        # The words of the new prompt are known, and typed by hand it gives the same image.
        assert document["prompt"] == told["prompt"] != memorised
        typed = comfy.run(watched(demo(told["prompt"], steps=3, seed=31)))
        assert (pixels(comfy, typed) == pixels(comfy, outputs)).all()
    if method in ("random-word", "random-number", "repeat-word"):
        assert told["prompt"] == perturb(memorised, method, 4, 31)
    if touches == "attention":
        # The monitor, flagged, comes to the same image by the same rule.
        flagged = watched(demo(memorised, steps=3, seed=31), when_flagged="mitigate", remedy=method)
        assert np.abs(pixels(comfy, comfy.run(flagged)).astype(int) - pixels(comfy, outputs)).max() <= 1
        # The model that heeds the rule attends to another conditioning as ever.
        other = mitigated(memorised, method)
        other["sampler"]["inputs"]["positive"] = ["positive", 0]
        assert (pixels(comfy, comfy.run(other)) == pixels(comfy, plain)).all()


def test_settings_of_a_method_are_its_own(comfy: ComfyServer, memorised: str) -> None:
    outputs = comfy.run(mitigated(memorised, "remove-trigger", max_words=1, keep=0.5))
    told = json.loads(outputs["told"]["text"][0])
    assert len(told["words"]) == 1 and f"({told['words'][0]}:0.5)" in told["prompt"]


def test_a_method_that_needs_the_text_says_so(comfy: ComfyServer, memorised: str) -> None:
    for method, why in (("remove-trigger", "Text Encode"), ("start-token", "tokens")):
        graph = mitigated(memorised, method, encode="CLIPTextEncode", target=1.0)
        entry = comfy.wait(comfy.post(graph), allow_error=True)
        assert why in json.dumps(entry["status"], ensure_ascii=False), method


@pytest.mark.newest
def test_calibrating_a_checkpoint_gives_it_p_values(comfy: ComfyServer) -> None:
    graph = graphs.text_to_image(steps=2, seed=40)
    sampler = graph["sampler"]["inputs"]
    graph["calibrated"] = node(
        "DejaVuCalibrate",
        model=sampler["model"],
        clip=["checkpoint", 1],
        latent_image=sampler["latent_image"],
        steps=2,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        negative="",
        count=24,
        whole_runs=0,
        cfg=7.0,
    )
    graph["shown"] = node("PreviewAny", source=["calibrated", 1])
    assert "24 ordinary prompts" in comfy.run(graph, timeout=600)["calibrated"]["text"][0]
    (verdict,) = report(comfy, watched(graphs.text_to_image(steps=2, seed=40), alpha=0.05))["verdicts"]
    assert verdict["nulls"] == 24 and 0 < verdict["p_value"] <= 1
    # One of fewer prompts is given on, and not kept in its place unless that is asked for.
    graph["calibrated"]["inputs"]["count"] = 20
    assert "Not kept: the calibration " in comfy.run(graph, timeout=600)["calibrated"]["text"][0]
    (verdict,) = report(comfy, watched(graphs.text_to_image(steps=2, seed=41), alpha=0.05))["verdicts"]
    assert verdict["nulls"] == 24
    graph["calibrated"]["inputs"]["replace"] = True
    assert "Kept as " in comfy.run(graph, timeout=600)["calibrated"]["text"][0]
    (verdict,) = report(comfy, watched(graphs.text_to_image(steps=2, seed=42), alpha=0.05))["verdicts"]
    assert verdict["nulls"] == 20
    # Whole runs give the band of each step, and p-values for the other scores.
    graph["calibrated"]["inputs"]["whole_runs"] = 20
    comfy.run(graph, timeout=600)
    several = watched(graphs.text_to_image(steps=2, seed=42), score="all steps", alpha=0.05)
    document = report(comfy, several)
    (verdict,) = document["verdicts"]
    assert verdict["nulls"] == 20 and verdict["score_kind"] == "all steps" and 0 < verdict["p_value"] <= 1
    assert [b["sigma"] for b in document["band"]] == pytest.approx(verdict["sigmas"], rel=1e-5)
    assert all(b["q05"] <= b["q50"] <= b["q95"] for b in document["band"])
    several["sampler"]["inputs"]["sampler_name"] = "heun"
    (verdict,) = report(comfy, several)["verdicts"]
    assert verdict["p_value"] is None and "another setting" in verdict["why"]


def test_perturbed_prompts_are_seeded(comfy: ComfyServer) -> None:
    graph = {
        "perturbed": node("DejaVuPerturbPrompt", text="a red fox", kind="random-word", insertions=2, seed=3),
        "shown": node("PreviewAny", source=["perturbed", 0]),
    }
    assert comfy.run(graph)["shown"]["text"] == [perturb("a red fox", "random-word", 2, 3)]


def test_a_broken_calibration_costs_no_image(comfy: ComfyServer) -> None:
    plain = pixels(comfy, comfy.run(graphs.text_to_image(steps=2, seed=41)))
    known = report(comfy, watched(graphs.text_to_image(steps=2, seed=41), alpha=0.05))["setting"]
    folder = comfy.home / "user" / "dejavu" / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    broken = folder / f"{known['model']}-broken.json"
    broken.write_text("{")
    try:
        outputs = comfy.run(watched(graphs.text_to_image(steps=2, seed=41), alpha=0.06))
        assert (pixels(comfy, outputs) == plain).all() and scores(outputs["verdict"]["dejavu"][0])[0] > 0
        assert f"passed over: the calibration profile {broken} is not valid JSON" in comfy.log()
        # One that was chosen by its name is refused before anything is drawn.
        graph = watched(graphs.text_to_image(steps=2, seed=42))
        graph["broken"] = node("DejaVuLoadCalibration", name=broken.name)
        graph["monitor"]["inputs"]["calibration"] = ["broken", 0]
        entry = comfy.wait(comfy.post(graph), allow_error=True)
        assert "is not valid JSON" in json.dumps(entry["status"]) and "sampler" not in entry["outputs"]
    finally:
        broken.unlink()


def test_sd3_and_fp8_are_measured(comfy: ComfyServer) -> None:
    for options in ({"checkpoint": miniature.SD3}, {"unet": miniature.UNET_FP8, "weight_dtype": "fp8_e4m3fn"}):
        document = report(comfy, watched(graphs.text_to_image(steps=2, **options)))
        assert document["verdicts"][0]["score"] > 0, options
