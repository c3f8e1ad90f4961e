"""The documentation's images of our accordion and panel in the real pages of Automatic1111 and Forge.

The memorising miniature of the tests is calibrated, its first prompt drawn, and the page shown from the prompt to the
panel below the gallery. Needs the hosts (see docs/developers.md) and Chromium.

    python benchmarks/webui_screenshots.py [--out docs]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "hosts"), str(ROOT / "tests" / "page")]

import memorising  # noqa: E402
from webui_page import PANEL, open_webui  # noqa: E402
from webui_server import KINDS, WebUIServer, find_install, make_home  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    for kind in KINDS.values():
        install = find_install(kind)
        if install is None:
            raise SystemExit(f"{kind.name} was not found: install it where ${kind.variable} says")
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = memorising.write(Path(folder) / "models" / "Stable-diffusion" / memorising.FILE)
            make_home(Path(folder) / "data", ROOT, models=checkpoint.parents[1])
            with WebUIServer(kind, install, Path(folder) / "data") as server, open_webui(server.url, "dark") as page:
                server.post_json("/dejavu/calibrate", {"count": 99, "width": 64, "height": 64, "steps": 20}, 900)
                page.enable()
                page.alpha(0.03)  # one ordinary prompt in 100 scores above what this miniature memorises
                page.generate(memorising.MEMORISED[1].text)
                page.browser.locator(PANEL).first.scroll_into_view_if_needed()
                page.browser.wait_for_timeout(500)
                page.browser.screenshot(path=str(arguments.out / f"{kind.folder}.png"))


if __name__ == "__main__":
    main()
