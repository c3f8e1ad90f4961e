"""ComfyUI's page, driven as a user's browser would: load a workflow, queue it, look at the nodes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import chromium
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import TimeoutError

# The first node of the type ``kind``: those that are open come before those in subgraphs.
FIND = """[window.comfyAPI.app.app.graph, ...window.comfyAPI.app.app.graph.subgraphs.values()]
    .flatMap((graph) => graph.nodes).find((n) => n.type === kind)"""


class Page:
    def __init__(self, page: BrowserPage) -> None:
        self.browser = page
        self.errors: list[str] = []
        self.shown_by = ""
        page.on("console", lambda m: self.errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))

    def front_end(self) -> str:
        """The version that the page itself tells."""
        return str(self.browser.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__"))

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
        """Types of the graph's nodes that the page does not know, or has a fault to find with.

        A loader whose checkpoint is not on this machine has a fault in newer front ends; that is none of the workflow's.
        """
        return self.browser.evaluate(
            """() => window.comfyAPI.app.app.graph.nodes.filter((n) => n.constructor.nodeData
                ? n.has_errors && n.type !== 'CheckpointLoaderSimple'
                : !['MarkdownNote', 'Note'].includes(n.type)).map((n) => n.type)"""
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

    def set(self, setting: str, value: Any) -> None:
        """Change one of the host's settings."""
        script = "([id, value]) => window.comfyAPI.app.app.extensionManager.setting.set(id, value)"
        self.browser.evaluate(script, [setting, value])

    def reload(self) -> None:
        """Open the page anew, with the graph that it has kept or begins with."""
        self.browser.wait_for_timeout(500)  # settings are sent without waiting
        has_nodes = "() => window.comfyAPI.app.app.graph.nodes.length > 0"
        kept = self.browser.evaluate(has_nodes)
        self.browser.reload()
        self._ready()
        try:  # some seconds after all else is ready; it would take the place of what a test loads before
            self.browser.wait_for_function(has_nodes, timeout=60_000 if kept else 5_000)
        except TimeoutError:
            if kept:
                raise

    def look_at(self, kind: str, scale: float = 1.0) -> None:
        """Bring the first node of a type in the graph that is open into view, nothing in front of it."""
        for _ in range(3):
            self.browser.keyboard.press("Escape")
            self.browser.wait_for_timeout(150)
        self.browser.evaluate(
            """([kind, scale]) => {
                const {app} = window.comfyAPI.app, node = app.canvas.graph.nodes.find((n) => n.type === kind);
                app.canvas.ds.scale = scale;
                app.canvas.ds.offset[0] = 520 - node.pos[0];
                app.canvas.ds.offset[1] = 160 - node.pos[1];
                app.canvas.setDirty(true, true);
            }""",
            [kind, scale],
        )
        self.browser.wait_for_timeout(600)

    def widget(self, kind: str, name: str) -> Any:
        """The value of a widget of the first node of a type, in the graph or in one of its subgraphs."""
        script = f"([kind, name]) => {FIND}.widgets.find((w) => w.name === name).value"
        return self.browser.evaluate(script, [kind, name])

    def set_widget(self, kind: str, name: str, value: Any) -> None:
        script = f"([kind, name, value]) => {{ {FIND}.widgets.find((w) => w.name === name).value = value }}"
        self.browser.evaluate(script, [kind, name, value])

    def drop_file(self, content: bytes, name: str) -> None:
        """Let a file fall onto the page."""
        self.browser.evaluate(
            """([base64, name]) => {
                const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes], name, {type: 'image/png'}));
                document.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));
            }""",
            [base64.b64encode(content).decode("ascii"), name],
        )
        self.browser.wait_for_timeout(1500)

    def _ready(self) -> None:
        self.browser.wait_for_function("() => window.comfyAPI?.app?.app?.graph != null", timeout=60_000)
        self.browser.wait_for_timeout(2000)
        self.browser.keyboard.press("Escape")  # the template browser greets new users


@contextmanager
def open_page(url: str, width: int = 2700, height: int = 1300) -> Iterator[Page]:
    """The host's page, ready for use."""
    with chromium() as browser:
        opened = browser.new_page(viewport={"width": width, "height": height})
        page = Page(opened)
        opened.goto(url)
        page._ready()
        yield page
