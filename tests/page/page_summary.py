"""What the page tests need, and what the last lines of a test run say where it is missing. A plugin."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from comfyui_server import find_install


def newest_front_end() -> Path | None:
    """The static folder of a newer front end: $DEJAVU_COMFYUI_FRONTEND, or the package in the user's cache."""
    named = os.environ.get("DEJAVU_COMFYUI_FRONTEND")
    kept = Path.home() / ".cache" / "sd-dejavu" / "frontend" / "comfyui_frontend_package" / "static"
    folder = Path(named) if named else kept
    return folder if (folder / "index.html").is_file() else None


def missing() -> list[str]:
    found = {"ComfyUI": find_install(), "Chromium": shutil.which("chromium")}
    return [name for name, place in found.items() if place is None]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "page" in r.nodeid.split("/")]
    if not (absent := missing()) and newest_front_end() is None:
        absent = ["A newer front end"]
    if skipped and absent:
        message = f"{' and '.join(absent)} not found: {len(skipped)} page tests did not run".upper()
        terminalreporter.write_sep("=", message, red=True, bold=True)
