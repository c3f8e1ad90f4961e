"""The page of Automatic1111 or Forge, driven as a user's browser would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import chromium
from playwright.sync_api import Page as BrowserPage

from sd_dejavu.hosts.webui.controls import OPTIONS

PANEL = "#dejavu_panel_txt2img"


class WebUIPage:
    def __init__(self, page: BrowserPage) -> None:
        self.browser = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))

    def enable(self, tab: str = "txt2img") -> None:
        """Switch our accordion on; it opens."""
        self.browser.locator(f"#dejavu_{tab} .input-accordion-checkbox").check()
        self.browser.wait_for_timeout(500)
        if not self.browser.locator(f"#dejavu_told_{tab}").first.is_visible():
            self.browser.locator(f"#dejavu_{tab} .label-wrap .icon").first.click()
        self.browser.locator(f"#dejavu_told_{tab}").first.wait_for()

    def more(self, place: str = "more_txt2img") -> None:
        """Open what is folded away in one of our places, if it is not open yet."""
        label = self.browser.locator(f"#dejavu_{place} .label-wrap").first
        if "open" not in (label.get_attribute("class") or "").split():
            label.click()
        self.browser.wait_for_timeout(500)

    def choose(self, name: str, value: str) -> None:
        """One of a dropdown of ours."""
        self.browser.locator(f"#dejavu_{name} input").first.click()
        self.browser.locator(f"#dejavu_{name} li", has_text=value).first.click()

    def fill(self, name: str, value: object) -> None:
        box = self.browser.locator(f"#dejavu_{name} :is(input, textarea)").first
        box.fill(str(value))
        box.press("Tab")

    def ours(self) -> dict[str, Any]:
        """What our accordion's controls show."""
        shown: dict[str, Any] = self.browser.evaluate(
            """(options) => Object.fromEntries(options.map(([name, id]) => {
                const box = document.querySelector(`#dejavu_${id}_txt2img input`);
                return [name, box?.value];
            }))""",
            [[known.name, known.id] for known in OPTIONS],
        )
        return {"enabled": self.browser.locator("#dejavu_txt2img .input-accordion-checkbox").is_checked(), **shown}

    def paste(self, parameters: str) -> None:
        """An image's parameters through the prompt, as a user does."""
        self.browser.locator("#txt2img_prompt textarea").first.fill(parameters)
        self.browser.locator("#paste").first.click()
        self.browser.wait_for_timeout(3000)

    def settings(self, section: str) -> None:
        """A section of the settings page."""
        self.browser.locator("#tabs > .tab-nav button", has_text="Settings").first.click()
        self.browser.locator("#settings > .tab-nav button", has_text=section).first.click()
        self.browser.wait_for_timeout(500)

    def number(self, name: str, value: int) -> None:
        box = self.browser.locator(f"#txt2img_{name} input[type=number]").first
        box.fill(str(value))
        box.press("Tab")

    @property
    def prompt(self) -> str:
        return self.browser.locator("#txt2img_prompt textarea").first.input_value()

    def generate(self, prompt: str, timeout: float = 180.0) -> str:
        """Draw an image; the text of our panel below it."""
        self.browser.locator("#txt2img_prompt textarea").first.fill(prompt)
        self.browser.evaluate(f"() => {{ document.querySelector('{PANEL} .dejavu-panel')?.remove() }}")
        self.browser.locator("#txt2img_generate").click()
        self.browser.wait_for_selector(f"{PANEL} .dejavu-panel", timeout=timeout * 1000)
        return self.browser.locator(PANEL).first.inner_text()

    def word(self, number: int, action: str) -> None:
        """Open a word of the panel and choose what to do with it."""
        self.browser.locator(f"{PANEL} .dejavu-word").nth(number).click()
        self.browser.locator(f"{PANEL} .dejavu-card button", has_text=action).click()
        self.browser.wait_for_timeout(300)

    def screenshot(self, path: Path) -> None:
        self.browser.screenshot(path=str(path), full_page=True)


@contextmanager
def open_webui(url: str, theme: str = "light") -> Iterator[WebUIPage]:
    """The host's page, ready for use, set to small images in few steps."""
    with chromium() as browser:
        opened = browser.new_page(viewport={"width": 1500, "height": 1300})
        opened.set_default_timeout(15_000)
        page = WebUIPage(opened)
        opened.goto(f"{url}/?__theme={theme}")
        opened.wait_for_selector("#txt2img_prompt textarea", timeout=120_000)
        opened.wait_for_timeout(3000)
        for name, value in (("width", 64), ("height", 64), ("steps", 6)):
            page.number(name, value)
        yield page
