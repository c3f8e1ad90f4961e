"""'Calibrate with these settings': from a verdict that lacks a calibration to one that has it, with one button."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_page import Page

VERDICT, MONITOR, BUTTON = "DejaVuVerdict", "DejaVuMonitor", "Calibrate with these settings"
SEEDS = itertools.count(1_000)
LEVELS = itertools.count()

# A workflow as users have it: stock nodes, a Monitor whose clip is open, a Verdict.
BUILD = """async ([seed, denoise, custom]) => {
    const {app} = window.comfyAPI.app, {LiteGraph} = window;
    app.graph.clear();
    let place = 0;
    const add = (type, widgets = {}) => {
        const node = LiteGraph.createNode(type);
        node.pos = [(place++) * 480, 0];
        app.graph.add(node);
        for (const [name, value] of Object.entries(widgets)) node.widgets.find((w) => w.name === name).value = value;
        return node;
    };
    const link = (from, type, to, input) => from.connect(
        from.outputs.findIndex((o) => o.type === type), to, to.inputs.findIndex((i) => i.name === input));
    const model = add('DejaVuDemoModel'), monitor = add('DejaVuMonitor', {explain: 'never'}), verdict = add('DejaVuVerdict');
    const positive = add('CLIPTextEncode', {text: 'a red boat beside the moon'}), negative = add('CLIPTextEncode', {text: ''});
    for (const text of [positive, negative]) link(model, 'CLIP', text, 'clip');
    link(model, 'MODEL', monitor, 'model');
    link(monitor, 'DEJAVU_MONITOR', verdict, 'monitor');
    if (custom) {
        const guider = add('CFGGuider', {cfg: 7.5}), noise = add('RandomNoise', {noise_seed: seed});
        const sampler = add('KSamplerSelect'), sigmas = add('BasicScheduler', {steps: 20, denoise});
        const all = add('SamplerCustomAdvanced');
        link(monitor, 'MODEL', guider, 'model');
        link(positive, 'CONDITIONING', guider, 'positive');
        link(negative, 'CONDITIONING', guider, 'negative');
        link(monitor, 'MODEL', sigmas, 'model');
        const parts = [[guider, 'GUIDER', 'guider'], [noise, 'NOISE', 'noise'], [sampler, 'SAMPLER', 'sampler']];
        for (const [from, type, to] of [...parts, [sigmas, 'SIGMAS', 'sigmas']]) link(from, type, all, to);
        link(model, 'LATENT', all, 'latent_image');
        link(all, 'LATENT', verdict, 'samples');
    } else {
        const all = add('KSampler', {seed, steps: 20, cfg: 7.5, denoise});
        all.widgets.find((w) => w.name === 'control_after_generate').value = 'randomize';
        link(monitor, 'MODEL', all, 'model');
        link(positive, 'CONDITIONING', all, 'positive');
        link(negative, 'CONDITIONING', all, 'negative');
        link(model, 'LATENT', all, 'latent_image');
        link(all, 'LATENT', verdict, 'samples');
    }
}"""


@pytest.fixture(scope="module", params=["classic", "Nodes 2.0"])
def renderer(request: pytest.FixtureRequest, front_end: Page) -> Iterator[Page]:
    front_end.set("Comfy.VueNodes.Enabled", request.param == "Nodes 2.0")
    front_end.set("Comfy.Minimap.Visible", False)
    front_end.reload()
    yield front_end
    front_end.set("Comfy.VueNodes.Enabled", False)


def build(page: Page, custom: bool = False) -> None:
    """Such a workflow, run once, that begins at a noise level for which no calibration was made yet."""
    page.browser.evaluate(BUILD, [next(SEEDS), 0.95 - 0.07 * next(LEVELS), custom])
    page.browser.wait_for_timeout(800)
    page.look_at(VERDICT)
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(500)
    page.look_at(VERDICT)


def graph(page: Page) -> dict[str, Any]:
    """What the user has in the graph: links and widgets, by the node's id."""
    script = """() => Object.fromEntries(window.comfyAPI.app.app.graph.nodes.map((n) => [n.id,
        {inputs: (n.inputs ?? []).map((i) => [i.name, i.link]), widgets: (n.widgets ?? []).filter((w) => w.name !== 'dejavu_report')
            .map((w) => [w.name, w.value])}]))"""
    found: dict[str, Any] = page.browser.evaluate(script)
    return found


