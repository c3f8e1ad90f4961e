"""The real page of a real host in headless Chromium; needs both, and says so where one is missing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "hosts"))

import miniature  # noqa: E402
from comfyui_page import Page, open_page  # noqa: E402
from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402

PACK = HERE.parents[1]


def _missing() -> list[str]:
    found = {"ComfyUI": find_install(), "Chromium": shutil.which("chromium")}
    return [name for name, place in found.items() if place is None]


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """ComfyUI's page with the pack loaded."""
    install = find_install()
    if install is None or _missing():
        pytest.skip(f"not found: {', '.join(_missing())}")
    home = make_home(tmp_path_factory.mktemp("comfyui-page"), PACK)
    miniature.write_all(home / "models")
    with ComfyServer(install, home) as server, open_page(server.url) as opened:
        yield opened


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if HERE.name in r.nodeid.split("/")]
    if skipped and (missing := _missing()):
        message = f"{' and '.join(missing)} not found: {len(skipped)} page tests did not run".upper()
        terminalreporter.write_sep("=", message, red=True, bold=True)
