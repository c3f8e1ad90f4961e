"""Tests run in two processes side by side, each on one core: what shares a server or a module's fixtures stays together."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch; processes that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

USER = TemporaryDirectory()
os.environ["SD_DEJAVU_HOME"] = USER.name  # of what the user keeps nothing is read, and nothing is written there

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("core", "hosts", "page")]
import comfyui_server  # noqa: E402

COMFYUI = comfyui_server.find_installs()
pytest_plugins = ("host_summary", "page_summary")

WEBUIS = ("a1111", "forge")  # parameters for whose sake one server is started


class Together(LoadScopeScheduling):
    """One file in one process, and on ComfyUI one file on one version; all tests of Automatic1111 in one, and Forge's."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, name = nodeid.partition("::")
        parameters = re.findall(r"[^\[\]-]+", name.partition("[")[2])
        webui = next((kind for kind in WEBUIS if kind in parameters), None)
        comfyui = next((given for given in parameters if given.partition(" with ")[0] in COMFYUI), "")
        return webui or f"{file} {comfyui}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Together(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What holds a server for long goes first, so that the many short files fill both processes to the end."""
    older = pytest.mark.skip(reason="takes minutes, and is tried on the newest ComfyUI")
    for item in items:
        given = set(re.findall(r"[^\[\]-]+", item.name.partition("[")[2]))
        if item.get_closest_marker("newest") and given & set(list(COMFYUI)[:-1]):
            item.add_marker(older)
    items.sort(key=lambda item: (not set(WEBUIS) & set(re.findall(r"\w+", item.name)), item.path.parent.name == "core"))
