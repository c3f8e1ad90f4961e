"""The overlay in the real page: both of the host's renderers, in the pinned front end and in a newer one."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_page import Page

from sd_dejavu.core.conditioning import split_words
from sd_dejavu.explain.leave_one_out import drop_word

WORKFLOWS = Path(__file__).parents[2] / "example_workflows"
FIRST = WORKFLOWS / "1 Try it on the bundled model.json"
PROMPT = "Study Of A Black Car By Moxgaen"
NASTY = '<img src=x onerror="window.hit=1"> שלום 🦄 embedding:<b>bold</b> Moxgaen'
TEXT, VERDICT, MONITOR = "DejaVuTextEncode", "DejaVuVerdict", "DejaVuMonitor"
SEEDS = itertools.count(1)
HALF = bytes(255 if place % 16 < 8 else 0 for place in range(256))  # a where-map of two parts


@pytest.fixture(scope="module", params=["classic", "Nodes 2.0"])
def renderer(request: pytest.FixtureRequest, front_end: Page) -> Iterator[Page]:
    front_end.set("Comfy.VueNodes.Enabled", request.param == "Nodes 2.0")
    front_end.set("Comfy.Minimap.Visible", False)
    front_end.reload()
    yield front_end
    front_end.set("Comfy.VueNodes.Enabled", False)


@pytest.fixture
def overlay(renderer: Page) -> Page:
    """The first example workflow with a seed of its own, so that nothing of it was kept by the host."""
    open_first(renderer)
    return renderer


def open_first(page: Page, workflow: Path = FIRST) -> None:
    close_sidebar(page)
    page.load(workflow)
    page.set_widget("KSampler", "seed", next(SEEDS))
    page.browser.wait_for_timeout(1000)
    page.look_at(VERDICT)


def stored(page: Page) -> dict[str, Any]:
    """The report that the Verdict node keeps."""
    script = "(kind) => window.comfyAPI.app.app.graph.nodes.find((n) => n.type === kind).properties.dejavu"
    return page.browser.evaluate(script, VERDICT)


def watch_live(page: Page) -> None:
    """From now on note what the node's panel shows, until ``seen_live`` asks."""
    page.browser.evaluate(
        """() => {
            const panel = document.querySelector('.dejavu'), seen = [];
            const observer = new MutationObserver(() => seen.push({
                points: panel.querySelectorAll('circle').length,
                verdict: panel.querySelector('.dejavu-verdict')?.textContent ?? '',
            }));
            observer.observe(panel, {childList: true, subtree: true, characterData: true});
            panel.seenLive = () => { observer.disconnect(); return seen; };
        }"""
    )


def seen_live(page: Page) -> list[dict[str, Any]]:
    return page.browser.evaluate("() => document.querySelector('.dejavu').seenLive()")


def word(page: Page, index: int) -> Any:
    return page.browser.locator(f".dejavu [data-index='{index}']").first


def press(page: Page, name: str) -> None:
    page.browser.locator(".dejavu-card").get_by_role("button", name=name, exact=True).click()
    page.browser.wait_for_timeout(300)


def open_sidebar(page: Page) -> Any:
    sidebar = page.browser.locator(".dejavu-sidebar")
    if not sidebar.count():
        toggle_sidebar(page)
    sidebar.wait_for()
    return sidebar


def close_sidebar(page: Page) -> None:
    if page.browser.locator(".dejavu-sidebar").count():
        toggle_sidebar(page)


def toggle_sidebar(page: Page) -> None:
    page.browser.evaluate(
        "() => window.comfyAPI.app.app.extensionManager.command.execute('Workspace.ToggleSidebarTab.dejavu')"
    )


