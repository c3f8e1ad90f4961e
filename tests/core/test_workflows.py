"""What the pack shows in ComfyUI beside its nodes: example workflows, help pages, texts. Read without the host."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from node_schemas import WIDGETS, Node, declared, pack
from PIL import Image

from sd_dejavu.core.settings import option, options_of
from sd_dejavu.mitigations import NEXT_RELEASE, available

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
FILES = [*WORKFLOWS, *BLUEPRINTS]
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


@pytest.fixture(params=FILES, ids=[path.stem for path in FILES])
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def subgraphs_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document.get("definitions", {}).get("subgraphs", [])


def nodes_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """All nodes that are drawn or run, those in subgraphs too."""
    return [node for graph in (document, *subgraphs_of(document)) for node in graph["nodes"]]


def test_there_are_nine_workflows() -> None:
    assert [path.stem[:2] for path in WORKFLOWS] == [f"{number} " for number in range(1, 10)]


def test_links_join_what_is_there(workflow: dict[str, Any]) -> None:
    highest = [max(node["id"] for node in workflow["nodes"]), max([0, *(link[0] for link in workflow["links"])])]
    assert highest == [workflow["last_node_id"], workflow["last_link_id"]]
    links_join(workflow["nodes"], workflow["links"])
    for graph in subgraphs_of(workflow):
        fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [[link[name] for name in fields] for link in graph["links"]]
        assert graph["state"]["lastNodeId"] == max(node["id"] for node in graph["nodes"])
        assert graph["state"]["lastLinkId"] == max(link[0] for link in links)
        # What leads in and out stands at both ends of the graph, as two more nodes.
        ins = [{"name": one["name"], "type": one["type"], "links": one["linkIds"]} for one in graph["inputs"]]
        outs = [{"name": one["name"], "type": one["type"], "link": one["linkIds"][0]} for one in graph["outputs"]]
        assert all(len(one["linkIds"]) == 1 for one in graph["outputs"])
        first = {"id": graph["inputNode"]["id"], "inputs": [], "outputs": ins, "order": 0}
        last = {"id": graph["outputNode"]["id"], "inputs": outs, "outputs": [], "order": len(graph["nodes"]) + 1}
        inner = [{**node, "order": node["order"] + 1} for node in graph["nodes"]]
        links_join([first, *inner, last], links)


def links_join(listed: list[dict[str, Any]], known: list[list[Any]]) -> None:
    nodes = {node["id"]: node for node in listed}
    links = {link[0]: link for link in known}
    assert len(nodes) == len(listed) and len(links) == len(known)
    assert sorted(node["order"] for node in nodes.values()) == list(range(len(nodes)))
    for number, source, output, target, slot, kind in links.values():
        sender, receiver = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in sender["links"] and receiver["link"] == number
        assert kind == sender["type"] and receiver["type"] in (kind, "*")
        assert nodes[source]["order"] < nodes[target]["order"]
    told_by_inputs = {i["link"] for node in nodes.values() for i in node["inputs"] if i["link"] is not None}
    told_by_outputs = [n for node in nodes.values() for o in node["outputs"] for n in o["links"] or ()]
    assert told_by_inputs == links.keys() == set(told_by_outputs) and len(told_by_outputs) == len(links)


def test_nodes_are_as_declared(workflow: dict[str, Any], request: pytest.FixtureRequest) -> None:
    made = {graph["id"]: graph for graph in subgraphs_of(workflow)}
    stands_alone = request.node.callspec.params["workflow"] in BLUEPRINTS
    for node in nodes_of(workflow):
        ours, optional = declared().get(node["type"]), set()
        if node["type"] in made:
            graph = made[node["type"]]
            sockets, outputs = (
                [(one["name"], one["type"]) for one in graph[end] if one["type"] not in WIDGETS or end == "outputs"]
                for end in ("inputs", "outputs")
            )
            widgets = 0  # the values are those of the nodes inside
            optional = {name for name, _ in sockets} if stands_alone else set()
        elif ours is not None:
            sockets, outputs, widgets = ours.sockets, [(o.name, o.type) for o in ours.outputs], len(ours.widgets)
            optional = {i.name for i in ours.inputs if i.is_optional}
        else:
            assert not node["type"].startswith("DejaVu"), node["type"]
            sockets, kinds, widgets = STOCK[node["type"]]
            outputs = [(kind.split()[0], kind.split()[-1]) for kind in kinds]
        plain = [i for i in node["inputs"] if "widget" not in i]
        assert [(i["name"], i["type"]) for i in plain] == sockets, node["type"]
        assert [(o["name"], o["type"]) for o in node["outputs"]] == outputs, node["type"]
        assert len(node["widgets_values"]) == widgets, node["type"]
        unconnected = {i["name"] for i in plain if i["link"] is None}
        assert unconnected <= optional, node["type"]


def test_the_first_workflow_fits_a_small_page() -> None:
    """At most seven nodes, drawn large enough at 1600 x 1000 that every text is readable."""
    document = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    assert len(document["nodes"]) <= 7
    x, y, width, height = document["groups"][0]["bounding"]
    assert width <= 1600 and height <= 900
    for node in document["nodes"]:
        left, top = node["pos"][0], node["pos"][1] - TITLE_HEIGHT
        assert x <= left and left + node["size"][0] <= x + width
        assert y <= top and node["pos"][1] + node["size"][1] <= y + height


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_has_a_thumbnail(path: Path) -> None:
    """The host shows the .jpg of the same name in the template browser."""
    thumbnail = path.with_suffix(".jpg")
    with Image.open(thumbnail) as image:
        assert image.format == "JPEG" and 256 <= image.width <= 512
    assert thumbnail.stat().st_size <= 60 * 1024


def test_the_documentation_lists_the_templates_as_the_page_does() -> None:
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    listed = rows[rows.index("template") + 2 : rows.index("node")]
    assert listed == [path.stem for path in WORKFLOWS]


def test_an_app_names_widgets_and_nodes_that_are_there() -> None:
    (document,) = (
        d for path in WORKFLOWS if "linearData" in (d := json.loads(path.read_text(encoding="utf-8")))["extra"]
    )
    nodes = {node["id"]: node for node in document["nodes"]}
    shown = document["extra"]["linearData"]
    assert document["extra"]["linearMode"] is True
    named = {nodes[id_]["type"]: name for id_, name, *_ in shown["inputs"]}
    assert named == {"DejaVuTextEncode": "text", "CheckpointLoaderSimple": "ckpt_name", "KSampler": "seed"}
    assert [nodes[id_]["title"] for id_ in shown["outputs"]] == ["Image", "Verdict"]


def test_the_blueprint_stands_in_for_a_ksampler() -> None:
    """It takes the same sockets in the same order and gives out the latent first, so that links can be moved over."""
    document = json.loads(BLUEPRINTS[0].read_text(encoding="utf-8"))
    (node,), (graph,) = document["nodes"], subgraphs_of(document)
    assert node["title"] == graph["name"] == BLUEPRINTS[0].stem and node["type"] == graph["id"]
    sockets, outputs, widgets = STOCK["KSampler"]
    assert [(i["name"], i["type"]) for i in graph["inputs"][: len(sockets)]] == sockets
    assert graph["outputs"][0]["name"] == outputs[0]
    (sampler,) = (inner for inner in graph["nodes"] if inner["type"] == "KSampler")
    promoted = [[str(sampler["id"]), i["name"]] for i in graph["inputs"] if i["type"] in WIDGETS]
    assert node["properties"]["proxyWidgets"] == promoted and len(promoted) == widgets - 1


def test_values_fit_their_widgets(workflow: dict[str, Any]) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "STRING": (str,),
        "COMBO": (str,),
        "INT": (int,),
        "FLOAT": (int, float),
        "BOOLEAN": (bool,),
    }
    for node in nodes_of(workflow):
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
    pairs = (pair for graph in (workflow, *subgraphs_of(workflow)) for pair in combinations(graph["nodes"], 2))
    for one, other in pairs:
        apart = [
            first["pos"][axis] + first["size"][axis] + (TITLE_HEIGHT if axis else 0) <= second["pos"][axis]
            for axis in (0, 1)
            for first, second in ((one, other), (other, one))
        ]
        assert any(apart), (one["type"], other["type"])


def test_a_note_says_what_to_do(workflow: dict[str, Any]) -> None:
    if subgraphs_of(workflow):
        pytest.skip("small: a group's title says it, or the blueprint's description")
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    heading, _, text = note["widgets_values"][0].partition("\n\n")
    assert heading.startswith("## ") and 3 <= len(re.findall(r"\.(?=\s|$)", text)) <= 6


def test_workflows_of_the_bundled_model_draw_a_memorised_caption(workflow: dict[str, Any]) -> None:
    kinds = {node["type"] for node in nodes_of(workflow)}
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


def test_names_that_are_linked_are_looked_at_when_they_come():
    """Before a run the host gives a node None for what is linked to it."""
    with pack() as load:
        nodes = {
            node.__name__: node
            for file in ("repair", "reference", "calibration")
            for node in load(f"nodes.{file}").NODES
        }
    assert nodes["RepairLora"].validate_inputs(None) is True
    assert nodes["RepairLora"].validate_inputs("../a") is not True
    checked = [node for node in nodes.values() if hasattr(node, "validate_inputs")]
    assert len(checked) == 4
    for node in checked:
        wanted = inspect.signature(node.validate_inputs).parameters
        assert node.validate_inputs(**dict.fromkeys(wanted)) is True
