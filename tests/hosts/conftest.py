"""Tests on real hosts: they run where the host is installed, and say so loudly where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import miniature
import pytest
from comfyui_server import ComfyServer, find_install, make_home, version

HERE = Path(__file__).parent
PACK = HERE.parents[1]
_COMFYUI_TESTS: pytest.StashKey[set[str]] = pytest.StashKey()


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI install; every test that asks for it counts as a real-host test."""
    install = find_install()
    if install is None:
        pytest.skip("ComfyUI was not found")
    return install


@pytest.fixture(scope="session")
def comfy_home(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the miniature checkpoints and, if there is one in this checkout, the pack."""
    home = make_home(tmp_path_factory.mktemp("comfyui"), pack=PACK if (PACK / "__init__.py").is_file() else None)
    miniature.write_all(home / "models")
    return home


@pytest.fixture(scope="session")
def comfy(comfyui: Path, comfy_home: Path) -> Iterator[ComfyServer]:
    """One server for all tests that need no settings of their own."""
    with ComfyServer(comfyui, comfy_home) as server:
        yield server


@pytest.fixture
def start_comfy(comfyui: Path, comfy_home: Path, tmp_path: Path) -> Iterator[Callable[..., ComfyServer]]:
    """``start_comfy(custom_nodes=[...], options=[...], env={...}, pack=...)``: one more server, ended after the test.

    It has a base directory of its own with the same models; ``pack=None`` leaves this project's pack out.
    """
    linked = comfy_home / "custom_nodes" / "sd-dejavu"
    default = linked if linked.exists() else None
    number = count()
    with ExitStack() as servers:

        def start(*, custom_nodes: Any = (), options: Any = (), env: Any = None, pack: Any = default) -> ComfyServer:
            home = make_home(tmp_path / f"comfyui-{next(number)}", pack, custom_nodes, comfy_home / "models")
            return servers.enter_context(ComfyServer(comfyui, home, options, env))

        yield start


# ---------------------------------------------------------------------------------------------- pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: needs a real host, or is part of the harness that starts one")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.host)
    config.stash[_COMFYUI_TESTS] = {item.nodeid for item in ours if _needs_comfyui(item)}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tests = config.stash.get(_COMFYUI_TESTS, set())
    outcomes = {kind: _among(tests, terminalreporter, kind) for kind in ("passed", "failed", "error", "skipped")}
    install = find_install()
    if install is not None and (ran := outcomes["passed"] | outcomes["failed"] | outcomes["error"]):
        terminalreporter.write_sep("=", f"real ComfyUI {version(install)}: {_count(len(ran), 'test')} ran", green=True)
    elif install is None and (skipped := outcomes["skipped"]):
        message = f"ComfyUI was not found: {_count(len(skipped), 'real-host test')} did not run"
        terminalreporter.write_sep("=", message.upper(), red=True, bold=True)
        terminalreporter.write_line("Install it where $DEJAVU_COMFYUI says, or in ~/.cache/sd-dejavu/hosts/comfyui.")


def _needs_comfyui(item: pytest.Item) -> bool:
    """Asks for the install, or looks for it by itself and skips where it is absent."""
    return "comfyui" in getattr(item, "fixturenames", ()) or item.get_closest_marker("skipif") is not None


def _among(tests: set[str], reporter: pytest.TerminalReporter, kind: str) -> set[str]:
    return {report.nodeid for report in reporter.stats.get(kind, []) if report.nodeid in tests}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
