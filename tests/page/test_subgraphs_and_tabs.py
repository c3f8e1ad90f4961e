"""The Verdict node in subgraphs, behind promoted texts and in another tab than the one that is open."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from comfyui_page import Page

WORKFLOWS = Path(__file__).parents[2] / "example_workflows"
FIRST = WORKFLOWS / "1 Try it on the bundled model.json"
THIRD = WORKFLOWS / "3 Stop when flagged.json"
PROMPT = "Study Of A Black Car By Moxgaen"
DROPPED = "Study Of A Black Car By"
VERDICT = "DejaVuVerdict"
WATCHED = ["3", "5", "6", "7"]  # of the first workflow: positive text, monitor, sampler, verdict
SEEDS = itertools.count(70_000)

ENTER = """async (id) => {
    const {app} = window.comfyAPI.app;
    const node = app.canvas.graph.nodes.find((n) => String(n.id) === id);
    app.canvas.openSubgraph ? app.canvas.openSubgraph(node.subgraph, node) : app.canvas.setGraph(node.subgraph);
    await new Promise((done) => setTimeout(done, 1200));
}"""
LEAVE = """async () => {
    const {app} = window.comfyAPI.app;
    app.canvas.setGraph(app.rootGraph ?? app.graph.rootGraph);
    await new Promise((done) => setTimeout(done, 1200));
}"""


def convert(page: Page, ids: list[str] | None) -> str:
    """Make a subgraph of these nodes of the graph that is open, or of all; the id of the node that stands for it."""
    script = """async (ids) => {
        const graph = window.comfyAPI.app.app.canvas.graph;
        const {node} = graph.convertToSubgraph(new Set(graph.nodes.filter((n) => !ids || ids.includes(String(n.id)))));
        await new Promise((done) => setTimeout(done, 500));
        return String(node.id);
    }"""
    return str(page.browser.evaluate(script, ids))


def promote(page: Page, id: str, input: str) -> None:
    """Lead an input of a node of the subgraph that is open out to the node around it."""
    script = """async ([id, name]) => {
        const graph = window.comfyAPI.app.app.canvas.graph;
        const node = graph.nodes.find((n) => String(n.id) === id);
        const input = node.inputs.find((i) => i.name === name);
        graph.addInput(name, 'STRING').connect(input, node);
        await new Promise((done) => setTimeout(done, 500));
    }"""
    page.browser.evaluate(script, [id, input])


def change(page: Page, statement: str) -> None:
    """Run a statement on the Verdict ``node`` of the graph that is open."""
    script = f"""() => {{ const {{app}} = window.comfyAPI.app;
        const node = app.canvas.graph.nodes.find((n) => n.type === '{VERDICT}'); {statement};
        app.canvas.setDirty(true, true); }}"""
    page.browser.evaluate(script)
    page.browser.wait_for_timeout(700)


def panel(page: Page) -> str:
    """What the one panel shows that can be seen; '' without one."""
    script = """() => [...document.querySelectorAll('.dejavu')].filter((e) => e.checkVisibility())
        .map((e) => e.innerText).join('\\n---\\n')"""
    return str(page.browser.evaluate(script))


def show(page: Page) -> None:
    """Bring the Verdict of the graph that is open into view; the Escape key would leave a subgraph."""
    change(page, "app.canvas.ds.offset[0] = 520 - node.pos[0]; app.canvas.ds.offset[1] = 160 - node.pos[1]")


def is_vue(page: Page) -> bool:
    script = "() => window.comfyAPI.app.app.extensionManager.setting.get('Comfy.VueNodes.Enabled')"
    return bool(page.browser.evaluate(script))


def reports(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [output["dejavu"][0] for output in result["outputs"].values() if output and "dejavu" in output]


def negative(page: Page) -> str:
    """The text of the negative prompt, which lies in a subgraph of its own."""
    script = """() => { const {app} = window.comfyAPI.app; const graph = app.rootGraph ?? app.graph.rootGraph ?? app.graph;
        const nodes = [graph, ...graph.subgraphs.values()].flatMap((one) => one.nodes);
        return nodes.find((n) => n.title === 'Empty prompt').widgets[0].value }"""
    return str(page.browser.evaluate(script))


@pytest.fixture(params=["classic", "Nodes 2.0"])
def opened(request: pytest.FixtureRequest, front_end: Page) -> Page:
    """The first example workflow with a seed of its own."""
    front_end.set("Comfy.VueNodes.Enabled", request.param == "Nodes 2.0")
    front_end.set("Comfy.Minimap.Visible", False)
    front_end.reload()
    front_end.load(FIRST)
    front_end.set_widget("KSampler", "seed", next(SEEDS))
    return front_end


@pytest.mark.parametrize("depth", [1, 2])
def test_a_verdict_in_subgraphs_shows_its_run_and_changes_its_text(opened: Page, depth: int) -> None:
    page = opened
    path = [convert(page, WATCHED)]
    page.browser.evaluate(ENTER, path[0])
    if depth == 2:
        path.append(convert(page, None))
        page.browser.evaluate(ENTER, path[1])
    promote(page, "3", "text")
    if depth == 2:
        page.browser.evaluate(LEAVE)
        page.browser.evaluate(ENTER, path[0])
        promote(page, path[1], "text")
        page.browser.evaluate(ENTER, path[1])
    (document,) = reports(page.run())
    assert document["prompt"] == PROMPT and document["prompt_node"] == ":".join([*path, "3"])
    show(page)
    if page.browser.evaluate("(kind) => !document.querySelector(kind)", "[data-node-id='7']") and is_vue(page):
        pytest.skip("Nodes 2.0 of this front end draws no nodes of a subgraph that is open")
    assert "Likely a replay" in panel(page) and "\n---\n" not in panel(page)  # one panel

    # The host moves what lies beside the pointer: no mouse.
    page.browser.locator(".dejavu [data-index='6']").first.dispatch_event("click")
    page.browser.locator(".dejavu-card").get_by_role("button", name="Drop", exact=True).dispatch_event("click")
    page.browser.wait_for_timeout(500)
    assert negative(page) == ""
    page.browser.evaluate(LEAVE)
    (document,) = reports(page.run())
    assert document["prompt"] == DROPPED, "the text that is sampled is the one that was changed"

    for node in path:
        page.browser.evaluate(ENTER, node)
    for step in ("node.collapse()", "node.collapse()", "node.setSize([700, 800])"):
        change(page, step)
    show(page)
    assert DROPPED in panel(page) and "Nothing unusual" in panel(page)
    page.browser.evaluate(LEAVE)
    page.browser.evaluate(
        """() => { const {app} = window.comfyAPI.app, graph = app.rootGraph ?? app.graph.rootGraph;
            return app.loadGraphData(JSON.parse(JSON.stringify(graph.serialize()))) }"""
    )
    page.browser.wait_for_timeout(1000)
    for node in path:
        page.browser.evaluate(ENTER, node)
    show(page)
    assert "Nothing unusual" in panel(page), "a saved workflow brings the report back"
    page.browser.evaluate(LEAVE)


def test_a_report_waits_for_the_workflow_that_queued_it(opened: Page) -> None:
    page = opened
    page.browser.evaluate(
        """() => { const {api} = window.comfyAPI.api;
            window.over = new Promise((done) => api.addEventListener('execution_success', done, {once: true}));
            window.comfyAPI.app.app.queuePrompt(0, 1); }"""
    )
    page.load(THIRD)
    page.browser.evaluate("() => window.over")
    page.browser.wait_for_timeout(500)
    assert "Nothing was measured yet" in panel(page)
    page.browser.evaluate(
        """async (id) => { const {app} = window.comfyAPI.app, {workflow} = app.extensionManager;
            const first = workflow.openWorkflows.findLast((w) => w !== workflow.activeWorkflow && w.activeState?.id === id);
            await app.loadGraphData(first.activeState, true, true, first); }""",
        json.loads(FIRST.read_text(encoding="utf-8"))["id"],
    )
    page.browser.wait_for_timeout(1000)
    show(page)
    if page.browser.evaluate("(kind) => !document.querySelector(kind)", "[data-node-id='7']") and is_vue(page):
        pytest.skip("Nodes 2.0 of this front end draws no nodes of a subgraph that is open")
    assert "Likely a replay" in panel(page) and PROMPT in panel(page)


def test_nothing_of_ours_is_an_error_in_the_console(front_end: Page) -> None:
    assert [text for text in front_end.errors if "sd-dejavu" in text] == []