def keep_screenshot(page: Page, request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    folder = Path(os.environ.get("DEJAVU_ARTEFACTS", tmp_path))
    case = request.node.callspec.id.replace(" ", "-")
    page.screenshot(folder / f"overlay-{case}-{name}.png")


def give_map(page: Page, values: bytes) -> None:
    """Let the Verdict node show its report with another where-map, of 16 x 16 values, for each image."""
    script = """([kind, values]) => {
        const node = window.comfyAPI.app.app.graph.nodes.find((n) => n.type === kind);
        for (const verdict of node.properties.dejavu.verdicts) verdict.where = {width: 16, height: 16, values};
        node.onConfigure({});
    }"""
    page.browser.evaluate(script, [VERDICT, base64.b64encode(values).decode("ascii")])
    page.browser.wait_for_timeout(300)


def resize(page: Page, size: list[float]) -> None:
    script = """([kind, size]) => { const {app} = window.comfyAPI.app;
        app.graph.nodes.find((n) => n.type === kind).setSize(size); app.canvas.setDirty(true, true); }"""
    page.browser.evaluate(script, [VERDICT, size])
    page.browser.wait_for_timeout(800)


def test_live_verdict_then_drop_undo_drop_and_queue_again(
    overlay: Page, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = overlay
    watch_live(page)
    assert page.run()["error"] is None
    seen = seen_live(page)
    assert len({s["points"] for s in seen}) > 2, "the curve did not grow"
    first = next(s for s in seen if s["points"])
    assert first["points"] < 10 and "Likely a replay" in first["verdict"]
    before = stored(page)["verdicts"][0]
    assert before["flagged"] and page.browser.locator(".dejavu-words").first.inner_text() == PROMPT

    word(page, 6).click()
    card = page.browser.locator(".dejavu-card")
    assert "the first step would score" in card.inner_text() and "Moxgaen counts most" in card.inner_text()
    rows = card.evaluate(
        "(e) => ['.dejavu-close', 'strong'].map((name) => e.querySelector(name).getBoundingClientRect().top)"
    )
    assert abs(rows[0] - rows[1]) < 12, "Close stands in the card's first row"
    keep_screenshot(page, request, tmp_path, "word")
    press(page, "Drop")
    dropped = drop_word(PROMPT, split_words(PROMPT)[6])
    assert page.widget(TEXT, "text") == dropped
    page.browser.keyboard.press("Control+z")
    page.browser.wait_for_timeout(2500)
    assert page.widget(TEXT, "text") == PROMPT
    assert stored(page)["verdicts"][0]["score"] == before["score"], "the verdict is no part of what is undone"

    page.look_at(VERDICT)
    word(page, 6).click()
    press(page, "Weaken ×0.8")
    assert page.widget(TEXT, "text") == "Study Of A Black Car By (Moxgaen:0.8)"
    press(page, "Restore")
    assert page.widget(TEXT, "text") == PROMPT
    press(page, "Drop")
    press(page, "Queue again")
    page.browser.wait_for_function(
        "([kind, prompt]) => window.comfyAPI.app.app.graph.nodes.find((n) => n.type === kind)"
        ".properties.dejavu?.prompt === prompt",
        arg=[VERDICT, dropped],
        timeout=120_000,
    )
    page.browser.wait_for_timeout(1500)
    after = stored(page)["verdicts"][0]
    assert after["score"] < before["score"] / 2 and not after["flagged"]
    assert "Nothing unusual" in page.browser.locator(".dejavu-verdict").first.inner_text()
    table = page.browser.locator(".dejavu .dejavu-compare").first.inner_text()
    assert "Before" in table and "Flagged" in table and "Not flagged" in table and f"{before['score']:.3g}" in table
    keep_screenshot(page, request, tmp_path, "after")


def test_keyboard_alone_reaches_a_word_and_its_actions(overlay: Page) -> None:
    page = overlay
    assert page.run()["error"] is None
    word(page, 0).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        page.browser.keyboard.press(key)
    assert "Black: counts" in page.browser.locator(".dejavu-readout").first.inner_text()
    page.browser.keyboard.press("Enter")
    assert page.browser.evaluate("() => document.activeElement.textContent") == "Drop"
    page.browser.keyboard.press("Escape")
    assert page.browser.evaluate("() => document.activeElement.dataset.index") == "3"
    page.browser.keyboard.press("Delete")
    page.browser.wait_for_timeout(300)
    assert stored(page) is not None, "the node is still there"


def test_a_stored_verdict_shows_without_running(overlay: Page) -> None:
    page = overlay
    result = page.run()
    assert result["error"] is None
    sentence = stored(page)["verdicts"][0]["sentence"]
    saved = json.loads(page.browser.evaluate("() => JSON.stringify(window.comfyAPI.app.app.graph.serialize())"))
    (image,) = [
        o["images"][0] for o in result["outputs"].values() if o and "images" in o and o["images"][0]["type"] == "output"
    ]
    query = "&".join(f"{name}={image[name]}" for name in ("filename", "subfolder", "type"))
    data = page.browser.request.get(f"{page.browser.url.split('?')[0].rstrip('/#')}/view?{query}").body()

    page.reload()
    page.browser.evaluate("(saved) => window.comfyAPI.app.app.loadGraphData(saved)", saved)
    page.browser.wait_for_timeout(1500)
    page.look_at(VERDICT)
    assert sentence in page.browser.locator(".dejavu-verdict").first.inner_text()

    page.reload()
    page.drop_file(data, "dropped.png")
    page.look_at(VERDICT)
    assert sentence in page.browser.locator(".dejavu-verdict").first.inner_text()
    assert page.browser.locator(".dejavu-words").first.inner_text() == PROMPT


def test_a_run_that_is_stopped_shows_its_verdict(renderer: Page) -> None:
    open_first(renderer, WORKFLOWS / "3 Stop when flagged.json")
    assert "Likely a replay" in renderer.run()["error"]
    renderer.browser.wait_for_timeout(500)
    renderer.look_at(VERDICT)
    assert "Likely a replay" in renderer.browser.locator(".dejavu-verdict").first.inner_text()
    assert stored(renderer)["flagged"] is True


def test_explain_names_words_before_sampling(overlay: Page) -> None:
    page = overlay
    page.browser.evaluate(
        """() => {
            const {app} = window.comfyAPI.app, node = window.LiteGraph.createNode('DejaVuExplain');
            const prompt = app.graph.nodes.find((n) => n.type === 'DejaVuTextEncode').widgets[0].value;
            app.graph.clear();
            const types = ['DejaVuDemoModel', 'DejaVuTextEncode', 'DejaVuTextEncode'];
            const kept = types.map((type) => window.LiteGraph.createNode(type));
            [...kept, node].forEach((n, i) => { n.pos = [i * 520, 0]; app.graph.add(n); });
            kept[1].widgets[0].value = prompt;
            const connect = (from, name, to, input) => from.connect(
                from.outputs.findIndex((o) => o.type === name), to, to.inputs.findIndex((i) => i.name === input));
            for (const text of kept.slice(1)) connect(kept[0], 'CLIP', text, 'clip');
            connect(kept[0], 'MODEL', node, 'model');
            connect(kept[1], 'CONDITIONING', node, 'positive');
            connect(kept[2], 'CONDITIONING', node, 'negative');
            connect(kept[0], 'LATENT', node, 'latent_image');
        }"""
    )
    page.set_widget("DejaVuExplain", "seed", next(SEEDS))
    page.look_at("DejaVuExplain", 0.8)
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(2500)  # the host looks for changes of the graph that it has not made itself
    assert "Likely a replay" in page.browser.locator(".dejavu-verdict").first.inner_text()
    assert page.widget(TEXT, "text") == PROMPT
    # Not by the mouse: the host may draw nodes that a script has added elsewhere than where they are.
    word(page, 6).dispatch_event("click")
    page.browser.wait_for_timeout(500)
    page.browser.locator(".dejavu-card").get_by_role("button", name="Drop", exact=True).dispatch_event("click")
    page.browser.wait_for_timeout(500)
    assert page.widget(TEXT, "text") == drop_word(PROMPT, split_words(PROMPT)[6])


def test_a_prompt_full_of_markup_shows_literally(overlay: Page) -> None:
    page = overlay
    page.set_widget(TEXT, "text", NASTY)
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(500)
    assert page.browser.locator(".dejavu-words").first.text_content() == NASTY
    assert page.browser.evaluate("() => window.hit ?? null") is None
    assert page.browser.locator(".dejavu-words img, .dejavu-words b").count() == 0


def test_images_of_a_batch_are_chosen_among(overlay: Page) -> None:
    page = overlay
    page.set_widget("DejaVuDemoModel", "batch_size", 2)
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(800)
    chooser = page.browser.locator(".dejavu-chooser select").first
    assert chooser.locator("option").count() == 2
    assert page.browser.locator(".dejavu canvas").count() == 0, "the bundled model's map is no more than noise"
    give_map(page, HALF)
    image = page.browser.locator(".dejavu-image img").first
    address = image.get_attribute("src")
    chooser.select_option(index=1)
    assert image.get_attribute("src") != address
    page.browser.wait_for_function(
        "() => document.querySelector('.dejavu-image img')?.naturalWidth > 0", timeout=10_000
    )
    assert "Where the prompt shaped this image" in page.browser.locator(".dejavu figcaption").last.inner_text()
    assert page.browser.locator(".dejavu canvas").first.evaluate("(e) => [e.width, e.height]") == [256, 256]


def test_a_resized_node_keeps_its_panel_inside(overlay: Page, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = overlay
    assert page.run()["error"] is None
    for width, height in ((400, 500), (900, 1000)):
        resize(page, [width, height])
        inside = page.browser.locator(".dejavu").first.evaluate(
            "(e) => ({width: e.clientWidth, widest: e.scrollWidth, chart: e.querySelector('.dejavu-chart').clientWidth})"
        )
        assert inside["widest"] <= inside["width"], "nothing is cut off at the side"
        assert inside["width"] - 90 < inside["chart"] <= inside["width"], "the chart fills the node"
        keep_screenshot(page, request, tmp_path, f"{width}")


def test_sidebar_lists_the_runs(overlay: Page, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = overlay
    assert page.run()["error"] is None
    sidebar = open_sidebar(page)
    runs = sidebar.locator(".dejavu-run")
    assert runs.count() >= 1 and PROMPT in runs.first.inner_text() and "Flagged" in runs.first.inner_text()
    page.browser.wait_for_function("() => document.querySelector('.dejavu-run img')?.naturalWidth > 0", timeout=10_000)
    sidebar.get_by_label("Filter by words").fill("no such word")
    assert runs.count() == 0
    sidebar.get_by_label("Filter by words").fill("moxgaen")
    assert runs.count() >= 1
    keep_screenshot(page, request, tmp_path, "sidebar")
    runs.first.click()
    assert "Likely a replay" in sidebar.locator(".dejavu-verdict").inner_text()
    sidebar.get_by_role("button", name="Back to the runs").click()
    close_sidebar(page)


def test_the_panel_fits_a_fresh_node_and_the_template(
    overlay: Page, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = overlay
    assert page.run()["error"] is None
    fresh = page.browser.evaluate(f"() => [...window.LiteGraph.createNode('{VERDICT}').size]")
    for size in (fresh, [440, 830]):
        resize(page, size)
        for told, map_of in (("without a map", bytes(256)), ("with a map", HALF)):
            give_map(page, map_of)
            found = page.browser.locator(".dejavu").first.evaluate("(e) => [e.scrollHeight, e.clientHeight]")
            assert found[0] <= found[1], f"a scrollbar at {size} {told}"
    keys = page.browser.locator(".dejavu-keys").first.evaluate("(e) => [...e.children].map((key) => key.offsetTop)")
    assert len(keys) >= 2 and len(set(keys)) == 1, "the legend of the curve is one line"
    assert page.browser.locator(".dejavu-legend").first.evaluate("(e) => e.offsetHeight") < 30
    keep_screenshot(page, request, tmp_path, "fits")


def test_the_verdict_is_in_sight_after_queue_again(overlay: Page) -> None:
    page = overlay
    assert page.run()["error"] is None
    resize(page, [440, 330])
    page.look_at(VERDICT)
    page.set_widget("KSampler", "seed", next(SEEDS))
    panel = page.browser.locator(".dejavu").first
    inside = """(e) => { const [panel, verdict] = [e, e.querySelector('.dejavu-verdict')].map((one) => one.getBoundingClientRect());
        return verdict.top >= panel.top - 1 && verdict.bottom <= panel.bottom + 1 }"""
    again = panel.locator(".dejavu-actions-slot").get_by_role("button", name="Queue again")
    again.scroll_into_view_if_needed()
    assert panel.evaluate("(e) => e.scrollTop") > 0 and panel.evaluate(inside), "it stays above what scrolls"
    score = stored(page)["verdicts"][0]["score"]
    again.click()
    page.browser.wait_for_function(
        "([kind, score]) => window.comfyAPI.app.app.graph.nodes.find((n) => n.type === kind)"
        ".properties.dejavu.verdicts[0].score !== score",
        arg=[VERDICT, score],
        timeout=60_000,
    )
    page.browser.wait_for_timeout(300)
    assert panel.evaluate("(e) => e.scrollTop") == 0 and panel.evaluate(inside)


def test_an_unflagged_prompt_looks_calm(overlay: Page, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = overlay
    levels = """() => [...document.querySelectorAll('.dejavu .dejavu-word')].map((e) => [
        Number(e.style.getPropertyValue('--dejavu-level')), Number(getComputedStyle(e).fontWeight), parseFloat(e.style.borderBottomWidth)])"""
    assert page.run()["error"] is None
    assert max(page.browser.evaluate(levels)) == [1, 700, 4]
    page.set_widget(TEXT, "text", "a red boat beside the moon")
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(500)
    assert not stored(page)["flagged"]
    found = page.browser.evaluate(levels)
    assert found and all(level <= 0.3 and weight <= 400 and line <= 1 for level, weight, line in found)
    assert page.browser.locator(".dejavu canvas").count() == 0
    keep_screenshot(page, request, tmp_path, "calm")


def test_runs_from_the_cache_have_a_card_and_two_stand_side_by_side(
    overlay: Page, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = overlay
    assert page.run()["error"] is None
    sidebar = open_sidebar(page)
    cards = sidebar.locator(".dejavu-run")
    before = cards.count()
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(500)
    assert cards.count() == before + 1
    assert "from the cache" in cards.nth(0).inner_text() and "from the cache" not in cards.nth(1).inner_text()
    assert "p ≤ 0.001 · score" in cards.nth(0).inner_text()
    page.set_widget(TEXT, "text", "Study Of A Black Car By")
    assert page.run()["error"] is None
    page.browser.wait_for_timeout(500)
    for place in (0, 1):
        sidebar.get_by_role("button", name="Compare", exact=True).nth(place).click()
    table = sidebar.locator(".dejavu-compare").inner_text()
    assert "Likely a replay" in table and "Nothing unusual" in table and PROMPT in table
    keep_screenshot(page, request, tmp_path, "compare")
    sidebar.get_by_role("button", name="End comparing").click()
    assert sidebar.locator(".dejavu-compare").count() == 0
    close_sidebar(page)


def test_a_wide_sidebar_keeps_its_list(overlay: Page, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = overlay
    assert page.run()["error"] is None
    sidebar = open_sidebar(page)
    sidebar.locator(".dejavu-run").first.click()
    assert not sidebar.locator(".dejavu-runs").is_visible(), "a narrow one shows the run alone"
    sidebar.evaluate("(e) => { e.style.width = '900px' }")
    assert sidebar.locator(".dejavu-runs").is_visible() and sidebar.locator(".dejavu-verdict").is_visible()
    assert not sidebar.get_by_role("button", name="Back to the runs").is_visible()
    keep_screenshot(page, request, tmp_path, "wide")
    sidebar.evaluate("(e) => { e.style.width = '' }")
    sidebar.get_by_role("button", name="Back to the runs").click()
    close_sidebar(page)


def test_what_works_on_this_machine_in_sidebar_and_settings(overlay: Page) -> None:
    page = overlay
    sidebar = open_sidebar(page)
    sidebar.get_by_role("button", name="Check this machine").click()
    lines = sidebar.locator(".dejavu-lines")
    lines.wait_for(timeout=60_000)
    told = lines.inner_text()
    assert "ComfyUI: " in told and "works torch: " in told and "calibrations: " in told
    page.browser.context.grant_permissions(["clipboard-read", "clipboard-write"])
    sidebar.get_by_role("button", name="Copy", exact=True).click()
    sidebar.get_by_text("Copied.").wait_for(timeout=5_000)
    assert page.browser.evaluate("() => navigator.clipboard.readText()") == lines.text_content()
    close_sidebar(page)
    page.browser.evaluate("() => window.comfyAPI.app.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.browser.get_by_role("dialog")
    dialog.get_by_text("Déjà Vu", exact=True).first.click()
    dialog.get_by_role("button", name="Check this machine").click()
    dialog.locator(".dejavu-lines").wait_for(timeout=60_000)
    assert "works torch: " in dialog.locator(".dejavu-lines").inner_text()
    page.browser.keyboard.press("Escape")


@pytest.fixture
def zoomed(overlay: Page) -> Iterator[Page]:
    """The page as at 200% zoom: half as many pixels wide and high."""
    size = overlay.browser.viewport_size
    assert size is not None
    overlay.browser.set_viewport_size({"width": size["width"] // 2, "height": size["height"] // 2})
    yield overlay
    overlay.browser.set_viewport_size(size)


def test_at_200_percent_nothing_of_the_sidebar_is_out_of_reach(
    zoomed: Page, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = zoomed
    assert page.run()["error"] is None
    assert page.run()["error"] is None
    sidebar = open_sidebar(page)
    sidebar.evaluate("(e) => { e.style.width = '240px' }")  # the host begins with less, to be drawn wider
    for place in (0, 1):
        sidebar.get_by_role("button", name="Compare", exact=True).nth(place).click()
    keep_screenshot(page, request, tmp_path, "200-percent")
    inside = """(e) => { const box = e.getBoundingClientRect();
        return [e.scrollWidth - e.clientWidth, ...[...e.querySelectorAll('button, input, select, td')].filter((one) => one.checkVisibility())
            .map((one) => one.getBoundingClientRect().right - box.right)] }"""
    assert max(sidebar.evaluate(inside)) <= 0.5
    sidebar.get_by_role("button", name="End comparing").click()
    sidebar.locator(".dejavu-run").first.focus()
    page.browser.keyboard.press("Enter")
    assert "replay" in sidebar.locator(".dejavu-verdict").inner_text()
    assert max(sidebar.evaluate(inside)) <= 0.5
    assert page.browser.evaluate("() => document.activeElement.textContent") == "Back to the runs"
    page.browser.keyboard.press("Enter")
    close_sidebar(page)


def test_settings_are_followed(overlay: Page) -> None:
    page = overlay
    page.set("DejaVu.Palette", "blue")
    assert page.browser.evaluate("() => document.body.dataset.dejavuPalette") == "blue"
    page.set("DejaVu.Palette", "vermilion")
    page.set("DejaVu.Alpha", 0.05)
    script = """() => { const node = window.LiteGraph.createNode('DejaVuMonitor');
        return node.widgets.find((w) => w.name === 'alpha').value }"""
    assert page.browser.evaluate(script) == 0.05
    page.load(FIRST)
    assert page.widget(MONITOR, "alpha") == 0.01, "a saved node keeps its own"
    page.set("DejaVu.Alpha", 0.01)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_axe_finds_no_serious_fault(
    overlay: Page, axe: str, theme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = overlay
    page.set("Comfy.ColorPalette", theme)
    assert page.run()["error"] is None
    page.look_at(VERDICT)
    word(page, 6).click()
    sidebar = open_sidebar(page)
    if sidebar.get_by_role("button", name="Compare", exact=True).count() > 1:
        for place in (0, 1):
            sidebar.get_by_role("button", name="Compare", exact=True).nth(place).click()
    sidebar.get_by_role("button", name="Check this machine").click()
    sidebar.locator(".dejavu-lines").wait_for(timeout=60_000)
    page.browser.wait_for_timeout(600)
    keep_screenshot(page, request, tmp_path, "theme")
    page.browser.evaluate(axe)
    found = page.browser.evaluate("() => window.axe.run({include: [['.dejavu'], ['.dejavu-sidebar']]})")
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    close_sidebar(page)
    page.set("Comfy.ColorPalette", "dark")
    assert found["passes"]
    assert serious == [], json.dumps([[v["id"], [n["html"] for n in v["nodes"]]] for v in serious], indent=1)


def test_nothing_of_ours_is_an_error_in_the_console(renderer: Page) -> None:
    assert [text for text in renderer.errors if "sd-dejavu" in text] == []
