"""The real page of a real host in headless Chromium; needs both, and says so where one is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "hosts"))

import miniature  # noqa: E402
from comfyui_page import Page, open_page  # noqa: E402
from comfyui_server import ComfyServer, find_installs, make_home, version  # noqa: E402
from page_summary import NEWEST, SHOWN, missing, newest_front_end, pages  # noqa: E402

PACK = HERE.parents[1]
WEB = HERE.parent / "web"
Start = Callable[[int, int, bool], Page]


@pytest.fixture(scope="module", params=pages())
def start_page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start_page(width, height, models=...)``: the page of every host, in every front end that belongs to it."""
    if missing():
        pytest.skip(f"not found: {', '.join(missing())}")
    known, _, front_end = request.param.partition(" with ")
    options: list[str] = []
    if front_end == NEWEST:
        folder = newest_front_end()
        if folder is None:
            pytest.skip("no newer front end was found: name its static folder in DEJAVU_COMFYUI_FRONTEND")
        options = ["--front-end-root", str(folder)]
    with ExitStack() as opened:

        def start(width: int, height: int, models: bool) -> Page:
            home = make_home(tmp_path_factory.mktemp("comfyui-page"), PACK)
            if models:
                miniature.write_all(home / "models")
            server = opened.enter_context(ComfyServer(find_installs()[known], home, options))
            page = opened.enter_context(open_page(server.url, width, height))
            page.shown_by = f"ComfyUI {version(server.install)} in front end {page.front_end()}"
            return page

        yield start


@pytest.fixture(scope="module")
def page(start_page: Start) -> Page:
    """ComfyUI's page with the pack loaded, and the miniature checkpoints."""
    return start_page(2700, 1300, True)


@pytest.fixture(scope="module")
def front_end(start_page: Start) -> Page:
    """The page for the overlay, which needs the bundled model only."""
    return start_page(1500, 1250, False)


@pytest.fixture(autouse=True)
def _shown_by(request: pytest.FixtureRequest) -> None:
    """The report of a page test tells what has shown the page."""
    page = next((request.getfixturevalue(name) for name in ("page", "front_end") if name in request.fixturenames), None)
    if page is not None:
        request.node.user_properties.append((SHOWN, page.shown_by))


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe, the accessibility checker, as the front end's tests pin it."""
    if missing():
        pytest.skip(f"not found: {', '.join(missing())}")
    if shutil.which("npm") is None:
        pytest.skip("npm was not found: accessibility was not checked")
    folder = tmp_path_factory.mktemp("axe")
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(WEB / name, folder / name)
    subprocess.run(["npm", "ci"], cwd=folder, check=True, capture_output=True, timeout=300)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