def until(page: Page, text: str, timeout: float = 150.0) -> None:
    """Wait until a panel that can be seen says this."""
    script = "(text) => [...document.querySelectorAll('.dejavu')].some((e) => e.checkVisibility() && e.innerText.includes(text))"
    page.browser.wait_for_function(script, arg=text, timeout=1000 * timeout)


def keep(page: Page, request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    case = request.node.callspec.id.replace(" ", "-")
    page.screenshot(Path(os.environ.get("DEJAVU_ARTEFACTS", tmp_path)) / f"calibrate-{case}-{name}.png")


@pytest.mark.parametrize("custom", [False, True], ids=["KSampler", "SamplerCustomAdvanced"])
def test_one_button_brings_the_verdict(
    renderer: Page, request: pytest.FixtureRequest, tmp_path: Path, custom: bool
) -> None:
    page = renderer
    build(page, custom)
    panel = page.browser.locator(".dejavu").first
    assert "No verdict" in panel.locator(".dejavu-verdict").inner_text()
    keep(page, request, tmp_path, "before")
    page.browser.evaluate(
        """() => {
            const panel = document.querySelector('.dejavu'); window.seen = [];
            new MutationObserver(() => { const text = panel.querySelector('.dejavu-progress')?.innerText; if (text) seen.push(text); })
                .observe(panel, {childList: true, subtree: true, characterData: true});
        }"""
    )
    before = graph(page)
    panel.get_by_role("button", name=BUTTON).click()
    until(page, "Comparing with ordinary prompts")
    keep(page, request, tmp_path, "while")
    until(page, "100 ordinary prompts score")
    page.browser.wait_for_timeout(800)
    keep(page, request, tmp_path, "after")
    assert "flagged" in panel.locator(".dejavu-badge").first.inner_text().lower()
    assert panel.get_by_role("button", name=BUTTON).count() == 0
    assert graph(page) == before, "seed, clip and widgets of the user's graph are as they were"
    seen = page.browser.evaluate("() => window.seen")
    assert any("of 100." in text and "left" in text for text in seen)


def test_what_the_host_refuses_to_queue_is_told(renderer: Page) -> None:
    page = renderer
    build(page)
    page.browser.evaluate(
        """() => { const {app} = window.comfyAPI.app; const original = app.graphToPrompt.bind(app);
            window.putBack = () => { app.graphToPrompt = original };
            app.graphToPrompt = async () => { const made = await original();
                for (const node of Object.values(made.output)) if (node.class_type === 'CLIPTextEncode') delete node.inputs.clip;
                return made; } }"""
    )
    page.browser.locator(".dejavu").first.get_by_role("button", name=BUTTON).click()
    until(page, "Not queued", 10)
    page.browser.evaluate("() => window.putBack()")


def test_the_sidebar_offers_it_as_well_and_the_host_can_interrupt(renderer: Page) -> None:
    page = renderer
    build(page)
    page.browser.evaluate(
        "() => window.comfyAPI.app.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.dejavu')"
    )
    sidebar = page.browser.locator(".dejavu-sidebar")
    sidebar.locator(".dejavu-run").first.click()
    sidebar.get_by_role("button", name=BUTTON).click()
    sidebar.get_by_text("Comparing with ordinary prompts").first.wait_for(timeout=60_000)
    page.browser.evaluate("() => window.comfyAPI.api.api.interrupt()")
    sidebar.get_by_text("The run was ended early.").first.wait_for(timeout=60_000)
    assert sidebar.locator("progress").count() == 0
    page.browser.evaluate(
        "() => window.comfyAPI.app.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.dejavu')"
    )


def test_nothing_of_ours_is_an_error_in_the_console(renderer: Page) -> None:
    assert json.dumps([text for text in renderer.errors if "sd-dejavu" in text]) == "[]"
