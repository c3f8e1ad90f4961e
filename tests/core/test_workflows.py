"""What the pack shows in ComfyUI beside its nodes: example workflows, help pages, texts. Read without the host.

The nodes are read from their source, so nothing of the host is imported here; settings are the core's own.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from sd_dejavu.settings import options_of

ROOT = Path(__file__).resolve().parents[2]
SOCKETS = ROOT / "nodes" / "sockets.py"
MITIGATIONS = ROOT / "sd_dejavu" / "mitigations"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
PAIRS = ROOT / "sd_dejavu" / "demo" / "model" / "pairs.json"

WIDGETS = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
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


# ------------------------------------------------------------------------- the nodes, from their source


@dataclass(frozen=True)
class Input:
    name: str
    type: str
    tooltip: str
    is_optional: bool = False
    is_seed: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    name: str
    type: str
    tooltip: str


@dataclass(frozen=True)
class Node:
    id: str
    display_name: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]

    @property
    def sockets(self) -> list[tuple[str, str]]:
        """In the front end's order: required ones first, then optional ones."""
        ordered = sorted(self.inputs, key=lambda i: i.is_optional)
        return [(i.name, i.type) for i in ordered if i.type not in WIDGETS]

    @property
    def widgets(self) -> list[Input | None]:
        """In the front end's order; None is the value that says what becomes of a seed after each run."""
        found: list[Input | None] = []
        for known in sorted(self.inputs, key=lambda i: i.is_optional):
            if known.type in WIDGETS:
                found += [known, None] if known.is_seed else [known]
        return found


