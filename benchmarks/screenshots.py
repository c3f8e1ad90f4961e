"""The documentation's images of ComfyUI's real page: the first example workflow, queued on the bundled model, and its
Verdict node with a word opened, in the dark and in the light theme.

python benchmarks/screenshots.py [--out docs]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "hosts"), str(ROOT / "tests" / "page")]

from comfyui_page import Page, open_page  # noqa: E402
from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402

VERDICT = "DejaVuVerdict"
WORKFLOW = ROOT / "example_workflows" / "1 Try it on the bundled model.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    install = find_install()
    if install is None:
        raise SystemExit("ComfyUI was not found: install it where $DEJAVU_COMFYUI says")
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder), ROOT)
        with ComfyServer(install, home) as server, open_page(server.url) as page:
            page.load(WORKFLOW)
            error = page.run()["error"]
            if error is not None:
                raise SystemExit(error)
            page.show_all()
            page.screenshot(arguments.out / "comfyui.png")
            page.look_at(VERDICT, 1.2)
            page.browser.locator(".dejavu-top").first.click()
            for theme in ("light", "dark"):
                page.set("Comfy.ColorPalette", theme)
                page.browser.wait_for_timeout(1000)
                _image_of_the_node(page, arguments.out / f"comfyui-overlay-{theme}.png")


def _image_of_the_node(page: Page, path: Path) -> None:
    """The panel with the node's title and sockets above it."""
    box = page.browser.locator(".dejavu").first.bounding_box()
    assert box is not None
    above, beside = 230, 24
    clip = {
        "x": box["x"] - beside,
        "y": box["y"] - above,
        "width": box["width"] + 2 * beside,
        "height": box["height"] + above + beside,
    }
    page.browser.screenshot(path=str(path), clip=clip)


if __name__ == "__main__":
    main()
