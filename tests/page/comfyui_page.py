"""ComfyUI's page, driven as a user's browser would: load a workflow, queue it, look at the nodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import sync_playwright

_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


class Page:
    def __init__(self, page: BrowserPage) -> None:
        self.browser = page
        self.errors: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def load(self, workflow: Path) -> None:
        """Open a workflow file."""
        document = json.loads(workflow.read_text(encoding="utf-8"))
        self.browser.evaluate("(workflow) => window.comfyAPI.app.app.loadGraphData(workflow)", document)
        self.browser.wait_for_timeout(500)

    def run(self, timeout: float = 120.0) -> dict[str, Any]:
        """Queue the graph and wait for its end: {'outputs': {node id: output}, 'error': the message or None}."""
        return self.browser.evaluate(
            """async (timeout) => {
                const {api} = window.comfyAPI.api, {app} = window.comfyAPI.app;
                const outputs = {};
                return await new Promise((resolve) => {
                    const timer = setTimeout(() => resolve({outputs, error: 'timeout'}), timeout);
                    const end = (error) => { clearTimeout(timer); resolve({outputs, error}); };
                    api.addEventListener('executed', (e) => { outputs[e.detail.node] = e.detail.output; });
                    api.addEventListener('execution_success', () => setTimeout(() => end(null), 300), {once: true});
                    api.addEventListener('execution_error', (e) => end(e.detail.exception_message), {once: true});
                    app.queuePrompt(0, 1);
                });
            }""",
            timeout * 1000,
        )

    def missing_nodes(self) -> list[str]:
        """Types of the graph's nodes that the page does not know."""
        return self.browser.evaluate(
            "() => window.comfyAPI.app.app.graph.nodes.filter((n) => n.has_errors || !n.constructor.nodeData"
            " && !['MarkdownNote', 'Note'].includes(n.type)).map((n) => n.type)"
        )

    def show_all(self) -> None:
        """Bring the whole graph into view, nothing in front of it."""
        for _ in range(3):  # dialogs of earlier workflows: a missing checkpoint, a run that was ended
            self.browser.keyboard.press("Escape")
            self.browser.wait_for_timeout(200)
        self.browser.evaluate(
            "() => window.comfyAPI.app.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)"
        )
        self.browser.evaluate("() => window.comfyAPI.app.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.browser.wait_for_timeout(2500)

    def screenshot(self, path: Path) -> None:
        self.browser.screenshot(path=str(path))


@contextmanager
def open_page(url: str, width: int = 2700, height: int = 1300) -> Iterator[Page]:
    """The host's page, ready for use."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS)
        try:
            opened = browser.new_page(viewport={"width": width, "height": height})
            page = Page(opened)
            opened.goto(url)
            opened.wait_for_function("() => window.comfyAPI?.app?.app?.graph != null", timeout=60_000)
            opened.wait_for_timeout(2000)
            opened.keyboard.press("Escape")  # the template browser greets new users
            yield page
        finally:
            browser.close()
