"""What the page tests need, and what the last lines of a test run say of them. A plugin."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from comfyui_server import find_install, find_installs
from host_summary import count

PINNED, NEWEST = "its own front end", "the newest front end"
SHOWN = "shown by"  # a property of a page test: the host's version and the front end's own


def newest_front_end() -> Path | None:
    """The static folder that $DEJAVU_COMFYUI_FRONTEND names, or of the newest version in the user's cache."""
    if named := os.environ.get("DEJAVU_COMFYUI_FRONTEND"):
        folders = [Path(named)]
    else:
        kept = (Path.home() / ".cache" / "sd-dejavu" / "frontends").glob("*/comfyui_frontend_package/static")
        folders = sorted(kept, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.parts[-3])])
    return next((folder for folder in reversed(folders) if (folder / "index.html").is_file()), None)


def pages() -> list[str]:
    """Every ComfyUI with the front end that it pins, and the newest one with the newest front end."""
    installs = list(find_installs()) or ["not found"]
    return [f"{install} with {PINNED}" for install in installs] + [f"{installs[-1]} with {NEWEST}"]


def missing() -> list[str]:
    found = {"ComfyUI": find_install(), "Chromium": shutil.which("chromium")}
    return [name for name, place in found.items() if place is None]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed", "error") for r in terminalreporter.stats.get(kind, [])]
    told = [(r.nodeid, *one) for r in reports for one in getattr(r, "user_properties", ())]  # not of files that fail
    ran = {(test, value) for test, name, value in told if name == SHOWN}
    for shown, number in sorted(Counter(value for _, value in ran).items()):
        terminalreporter.write_sep("=", f"real page of {shown}: {count(number, 'test')} ran", green=True)
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "page" in r.nodeid.split("/")]
    if not (absent := missing()) and newest_front_end() is None:
        absent = ["A newer front end"]
    if skipped and absent:
        message = f"{' and '.join(absent)} not found: {count(len(skipped), 'page test')} did not run".upper()
        terminalreporter.write_sep("=", message, red=True, bold=True)