@cache
def declared() -> dict[str, Node]:
    found = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(_tree(path)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                given = {k.arg: k.value for k in call.keywords}
                inputs = [i for element in _elements(given["inputs"]) for i in _inputs(element, path)]
                outputs = [_output(element) for element in _elements(given["outputs"])]
                texts = [ast.literal_eval(given[name]) for name in ("node_id", "display_name", "description")]
                found[texts[0]] = Node(*texts, tuple(inputs), tuple(outputs))
    return found


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _elements(written: ast.expr | None) -> list[ast.expr]:
    assert isinstance(written, ast.List)
    return written.elts


def _inputs(element: ast.expr, path: Path) -> Iterator[Input]:
    match element:
        case ast.Starred(
            value=ast.Call(func=ast.Attribute(attr="inputs_of"), args=[ast.Name(id=settings)], keywords=more)
        ):
            left_out = [name for k in more if k.arg == "leave_out" for name in ast.literal_eval(k.value)]
            yield from (i for i in _settings(settings, path) if i.name not in left_out)
        case ast.Starred(
            value=ast.Call(
                func=ast.Attribute(attr="inputs_of"), args=[ast.Attribute(value=ast.Name(id=module), attr=settings)]
            )
        ):
            yield from _settings(settings, _module(module, path))
        case ast.Starred(value=ast.Call(func=ast.Attribute(attr="inputs_of_methods"), args=touches, keywords=more)):
            wanted = {ast.literal_eval(argument) for argument in touches}
            given = {k.arg: k.value for k in more}
            known = [_source(ast.unparse(given["beside"]), path)] if "beside" in given else []
            for method in sorted(MITIGATIONS.glob("*.py")):
                declared_in = _source("Settings", method)  # methods may share their settings
                if wanted & _touches(method) and declared_in not in known:
                    known.append(declared_in)
                    for found in _settings("Settings", method):
                        yield replace(found, is_optional="optional" in given)
        case ast.Starred(value=ast.Call(func=ast.Attribute(attr="run_inputs"))):
            yield from _run_inputs()
        case ast.Starred(value=ast.GeneratorExp(generators=[ast.comprehension(ifs=[ast.Compare() as test])])):
            yield from (i for i in _run_inputs() if i.name != ast.literal_eval(test.comparators[0]))
        case ast.Name(id=name):
            yield from _inputs(_assigned(name, path), path)
        case ast.Call(func=ast.Attribute(attr="Input", value=kind), args=[ast.Constant(value=name)]):
            given = {k.arg: k.value for k in element.keywords}
            options: tuple[str, ...] = ()
            if "options" in given and "get_args" in ast.unparse(given["options"]):
                options = _literal(ast.unparse(given["options"]).split("get_args(")[1].split(")")[0], path)
            yield Input(
                name,
                _type(kind),
                ast.literal_eval(given["tooltip"]),
                "optional" in given and ast.literal_eval(given["optional"]),
                "control_after_generate" in given,
                options,
            )
        case _:
            raise AssertionError(f"{path.name}: what is {ast.unparse(element)}?")


def _run_inputs() -> Iterator[Input]:
    (function,) = (f for f in _tree(SOCKETS).body if isinstance(f, ast.FunctionDef) and f.name == "run_inputs")
    returned = function.body[-1]
    assert isinstance(returned, ast.Return)
    for element in _elements(returned.value):
        yield from _inputs(element, SOCKETS)


def _output(element: ast.expr) -> Output:
    match element:
        case ast.Call(func=ast.Attribute(attr="Output", value=kind), args=[]):
            given = {k.arg: ast.literal_eval(k.value) for k in element.keywords}
            return Output(given.get("display_name", _type(kind)), _type(kind), given["tooltip"])
    raise AssertionError(f"what is {ast.unparse(element)}?")


def _type(kind: ast.expr) -> str:
    match kind:
        case ast.Attribute(value=ast.Name(id="io"), attr=name):
            return name.upper()
        case ast.Attribute(value=ast.Name(id="sockets"), attr=name):
            made = _assigned(name, SOCKETS)
            assert isinstance(made, ast.Call)
            return str(ast.literal_eval(made.args[0]))
    raise AssertionError(f"what is {ast.unparse(kind)}?")


def _settings(name: str, path: Path) -> Iterator[Input]:
    """The inputs that sockets.inputs_of makes of a settings class."""
    place = _source(name, path).relative_to(ROOT).with_suffix("")
    for known in options_of(getattr(importlib.import_module(".".join(place.parts)), name)):
        kinds = {bool: "BOOLEAN", int: "INT", float: "FLOAT"}
        kind = kinds.get(known.kind, "COMBO" if known.choices else "STRING")
        yield Input(known.name, kind, known.help, options=known.choices)


def _assigned(name: str, path: Path) -> ast.expr:
    for line in _tree(path).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return line.value
    raise AssertionError(f"{name} is not set in {path.name}")


def _literal(name: str, path: Path) -> tuple[str, ...]:
    """The values of a Literal, wherever it was imported from."""
    made = _assigned(name, _source(name, path))
    assert isinstance(made, ast.Subscript) and ast.unparse(made.value) == "Literal"
    values = ast.literal_eval(made.slice)
    return values if isinstance(values, tuple) else (values,)


def _module(name: str, path: Path) -> Path:
    """The file of a module that was imported by its name."""
    for line in _tree(path).body:
        if isinstance(line, ast.ImportFrom) and line.level and name in [a.name for a in line.names]:
            return path.parents[line.level - 1] / (line.module or "").replace(".", "/") / f"{name}.py"
    raise AssertionError(f"{name} is not imported in {path.name}")


def _touches(path: Path) -> set[str]:
    """What the mitigations of this file say they touch."""
    calls = [call for call in ast.walk(_tree(path)) if isinstance(call, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) == "Mitigation"]
    given = [k.value for call in made for k in call.keywords if k.arg == "touches"]
    return {ast.literal_eval(value) for value in given or [call.args[2] for call in made]}


def _source(name: str, path: Path) -> Path:
    """The file that a name of this one was imported from; this one if it was not."""
    for line in _tree(path).body:
        if isinstance(line, ast.ImportFrom) and line.level and name in [a.name for a in line.names]:
            return (path.parents[line.level - 1] / (line.module or "").replace(".", "/")).with_suffix(".py")
    return path


def test_the_source_is_read_to_the_end() -> None:
    assert len(declared()) == 17
    assert all(node.id.startswith("DejaVu") for node in declared().values())
    assert [w.name for w in declared()["DejaVuInitialNoise"].widgets if w][-7:] == [
        "method",
        "noise_rounds",
        "noise_strength",
        "noise_radius",
        "guidance_from",
        "noise_iterations",
        "noise_rate",
    ]
    # What came later stands at the end and may be left out: workflows that were made before go on as they were.
    mitigate = [w for w in declared()["DejaVuMitigate"].widgets if w]
    assert [w.name for w in mitigate if w.is_optional] == [
        "method",
        "attenuation",
        "outlier_deviations",
        "insertions",
        "max_words",
        "keep",
        "start_factor",
        "mask_padding",
    ]
    assert [w.name for w in mitigate if not w.is_optional][-4:] == [
        "target",
        "iterations",
        "learning_rate",
        "checkpointing",
    ]
    monitor = declared()["DejaVuMonitor"]
    assert [name for name, _ in monitor.sockets] == ["model", "calibration", "clip"]
    assert [w.name for w in monitor.widgets if w] == [
        "without",
        "when_flagged",
        "remedy",
        "explain",
        "score",
        "alpha",
    ]


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
                    assert not widget.options or value in widget.options, widget.name


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


# --------------------------------------------------------------------------------- help pages and texts


def shown(name: str) -> str:
    return name.replace("_", " ")


@pytest.mark.parametrize("node", list(declared().values()), ids=list(declared()))
def test_every_node_has_a_help_page_that_names_its_slots(node: Node) -> None:
    page = (ROOT / "web" / "docs" / f"{node.id}.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in page.split("\n## ")}
    for heading, slots in (("Inputs", node.inputs), ("Outputs", node.outputs)):
        rows = [line.split("|")[1].strip() for line in sections[heading].splitlines() if line.startswith("|")]
        assert rows[2:] == [shown(slot.name) for slot in slots], heading
    assert {"How to wire it", "What to know"} <= sections.keys()


@cache
def texts() -> dict[str, Any]:
    return json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("node", list(declared().values()), ids=list(declared()))
def test_the_texts_are_those_of_the_source(node: Node) -> None:
    """The front end shows these instead of the source's, so they must not fall behind."""
    assert texts()[node.id] == {
        "display_name": node.display_name,
        "description": node.description,
        "inputs": {i.name: {"name": shown(i.name), "tooltip": i.tooltip} for i in node.inputs},
        "outputs": {str(n): {"name": o.name, "tooltip": o.tooltip} for n, o in enumerate(node.outputs)},
    }


def test_the_texts_hold_nothing_that_the_front_end_would_interpret() -> None:
    assert texts().keys() == declared().keys()
    assert not set("@{}|") & set("".join(_strings(texts())))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for part in value.values():
            yield from _strings(part)
