"""Our accordion and panel in the real pages of Automatic1111 and Forge."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from webui_page import PANEL, open_webui
from webui_server import WebUIServer
from webui_watched import NAME

PROMPT = "a red fox, in the <b>snow</b>"


def artefact(name: str, tmp_path: Path) -> Path:
    folder = Path(os.environ.get("DEJAVU_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_panel_below_the_gallery(webui: WebUIServer, theme: str, tmp_path: Path) -> None:
    with open_webui(webui.url, theme) as page:
        # Switched off it costs nothing and shows nothing.
        assert page.browser.locator("#dejavu_alpha_txt2img").count() == 1
        page.enable()
        page.browser.locator("#dejavu_explain_txt2img input").first.click()
        page.browser.locator("#dejavu_explain_txt2img li", has_text="always").click()
        told = page.generate(PROMPT)
        assert "No verdict" in told and "calibrat" in told
        words = page.browser.locator(f"{PANEL} .dejavu-word").all_inner_texts()
        assert words == PROMPT.split()  # markup shows as text
        page.screenshot(artefact(f"{webui.kind.folder}-{theme}.png", tmp_path))
        page.word(1, "Drop")
        assert page.prompt == "a fox, in the <b>snow</b>"
        page.word(2, "Weaken")
        assert page.prompt == "a (fox:0.8), in the <b>snow</b>"
        page.word(1, "Restore")
        assert page.prompt == "a red (fox:0.8), in the <b>snow</b>"
        assert page.generate(page.prompt)
        assert [e for e in page.errors if "dejavu" in e] == []


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
        assert "No audit: there is no reference set" in found.inner_text()
        page.settings("Déjà Vu")
        text = page.browser.locator("#settings_dejavu").inner_text()
        assert "Write verdict, score and p-value" in text and "Default alpha" in text


def test_calibrating_from_the_page(webui: WebUIServer) -> None:
    with open_webui(webui.url) as page:
        page.enable()
        page.browser.locator("#dejavu_count_txt2img input").fill("20")
        page.browser.locator("#dejavu_calibrate_txt2img").click()
        page.browser.wait_for_function(
            "() => /20 ordinary prompts/.test(document.querySelector('#dejavu_told_txt2img').innerText)",
            timeout=300_000,
        )
        # Alpha .1 needs nine of them.
        page.alpha(0.1)
        told = page.generate("a red fox in the snow")
        assert "p = " in told or "p <= " in told, told
    shutil.rmtree(webui.home / "dejavu" / "calibration")
