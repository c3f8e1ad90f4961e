"""Our accordion and panel in the real pages of Automatic1111 and Forge."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webui_page import PANEL, open_webui
from webui_server import WebUIServer
from webui_watched import NAME, watched

from sd_dejavu.hosts.webui.controls import OPTIONS
from sd_dejavu.report.image import png_uri

PROMPT = "a red fox, in the <b>snow</b>"
_MAP = png_uri((np.eye(8)[..., None] * [250, 160, 10]).astype(np.uint8))
WHERE = (  # as the panel's template writes it
    '<button type="button" class="dejavu-button" data-dejavu="where" aria-pressed="false">Show where</button>'
    f'<figure class="dejavu-where" hidden><div><img class="dejavu-map" alt="" src="{_MAP}"></div></figure>'
)


def artefact(name: str, tmp_path: Path) -> Path:
    folder = Path(os.environ.get("DEJAVU_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.fixture
def uncalibrated(webui: WebUIServer) -> Iterator[WebUIServer]:
    """The host without calibrations, which it has none of afterwards either."""
    folder = webui.home / "dejavu" / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    yield webui
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_panel_below_the_gallery(uncalibrated: WebUIServer, theme: str, tmp_path: Path) -> None:
    webui = uncalibrated
    with open_webui(webui.url, theme) as page:
        # Switched off it costs nothing and shows nothing.
        assert page.browser.locator("#dejavu_alpha_txt2img").count() == 1
        page.enable()
        page.choose("explain_txt2img", "always")
        told = page.generate(PROMPT)
        assert "No verdict" in told and "calibrat" in told and "Click a word" in told and "Details" in told
        # It is said once: below the gallery there is nothing of ours but the panel.
        assert "Déjà Vu:" not in page.browser.locator("#html_log_txt2img").first.inner_text()
        words = page.browser.locator(f"{PANEL} .dejavu-word").all_inner_texts()
        assert words == PROMPT.split()  # markup shows as text
        page.screenshot(artefact(f"{webui.kind.folder}-{theme}.png", tmp_path))
        page.browser.locator(f"{PANEL} .dejavu-word").nth(1).click()
        card = page.browser.locator(f"{PANEL} .dejavu-card")
        assert card.get_attribute("aria-label") == "The word red"
        assert "Without it the first step would score" in card.inner_text()
        card.locator("button", has_text="Drop").click()
        assert page.prompt == "a fox, in the <b>snow</b>"
        page.browser.keyboard.press("Escape")
        assert card.count() == 0
        page.word(2, "Weaken")
        assert page.prompt == "a (fox:0.8), in the <b>snow</b>"
        page.word(1, "Restore")
        assert page.prompt == "a red (fox:0.8), in the <b>snow</b>"
        where = page.browser.locator(f"{PANEL} button[data-dejavu=where]").first
        if not where.count():  # the map of so little a model may tell no part of the image from another
            section = page.browser.locator(f"{PANEL} .dejavu-image").first
            section.evaluate("(section, html) => section.insertAdjacentHTML('beforeend', html)", WHERE)
        where.click()
        assert where.inner_text() == "Hide where" and where.get_attribute("aria-pressed") == "true"
        made, acted = (
            page.browser.locator(f"{PANEL} .dejavu-where img.dejavu-{kind}").first for kind in ("made", "map")
        )
        page.browser.wait_for_function("image => image.naturalWidth === 64", arg=made.element_handle())
        assert made.bounding_box() == acted.bounding_box()
        page.screenshot(artefact(f"{webui.kind.folder}-where-{theme}.png", tmp_path))
        where.click()
        assert not acted.is_visible()
        page.browser.evaluate(f"() => {{ document.querySelector('{PANEL} .dejavu-panel').dataset.old = 'yes' }}")
        page.browser.locator(f"{PANEL} button[data-dejavu=generate]").click()
        page.browser.wait_for_selector(f"{PANEL} .dejavu-panel:not([data-old])", timeout=180_000)
        assert [e for e in page.errors if "dejavu" in e] == []


def test_the_accordion_fits_one_screen(webui: WebUIServer, tmp_path: Path) -> None:
    with open_webui(webui.url) as page:
        page.enable()
        box = page.browser.locator("#dejavu_txt2img").first.bounding_box()
        assert box is not None and box["height"] < 400
        shown = [
            known.id for known in OPTIONS if page.browser.locator(f"#dejavu_{known.id}_txt2img").first.is_visible()
        ]
        assert shown == ["when_flagged", "explain"]
        page.screenshot(artefact(f"{webui.kind.folder}-accordion.png", tmp_path))
        page.more()
        assert page.browser.locator("#dejavu_alpha_txt2img").first.is_visible()
        told = page.browser.locator("#dejavu_txt2img").first.inner_text()
        assert "Measured against" in told and "When flagged" in told and "How to mitigate" in told
        page.screenshot(artefact(f"{webui.kind.folder}-accordion-more.png", tmp_path))
        # Where nothing could be compared, nothing is offered.
        page.browser.locator("#tabs > .tab-nav button", has_text=re.compile("img2img", re.IGNORECASE)).first.click()
        page.enable("img2img")
        page.browser.locator("#dejavu_told_img2img", has_text="no verdict: ordinary prompts").first.wait_for()
        assert not page.browser.locator("#dejavu_calibrate_img2img").first.is_visible()


def test_a_button_below_the_gallery_leads_to_a_verdict(uncalibrated: WebUIServer, tmp_path: Path) -> None:
    webui = uncalibrated
    with open_webui(webui.url) as page:
        page.enable()
        told = page.generate(PROMPT)
        assert "No verdict" in told and "Measures 100 ordinary prompts once (about" in told and "1 in 100" in told
        drawn = webui.get_json("/dejavu/reports")
        assert drawn[0]["flagged"] is None
        page.browser.locator(f"{PANEL} button[data-dejavu=calibrate]").first.click()
        page.browser.wait_for_function(
            "() => /ordinary prompts: [0-9]+ of 100/.test(document.querySelector('.dejavu-progress')?.innerText)",
            timeout=120_000,
        )
        badge = page.browser.locator(f"{PANEL} .dejavu-badge").first
        assert badge.inner_text() == "Calibrating"  # and not 'No verdict: calibrate', which is under way
        page.screenshot(artefact(f"{webui.kind.folder}-calibrating.png", tmp_path))
        page.browser.wait_for_selector(
            f"{PANEL} .dejavu-badge:is(.dejavu-flagged, .dejavu-not-flagged)", timeout=300_000
        )
        told = page.browser.locator(PANEL).first.inner_text()
        assert "Ready: from now on images of this checkpoint at 64 x 64 get a verdict." in told
        assert "of 100 ordinary prompts" in told and "No verdict" not in told
        page.browser.locator(".dejavu-progress").wait_for(state="detached")
        page.screenshot(artefact(f"{webui.kind.folder}-verdict.png", tmp_path))
        # The run that is on the page was judged, and not sampled again.
        (judged,) = webui.get_json("/dejavu/reports")
        (verdict,), (before,) = judged["verdicts"], drawn[0]["verdicts"]
        assert verdict["score"] == before["score"] and verdict["p_value"] >= 1 / 101
        assert page.browser.locator(f"{PANEL} button[data-dejavu=calibrate]").count() == 0
        assert "No verdict" not in page.generate("a blue boat")
        assert [e for e in page.errors if "dejavu" in e] == []


@pytest.mark.newest
def test_a_score_of_whole_runs_is_calibrated_for_with_whole_runs(uncalibrated: WebUIServer, tmp_path: Path) -> None:
    webui = uncalibrated
    with open_webui(webui.url) as page:
        page.enable()
        page.more()
        page.choose("score_txt2img", "all steps")
        told = page.generate(PROMPT)
        assert "Samples 100 ordinary prompts to the end once (about" in told
        page.browser.locator(f"{PANEL} button[data-dejavu=calibrate]").first.click()
        page.browser.wait_for_function(
            "() => /whole runs of ordinary prompts: [0-9]+ of 100/"
            ".test(document.querySelector('.dejavu-progress')?.innerText)",
            timeout=120_000,
        )
        page.browser.wait_for_selector(
            f"{PANEL} .dejavu-badge:is(.dejavu-flagged, .dejavu-not-flagged)", timeout=500_000
        )
        told = page.browser.locator(PANEL).first.inner_text()
        assert "Ready: " in told and "5 to 95" in told  # the curve's band
        page.screenshot(artefact(f"{webui.kind.folder}-whole-runs.png", tmp_path))
    (judged,) = webui.get_json("/dejavu/reports")
    assert judged["verdicts"][0]["score_kind"] == "all steps" and judged["verdicts"][0]["nulls"] == 100
    assert len(judged["band"]) == 6
    settings = {"explain": "never", "score": "first 5 steps", "alpha": 0.05}
    run = {"steps": 6, "cfg_scale": 7, "sampler_name": judged["setting"]["sampler"]}
    _, (again,) = watched(webui, PROMPT, settings, **run)
    assert again["flagged"] is not None, again["verdicts"][0]["why"]


def test_parameters_of_an_image_are_pasted_back(webui: WebUIServer) -> None:
    settings = {"when_flagged": "stop", "explain": "never", "alpha": 0.05, "perturb": "random-word", "insertions": 3}
    drawn = webui.txt2img(prompt=PROMPT, alwayson_scripts={NAME: {"args": [settings]}})
    with open_webui(webui.url) as page:
        shown = page.ours()
        assert shown["enabled"] is False and shown["when_flagged"] == "report" and shown["alpha"] == "0.01"
        page.paste(drawn.infotexts[0])
        shown = page.ours()
        assert shown == {"enabled": True, **{name: str(value) for name, value in settings.items()}} | {
            "baseline": "empty prompt",
            "mitigation": "optimise",
            "score": "first step",
            "references": "none",
            "calibrate_first": "0",
        }


def test_our_settings_and_the_audit_have_their_places(webui: WebUIServer) -> None:
    with open_webui(webui.url) as page:
        page.browser.locator("#tabs > .tab-nav button", has_text="Déjà Vu").click()
        page.browser.locator("#dejavu_lora_audit input").first.click()
        offered = [text.strip() for text in page.browser.locator("#dejavu_lora_audit li").all_inner_texts()]
        assert any(text.endswith("mini-lora") for text in offered), offered  # beside those that other tests have made
        page.browser.keyboard.press("Escape")
        page.browser.locator("#dejavu_begin_audit").click()
        found = page.browser.locator("#dejavu_found_audit p")
        found.wait_for(timeout=60_000)
        assert (
            found.inner_text()
            == "No audit: no reference set is chosen: build one of your images and captions in the tab Déjà Vu"
        )
        page.settings("Déjà Vu")
        text = page.browser.locator("#settings_dejavu").inner_text()
        assert "Write verdict, score and p-value" in text and "Default alpha" in text


def test_a_reference_set_is_built_in_the_tab(webui: WebUIServer, tmp_path: Path) -> None:
    source = tmp_path / "my images"
    source.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (90 * number, 40, 200 - 60 * number)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"a red fox, number {number}", encoding="utf-8")
    (source / "broken.png").write_bytes(b"no image")
    kept = webui.home / "dejavu" / "references"
    with open_webui(webui.url) as page:
        page.browser.locator("#tabs > .tab-nav button", has_text="Déjà Vu").click()
        tab = page.browser.locator("#tab_dejavu_audit")
        assert "false discovery" not in tab.inner_text() and "nulls" not in tab.inner_text()
        page.more("refset")
        built = page.browser.locator("#dejavu_built_refset p")

        def build(folder: str, name: str, told: str) -> None:
            page.fill("folder_refset", folder)
            page.fill("name_refset", name)
            page.browser.locator("#dejavu_begin_refset").click()
            page.browser.locator("#dejavu_built_refset p", has_text=told).wait_for(timeout=60_000)
            assert str(webui.home) not in built.inner_text() and str(tmp_path) not in built.inner_text()

        build("", "x", "No reference set: name the folder that the training images are in")
        build(str(source), "../x", "No reference set: a set cannot be kept as '../x'")
        build(str(source / "gone"), "foxes", "No reference set: there is no folder 'gone'")
        build(str(source), "foxes", "Ready: 3 different images, 3 with a caption. Kept as foxes.")
        assert "broken.png" in built.inner_text()
        numbered = tmp_path / "numbered"
        (numbered / "4_fox").mkdir(parents=True)
        for name in ("4_fox/a.png", "cover.png"):
            Image.new("RGB", (64, 64), (len(name) * 9, 40, 90)).save(numbered / name)
        build(str(numbered), "as kohya", "read as kohya's trainer reads it (guessed from its numbered folders)")
        assert "Left out: 1 image beside the numbered folders" in built.inner_text()
        page.fill("trainer_config_refset", str(numbered / "gone.toml"))
        build(str(numbered), "configured", "No reference set: gone.toml: cannot be read: No such file or directory")
        page.fill("trainer_config_refset", "")
        page.browser.wait_for_function("() => !document.querySelector('.dejavu-progress')", timeout=30_000)
        assert page.browser.locator("#dejavu_references_audit input").first.input_value() == "as kohya"
        page.screenshot(artefact(f"{webui.kind.folder}-tab.png", tmp_path))
        # It can be chosen in the accordion too, without the page being loaded again.
        page.browser.locator("#tabs > .tab-nav button", has_text="txt2img").first.click()
        page.enable()
        page.more()
        page.choose("references_txt2img", "foxes")
        assert page.ours()["references"] == "foxes"
        page.browser.locator("#tabs > .tab-nav button", has_text="Déjà Vu").click()
        page.more("machine")
        page.browser.locator("#dejavu_look").click()
        found = page.browser.locator("#dejavu_found_machine").first
        found.locator(".dejavu-findings").wait_for(timeout=60_000)
        assert "works on this machine" in found.inner_text() or "not work here" in found.inner_text()
        assert "torch: " in found.inner_text() and webui.kind.name in found.inner_text()
        assert str(webui.home) not in found.inner_text()
        page.screenshot(artefact(f"{webui.kind.folder}-machine.png", tmp_path))
    for file in (*kept.glob("foxes.*"), *kept.glob("as kohya.*")):
        file.unlink()


def test_calibrating_from_the_page(webui: WebUIServer) -> None:
    with open_webui(webui.url) as page:
        page.enable()
        page.more()
        page.fill("count_txt2img", 20)
        page.fill("alpha_txt2img", 0.1)  # which needs nine of them
        page.browser.locator("#dejavu_calibrate_txt2img").click()
        page.browser.wait_for_function(
            "() => /Ready: from now on .* at 64 x 64 .*20 ordinary prompts/"
            ".test(document.querySelector('#dejavu_told_txt2img').textContent)",
            timeout=300_000,
        )
        told = page.generate("a red fox in the snow")
        assert "p = " in told or "p ≤ " in told, told
    shutil.rmtree(webui.home / "dejavu" / "calibration")
