"""Tests on real hosts: they run where the host is installed, and say so loudly where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import comfyui_server
import memorising
import miniature
import pytest
import webui_onlooker
import webui_server
from comfyui_server import ComfyServer, make_home
from host_summary import COMFYUI as COMFYUI_HOST
from host_summary import NEEDS
from safetensors.torch import save_file
from webui_server import KINDS, WebUIServer

HERE = Path(__file__).parent
PACK = HERE.parents[1]
COMFYUI = comfyui_server.find_installs()


_last: dict[str, str] = {}  # of the tests of a webui's one server, by the host


def pytest_collection_finish(session: pytest.Session) -> None:
    _last.update({_kind_of(item): item.nodeid for item in session.items if "webui" in item.fixturenames})


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The webuis' servers end with their last test, not with the session: they hold gigabytes."""
    server = item.funcargs.get("webui")  # none where the test was skipped
    if server is not None and item.nodeid in _last.values():
        server.stop()


def _kind_of(item: pytest.Item) -> str:
    return str(item.callspec.params["webui_kind"])


@pytest.fixture(scope="session", params=list(COMFYUI) or ["not found"])
def comfyui(request: pytest.FixtureRequest) -> Path:
    """The folder of each ComfyUI install; every test that asks for it counts as a real-host test of its version."""
    if not COMFYUI:
        pytest.skip("ComfyUI was not found")
    return COMFYUI[request.param]


@pytest.fixture
def newest(comfyui: Path) -> bool:
    """Whether this is the newest of the installs: what takes minutes is done whole there, and in part on the others."""
    return comfyui == list(COMFYUI.values())[-1]


@pytest.fixture(scope="session")
def comfy_home(comfyui: Path, comfy_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with the miniature checkpoints and, if there is one in this checkout, the pack."""
    pack = PACK if (PACK / "__init__.py").is_file() else None
    return make_home(tmp_path_factory.mktemp("comfyui"), pack, models=comfy_models)


@pytest.fixture(scope="session")
def comfy_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature checkpoints, the same files for all versions of the host."""
    models = tmp_path_factory.mktemp("comfyui-models")
    miniature.write_all(models)
    return models


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


@pytest.fixture(scope="session")
def memorising_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See memorising.py; the file for all hosts of a test run, trained where there is one."""
    if not COMFYUI and not any(webui_server.find_install(kind) for kind in KINDS.values()):
        pytest.skip("no host was found")
    return memorising.write(tmp_path_factory.mktemp("memorising") / memorising.FILE)


@pytest.fixture(scope="session")
def webui_models(memorising_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models for Automatic1111 and Forge: the miniature, loaded at start, the memorising one, and a LoRA."""
    checkpoints = tmp_path_factory.mktemp("webui") / "models" / "Stable-diffusion"
    miniature.write_sd15_everywhere(checkpoints / miniature.SD15_EVERYWHERE)
    for file in (memorising_checkpoint, memorising_checkpoint.with_suffix(".yaml")):
        (checkpoints / file.name).symlink_to(file)
    loras = checkpoints.parent / "Lora"
    loras.mkdir()
    save_file(miniature.lora(3), loras / miniature.LORA)
    return checkpoints.parent


@pytest.fixture(scope="session")
def a1111() -> Path:
    """The folder of the Automatic1111 install."""
    return _webui_install(webui_server.A1111)


@pytest.fixture(scope="session")
def forge() -> Path:
    """The folder of the Forge install."""
    return _webui_install(webui_server.FORGE)


@pytest.fixture(scope="session", params=list(KINDS))
def webui_kind(request: pytest.FixtureRequest) -> webui_server.Kind:
    """Each of the two hosts; the tests of one run before those of the other."""
    kind: webui_server.Kind = KINDS[request.param]
    _webui_install(kind)
    return kind


@pytest.fixture(scope="session")
def webui(
    webui_kind: webui_server.Kind, webui_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUIServer]:
    """One server with a page for all tests of a host that need no settings of their own: our extension, an onlooker."""
    onlooker = webui_onlooker.write(tmp_path_factory.mktemp("onlooker"))
    home = webui_server.make_home(
        tmp_path_factory.mktemp(webui_kind.folder), _extension(), [onlooker], models=webui_models
    )
    with WebUIServer(webui_kind, _webui_install(webui_kind), home, _checkpoint(webui_models)) as server:
        yield server


@pytest.fixture
def start_webui(
    webui_kind: webui_server.Kind, webui_models: Path, tmp_path: Path
) -> Iterator[Callable[..., WebUIServer]]:
    """``start_webui(extensions=[...], options=[...], settings={...}, env={...}, page=...)``: one more server.

    Ended after the test, with a data directory of its own and the same models; without our extension, unless
    ``extension=`` names its folder; without the page, unless ``page=True``.
    """
    number = count()
    with ExitStack() as servers:

        def start(
            *, extension: Any = None, extensions: Any = (), settings: Any = None, options: Any = (), **more: Any
        ) -> WebUIServer:
            home = tmp_path / f"{webui_kind.folder}-{next(number)}"
            webui_server.make_home(home, extension, extensions, webui_models, settings)
            options = [*_checkpoint(webui_models), *options]
            server = WebUIServer(webui_kind, _webui_install(webui_kind), home, options, **({"page": False} | more))
            return servers.enter_context(server)

        yield start


@pytest.fixture
def with_options(webui: WebUIServer) -> Iterator[Callable[..., None]]:
    """Set the host's settings; afterwards they are as they were."""
    before: dict[str, Any] = {}

    def change(**settings: Any) -> None:
        known = webui.options()
        before.update({name: known[name] for name in settings})
        webui.set_options(**settings)

    yield change
    webui.set_options(**before)


def _webui_install(kind: webui_server.Kind) -> Path:
    install = webui_server.find_install(kind)
    if install is None:
        pytest.skip(f"{kind.name} was not found")
    return install


def _extension() -> Path | None:
    return PACK if (PACK / "scripts" / "dejavu.py").is_file() else None


def _checkpoint(models: Path) -> list[str]:
    return ["--ckpt", str(models / "Stable-diffusion" / miniature.SD15_EVERYWHERE)]


# ---------------------------------------------------------------------------------------------- pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: needs a real host, or is part of the harness that starts one")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in (item for item in items if HERE in item.path.parents):
        item.add_marker(pytest.mark.host)
        item.user_properties += [(NEEDS, host) for host in _needs(item)]


def _needs(item: pytest.Item) -> list[str]:
    """The hosts whose installs a test asks for; ComfyUI with its version."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    hosts = {name for name in KINDS if name in getattr(item, "fixturenames", ())} | {parameters.get("webui_kind")}
    comfyui = COMFYUI_HOST.format(parameters["comfyui"]) if "comfyui" in parameters else None
    return sorted(host for host in hosts | {comfyui} if host is not None)
