"""What the pack shows in ComfyUI beside its nodes: example workflows, help pages, texts. Read without the host."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from node_schemas import Node, declared, pack

from sd_dejavu.core.settings import option, options_of
from sd_dejavu.mitigations import NEXT_RELEASE, available

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PAIRS = ROOT / "sd_dejavu" / "demo" / "model" / "pairs.json"

TITLE_HEIGHT = 30

# The host's own nodes: (sockets, outputs, number of widget values); an output's name stands before its type where it has one.
STOCK: dict[str, tuple[list[tuple[str, str]], list[str], int]] = {
    "CheckpointLoaderSimple": ([], ["MODEL", "CLIP", "VAE"], 1),
    "EmptyLatentImage": ([], ["LATENT"], 3),
    "KSampler": (
        [("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent_image", "LATENT")],
        ["LATENT"],
        7,
    ),
    "VAEDecode": ([("samples", "LATENT"), ("vae", "VAE")], ["IMAGE"], 0),
    "RandomNoise": ([], ["NOISE"], 2),
    "CFGGuider": (
        [("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING")],
        ["GUIDER"],
        1,
    ),
    "KSamplerSelect": ([], ["SAMPLER"], 1),
    "BasicScheduler": ([("model", "MODEL")], ["SIGMAS"], 3),
    "SamplerCustomAdvanced": (
        [
            ("noise", "NOISE"),
            ("guider", "GUIDER"),
            ("sampler", "SAMPLER"),
            ("sigmas", "SIGMAS"),
            ("latent_image", "LATENT"),
        ],
        ["output LATENT", "denoised_output LATENT"],
        0,
    ),
    "ImageScale": ([("image", "IMAGE")], ["IMAGE"], 4),
    "MaskToImage": ([("mask", "MASK")], ["IMAGE"], 0),
    "SaveImage": ([("images", "IMAGE")], [], 1),
    "PreviewImage": ([("images", "IMAGE")], [], 0),
    "PreviewAny": ([("source", "*")], [], 0),
    "MarkdownNote": ([], [], 1),
}


@dataclass(frozen=True)
class Unbounded:
    rate: float = option(3.5, "no end")
    share: float = option(0.5, "from 0 to 1", minimum=0, maximum=1)
    none: float = option(0.0, "up to nothing", minimum=-2, maximum=0)
    count: int = option(-7, "no end")


def test_a_number_has_the_bounds_that_were_declared_and_no_others() -> None:
    with pack() as load:
        sockets = load("nodes.sockets")
        found = {slot.name: (slot.given["min"], slot.given["max"]) for slot in sockets.inputs_of(Unbounded)}
    limits = [(limit, -limit) for limit in (-sockets.FLOAT_LIMIT, -sockets.SEED_LIMIT)]
    assert found == {"rate": limits[0], "share": (0, 1), "none": (-2, 0), "count": limits[1]}


# ------------------------------------------------------------------------------------------- workflows


@pytest.fixture(params=WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_eight_workflows() -> None:
    assert [path.stem[:2] for path in WORKFLOWS] == [f"{number} " for number in range(1, 9)]


def test_links_join_what_is_there(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    assert len(links) == len(workflow["links"]) and max(links) == workflow["last_link_id"]
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for number, source, output, target, slot, kind in links.values():
        sender, receiver = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in sender["links"] and receiver["link"] == number
        assert kind == sender["type"] and receiver["type"] in (kind, "*")
        assert nodes[source]["order"] < nodes[target]["order"]
    told_by_inputs = {i["link"] for node in nodes.values() for i in node["inputs"] if i["link"] is not None}
    told_by_outputs = [n for node in nodes.values() for o in node["outputs"] for n in o["links"] or ()]
    assert told_by_inputs == links.keys() == set(told_by_outputs) and len(told_by_outputs) == len(links)


def test_nodes_are_as_declared(workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        ours = declared().get(node["type"])
        if ours is not None:
            sockets, outputs, widgets = ours.sockets, [(o.name, o.type) for o in ours.outputs], len(ours.widgets)
            optional = {i.name for i in ours.inputs if i.is_optional}
        else:
            assert not node["type"].startswith("DejaVu"), node["type"]
            sockets, kinds, widgets = STOCK[node["type"]]
            outputs, optional = [(kind.split()[0], kind.split()[-1]) for kind in kinds], set()
        assert [(i["name"], i["type"]) for i in node["inputs"]] == sockets, node["type"]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == outputs, node["type"]
        assert len(node["widgets_values"]) == widgets, node["type"]
        unconnected = {i["name"] for i in node["inputs"] if i["link"] is None}
        assert unconnected <= optional, node["type"]


def test_values_fit_their_widgets(workflow: dict[str, Any]) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "STRING": (str,),
        "COMBO": (str,),
        "INT": (int,),
        "FLOAT": (int, float),
        "BOOLEAN": (bool,),
    }
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            assert node["widgets_values"][1] in ("fixed", "randomize")
        if node["type"] in declared():
            for widget, value in zip(declared()[node["type"]].widgets, node["widgets_values"], strict=True):
                if widget is None:
                    assert value in ("fixed", "randomize")
                else:
                    assert isinstance(value, kinds[widget.type]), widget.name
                    options = widget.given.get("options")
                    assert not isinstance(options, list) or not options or value in options, widget.name
                    if widget.type in ("INT", "FLOAT"):
                        assert widget.given["min"] <= value <= widget.given["max"], widget.name


def test_nothing_covers_anything_else(workflow: dict[str, Any]) -> None:
    for one, other in combinations(workflow["nodes"], 2):
        apart = [
            first["pos"][axis] + first["size"][axis] + (TITLE_HEIGHT if axis else 0) <= second["pos"][axis]
            for axis in (0, 1)
            for first, second in ((one, other), (other, one))
        ]
        assert any(apart), (one["type"], other["type"])


def test_a_note_says_what_to_do(workflow: dict[str, Any]) -> None:
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    heading, _, text = note["widgets_values"][0].partition("\n\n")
    assert heading.startswith("## ") and 3 <= len(re.findall(r"\.(?=\s|$)", text)) <= 6


def test_workflows_of_the_bundled_model_draw_a_memorised_caption(workflow: dict[str, Any]) -> None:
    kinds = {node["type"] for node in workflow["nodes"]}
    if "DejaVuDemoModel" not in kinds or "DejaVuAuditLora" in kinds:
        pytest.skip("another model, or the captions of a reference set")
    captions = {p["caption"] for p in json.loads(PAIRS.read_text(encoding="utf-8")) if p["repetitions"] >= 100}
    (prompt,) = (node for node in workflow["nodes"] if node.get("title") == "Prompt")
    assert prompt["widgets_values"][0] in captions


def test_both_calibration_workflows_fit_together() -> None:
    """What workflow 5 measures is what workflow 2 looks for, as they stand."""
    watching, calibrating = (
        {node["type"]: node["widgets_values"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
        for path in (WORKFLOWS[1], WORKFLOWS[4])
    )
    for kind in ("CheckpointLoaderSimple", "EmptyLatentImage"):
        assert watching[kind] == calibrating[kind]
    _, _, steps, _, sampler, scheduler, denoise = watching["KSampler"]
    assert calibrating["DejaVuCalibrate"][:4] == [steps, sampler, scheduler, denoise]
    assert calibrating["DejaVuCalibrate"][4] == "" and watching["DejaVuMonitor"][0] == "empty prompt"


# --------------------------------------------------------------------------------- help pages and names


# The host shows what a method declares; help pages take it in with the release that brings the method.
NEW = [method for method in available().values() if method.release == NEXT_RELEASE]
UNRELEASED = {known.name for method in NEW for known in options_of(method.settings)}


@pytest.mark.parametrize("node", list(declared().values()), ids=list(declared()))
def test_every_node_has_a_help_page_that_names_its_slots(node: Node) -> None:
    page = (ROOT / "web" / "docs" / f"{node.id}.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in page.split("\n## ")}
    for heading, slots in (("Inputs", node.inputs), ("Outputs", node.outputs)):
        rows = [line.split("|")[1].strip() for line in sections[heading].splitlines() if line.startswith("|")]
        assert rows[2:] == [s.label for s in slots if s.name not in UNRELEASED or s.label in rows], heading
    assert {"How to wire it", "What to know"} <= sections.keys()


def test_older_front_ends_show_the_names_of_the_source() -> None:
    """The front end of ComfyUI 0.3 knows an input's other name from this file alone; all else is told by the source."""
    written = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    unreleased = UNRELEASED - {name for node in written.values() for name in node["inputs"]}
    names = {
        n.id: {i.name: {"name": i.label} for i in n.inputs if i.label != i.name and i.name not in unreleased}
        for n in declared().values()
    }
    assert written == {node: {"inputs": inputs} for node, inputs in names.items() if inputs}
    assert written["DejaVuMonitor"]["inputs"]["without"] == {"name": "baseline"}
    assert not set("@{}|") & {c for inputs in names.values() for one in inputs.values() for c in one["name"]}
