"""The real page of a real host in headless Chromium; needs both, and says so where one is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "hosts"))

import miniature  # noqa: E402
from comfyui_page import Page, open_page  # noqa: E402
from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402
from page_summary import missing, newest_front_end  # noqa: E402

PACK = HERE.parents[1]
WEB = HERE.parent / "web"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """ComfyUI's page with the pack loaded."""
    install = find_install()
    if install is None or missing():
        pytest.skip(f"not found: {', '.join(missing())}")
    home = make_home(tmp_path_factory.mktemp("comfyui-page"), PACK)
    miniature.write_all(home / "models")
    with ComfyServer(install, home) as server, open_page(server.url) as opened:
        yield opened


@pytest.fixture(scope="module", params=["pinned", "newest"])
def front_end(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page in the front end that the host pins, and in a newer one where that is installed."""
    install = find_install()
    if install is None or missing():
        pytest.skip(f"not found: {', '.join(missing())}")
    options: list[str] = []
    if request.param == "newest":
        folder = newest_front_end()
        if folder is None:
            pytest.skip("no newer front end was found: name its static folder in DEJAVU_COMFYUI_FRONTEND")
        options = ["--front-end-root", str(folder)]
    home = make_home(tmp_path_factory.mktemp("comfyui-overlay"), PACK)
    with ComfyServer(install, home, options) as server, open_page(server.url, 1500, 1250) as opened:
        yield opened


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe, the accessibility checker, as the front end's tests pin it."""
    if shutil.which("npm") is None:
        pytest.skip("npm was not found: accessibility was not checked")
    folder = tmp_path_factory.mktemp("axe")
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(WEB / name, folder / name)
    subprocess.run(["npm", "ci"], cwd=folder, check=True, capture_output=True, timeout=300)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
