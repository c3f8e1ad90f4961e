"""What release 0.1.0 saved still opens: the files of tests/data/v0.1.0 were written by it, in real hosts where they have one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from node_schemas import WIDGETS, declared
from PIL import Image

from sd_dejavu.calibration.profile import Profile
from sd_dejavu.calibration.store import find, path_for
from sd_dejavu.core.settings import by_id
from sd_dejavu.hosts.webui import controls
from sd_dejavu.reference.features import Grey
from sd_dejavu.reference.reference_set import ReferenceSet

SAVED = Path(__file__).parents[1] / "data" / "v0.1.0"
WEB = Path(__file__).parents[2] / "web"
NODES = json.loads((SAVED / "nodes.json").read_text(encoding="utf-8"))
ARGUMENTS = ["enabled", "without", "when_flagged", "remedy", "explain", "score", "alpha", "perturb", "insertions", "references"]  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_nodes_keep_their_widgets_sockets_and_outputs_where_they_were(name: str) -> None:
    """Workflows hold widgets and outputs by place: what is new stands behind, and may be left out."""
    saved, node = NODES[name], declared()[name]
    widgets = [known and known.name for known in node.widgets]
    if name == "DejaVuAuditLora":  # release 0.1 did not say what the page puts behind every seed
        widgets.remove(None)
    assert widgets[: len(saved["widgets"])] == saved["widgets"]
    assert [o.type for o in node.outputs][: len(saved["outputs"])] == [kind for _, kind in saved["outputs"]]
    assert [[i.name, i.type] for i in node.inputs if [i.name, i.type] in saved["inputs"]] == saved["inputs"]
    before = {known for known, _ in saved["inputs"]} | set(saved["widgets"])
    assert all(i.is_optional or "default" in i.given for i in node.inputs if i.name not in before)


@pytest.mark.parametrize("path", sorted((SAVED / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_values_of_workflows_fit_the_widgets_where_they_lie(path: Path) -> None:
    kinds: dict[str, Any] = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool}
    ours = [node for node in json.loads(path.read_text(encoding="utf-8"))["nodes"] if node["type"] in NODES]
    assert ours
    for node in ours:
        widgets = declared()[node["type"]].widgets
        for widget, value in zip(widgets, node["widgets_values"], strict=False):
            if widget is not None:
                assert widget.type in WIDGETS and isinstance(value, kinds.get(widget.type, str)), widget.name
                options = widget.given.get("options")
                assert not options or not isinstance(options, list) or value in options, widget.name


def test_a_profile_is_found_and_gives_the_p_value_it_gave() -> None:
    (file,) = (SAVED / "calibration").glob("*.json")
    profile = Profile.load(file)
    assert path_for(profile.setting, file.parent) == file
    assert find(profile.setting, "all steps", folder=file.parent) == profile
    # 11 of its 30 ordinary prompts score at least 2.
    assert profile.p_value(2.0, profile.setting).p == pytest.approx(12 / 31)
    assert [step.sigma for step in profile.band] == [14.6146, 7.0, 1.0]


def test_a_reference_set_opens() -> None:
    found = ReferenceSet.load(SAVED / "references.safetensors", Grey())
    assert found.names == ("0.png", "1.png", "2.png") and found.captions == ("picture 0", "picture 1", "picture 2")
    nearest = found.search(found.embeddings, 1)
    assert nearest.index[:, 0].tolist() == [0, 1, 2] and nearest.similarity[:, 0].tolist() == pytest.approx([1.0] * 3)


def test_an_image_of_comfyui_shows_its_report_again(tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node was not found: the page's reader did not run")
    with Image.open(SAVED / "comfyui.png") as image:
        kept = image.info
    (in_workflow,) = json.loads(kept["workflow"])["nodes"]
    assert json.loads(kept["dejavu"]) == {"7": in_workflow["properties"]["dejavu"]}
    script = f"""
        import {{ asText, readReport }} from {json.dumps((WEB / "report.js").as_uri())}
        let text = ''
        for await (const piece of process.stdin) text += piece
        console.log(asText(readReport(JSON.parse(text).properties.dejavu)))
    """
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script],
        input=json.dumps(in_workflow),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    assert "Prompt: Study Of A Black Car By Moxgaen" in done.stdout and "Flagged. Likely memorised" in done.stdout
    graph = json.loads(kept["prompt"])
    for node in graph.values():
        if node["class_type"] in NODES:
            assert {i.name for i in declared()[node["class_type"]].inputs} >= set(node["inputs"])


def test_the_parameters_of_an_image_of_the_webui_are_pasted_back() -> None:
    with Image.open(SAVED / "webui.png") as image:
        parameters = image.info["parameters"]
    line = parameters.split(f"{controls.INFOTEXT}: ")[1].split(", ")[0]
    expected = {"explain": "never", "alpha": 0.05, "perturb": "random-number", "insertions": 2}
    for known in controls.OPTIONS:
        assert controls.pasted({controls.INFOTEXT: line}, known.name) == expected.get(known.name, known.default)


def test_positional_arguments_of_the_webuis_api_stay_where_they_were() -> None:
    assert ["enabled", *(known.id for known in controls.OPTIONS)][: len(ARGUMENTS)] == ARGUMENTS
    given = [True, "empty prompt", "stop", "remove-trigger", "always", "all steps", 0.02, "repeat-word", 3, "cats"]
    wanted = controls.read(given)
    assert (wanted.enabled, wanted.perturb, wanted.insertions, wanted.references) == (True, "repeat-word", 3, "cats")
    found = list(by_id(wanted.monitoring).values())[:6]
    assert found == given[1:7]
