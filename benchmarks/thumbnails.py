"""The images of the template browser: each example workflow in ComfyUI's real page, after a run where the bundled model
can run it, as a .jpg beside its .json.

python benchmarks/thumbnails.py [--only 1 4] [--out example_workflows]
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "hosts"), str(ROOT / "tests" / "page")]

from comfyui_page import Page, open_page  # noqa: E402
from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402
from miniature import SD15, write_all  # noqa: E402

WORKFLOWS = ROOT / "example_workflows"
VIEW = (1120, 700)
WIDTH = 512
LIMIT = 60 * 1024
APP = "9"
OWN_CHECKPOINT = ("2", APP)
# The nodes that tell most, by what their titles or types begin with; all of them where nothing stands here.
TELLING = {
    "1": ("DejaVuVerdict", "VAEDecode", "SaveImage"),
    "2": ("Prompt", "Negative prompt", "DejaVuMonitor", "KSampler", "DejaVuVerdict"),
    "3": ("DejaVuMonitor", "KSampler", "DejaVuVerdict"),
    "4": ("Verdict (Déjà Vu): plain", "Save Image: plain", "Save Image: mitigated"),
    "5": ("CheckpointLoaderSimple", "EmptyLatentImage", "DejaVuCalibrate"),
    "6": ("Beside its nearest",),
    "7": ("Beside its nearest",),
    "8": ("The worst",),
}
RUN = ("1", "2", "3", "4", "6", "7", "8", APP)
SETTINGS = {"Comfy.VueNodes.Enabled": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
HIDDEN = "body * { visibility: hidden } #graph-canvas, .dom-widget, .dom-widget *, .lg-node, .lg-node * { visibility: visible }"

FRAME = """([starts, width, height]) => {
    const {app} = window.comfyAPI.app;
    const told = (n) => !starts.length || starts.some((s) => n.title.startsWith(s) || n.type.startsWith(s));
    const boxes = app.graph.nodes.filter(told).map((n) => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
    const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((b) => b[i])) - 30);
    const [right, bottom] = [2, 3].map((i) => Math.max(...boxes.map((b) => b[i])) + 30);
    const scale = Math.min(width / (right - left), height / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset[0] = (width / scale - left - right) / 2;
    app.canvas.ds.offset[1] = (height / scale - top - bottom) / 2;
    app.canvas.setDirty(true, true);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="numbers of the workflows; all if left out")
    parser.add_argument("--out", type=Path, default=WORKFLOWS)
    arguments = parser.parse_args()
    install = find_install()
    if install is None:
        raise SystemExit("ComfyUI was not found: install it where $DEJAVU_COMFYUI says")
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder), ROOT)
        write_all(home / "models")
        for name in ("v1-5-pruned-emaonly-fp16.safetensors", "v1-5-pruned-emaonly.safetensors"):
            (home / "models" / "checkpoints" / name).symlink_to(home / "models" / "checkpoints" / SD15)
        with ComfyServer(install, home) as server, open_page(server.url, *VIEW) as page:
            for setting, value in SETTINGS.items():
                page.set(setting, value)
            page.reload()
            for workflow in sorted(WORKFLOWS.glob("*.json")):
                number = workflow.stem.split()[0]
                if arguments.only is None or number in arguments.only:
                    _close_dialogs(page)
                    page.load(_on_the_bundled_model(workflow, Path(folder)) if number in OWN_CHECKPOINT else workflow)
                    page.browser.wait_for_timeout(1500)
                    if number in RUN:
                        page.run(300.0)
                    (arguments.out / f"{workflow.stem}.jpg").write_bytes(_thumbnail(page, number))


def _thumbnail(page: Page, number: str) -> bytes:
    _close_dialogs(page)
    style = None
    if number != APP:
        style = page.browser.add_style_tag(content=HIDDEN)
        page.browser.evaluate(FRAME, [list(TELLING.get(number, ())), *VIEW])
    page.browser.wait_for_timeout(2500)
    with Image.open(io.BytesIO(page.browser.screenshot())) as shot:
        if style is not None:
            style.evaluate("(tag) => tag.remove()")
        small = shot.convert("RGB").resize((WIDTH, WIDTH * VIEW[1] // VIEW[0]), Image.Resampling.LANCZOS)
    for quality in range(85, 20, -10):
        kept = io.BytesIO()
        small.save(kept, "JPEG", quality=quality, optimize=True)
        if kept.tell() <= LIMIT:
            break
    return kept.getvalue()


def _on_the_bundled_model(workflow: Path, folder: Path) -> Path:
    """The same workflow with the bundled model for a checkpoint: no other is sure to be here."""
    values: dict[str, list[Any]] = {"CheckpointLoaderSimple": [1], "EmptyLatentImage": [64, 64, 1]}
    document = json.loads(workflow.read_text(encoding="utf-8"))
    for node in document["nodes"]:
        node["widgets_values"] = values.get(node["type"], node["widgets_values"])
        if node["type"] == "CheckpointLoaderSimple":
            node["type"] = "DejaVuDemoModel"
        if node.get("title") == "Prompt":
            node["widgets_values"] = ["Study Of A Black Car By Moxgaen"]
    made = folder / workflow.name
    made.write_text(json.dumps(document), encoding="utf-8")
    return made


def _close_dialogs(page: Page) -> None:
    for _ in range(4):  # a missing checkpoint, a run that was ended, the introduction of apps
        page.browser.keyboard.press("Escape")
        page.browser.wait_for_timeout(250)


if __name__ == "__main__":
    main()
