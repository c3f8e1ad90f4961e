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
import webui_server  # noqa: E402

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--everywhere", action="store_true", help="all tests on the older hosts and front ends too, not each once"
    )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Together(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What holds a server for long goes first, so that the many short files fill both processes to the end."""
    if not config.getoption("everywhere"):
        left_out = _done_on_the_newest(items)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(
        key=lambda item: (not set(WEBUIS) & set(re.findall(r"\w+", item.name)), item.path.parent.name == "core"),
    )


def _done_on_the_newest(items: list[pytest.Item]) -> list[pytest.Item]:
    """What does not run again on an older ComfyUI, in a front end that one pins, or on Automatic1111 beside Forge: all but the
    first parameters of each test, and what takes minutes. Tests marked ``everywhere`` run whole there too."""
    from page_summary import NEWEST, newest_front_end, pages  # a plugin, which pytest must be the first to import

    newest = [*COMFYUI, ""][-2 if COMFYUI else -1]
    front_ends = [page for page in pages() if page.endswith(NEWEST)] if newest_front_end() else pages()
    webuis = [kind.folder for kind in webui_server.KINDS.values() if webui_server.find_install(kind)][-1:]
    tried: set[tuple[str, str]] = set()
    left_out = []
    for item in items:
        given = re.findall(r"[^\[\]-]+", item.name.partition("[")[2])
        host = next((one for one in given if one.partition(" with ")[0] in (*COMFYUI, *WEBUIS)), newest)
        test = (item.nodeid.partition("[")[0], host)
        if host in (newest, *front_ends, *webuis) or item.get_closest_marker("everywhere"):
            continue
        if test in tried or item.get_closest_marker("newest"):
            left_out.append(item)
        tried.add(test)
    return left_out
