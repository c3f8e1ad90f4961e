"""The README's picture of ComfyUI's real page: the first example workflow, queued on the bundled model.

python benchmarks/screenshots.py [--out docs]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "hosts"), str(ROOT / "tests" / "page")]

from comfyui_page import open_page  # noqa: E402
from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402

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


if __name__ == "__main__":
    main()
