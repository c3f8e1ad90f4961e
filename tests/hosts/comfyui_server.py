"""A real ComfyUI in a process of its own, on the CPU, with all of its folders below one of the test's.

Needs the standard library only, so that it runs in the project's environment while the host has its own.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

import host_process
from host_process import HOST, HostProcess, RequestRefused

VARIABLE, PROGRAM = "DEJAVU_COMFYUI", "main.py"
Graph = dict[str, dict[str, Any]]
_FOLDERS = ("models", "input", "output", "temp", "user", "custom_nodes")


class PromptRejected(RequestRefused):
    """The host did not take a graph."""


class ExecutionFailed(RuntimeError):
    """A run ended in an error or was interrupted; ``entry`` is its place in the history."""

    def __init__(self, entry: dict[str, Any]) -> None:
        super().__init__(failure(entry) or "failed without a message")
        self.entry = entry


def find_installs() -> dict[str, Path]:
    """Every ComfyUI with its environment that $DEJAVU_COMFYUI names, or whose folder in the user's cache begins so.

    By version, the oldest first; a second one of the same version has its folder's name added.
    """
    installs: dict[str, Path] = {}
    for install in host_process.find_installs("comfyui*", VARIABLE, PROGRAM):
        known = number(install)
        installs[f"{known} {install.name}" if known in installs else known] = install
    return dict(sorted(installs.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])]))


def find_install() -> Path | None:
    """The newest of them; None if there is none."""
    return next(reversed(find_installs().values()), None)


def number(install: Path) -> str:
    return host_process.number(install, "comfyui_version.py", r'__version__ = "(.+?)"')


def version(install: Path) -> str:
    return host_process.version(install, number(install))


def make_home(
    home: Path, pack: Path | None = None, custom_nodes: Sequence[Path] = (), models: Path | None = None
) -> Path:
    """A base directory for the host; the pack is linked as 'sd-dejavu', other packs under their own names.

    ``models`` is linked instead of an empty folder. Returns ``home``.
    """
    home.mkdir(parents=True, exist_ok=True)
    if models is not None:
        host_process.link({"models": models}, home)
    for name in _FOLDERS:
        (home / name).mkdir(exist_ok=True)
    packs = {folder.name: folder for folder in custom_nodes} | ({"sd-dejavu": pack} if pack else {})
    host_process.link(packs, home / "custom_nodes")
    return home


def failure(entry: dict[str, Any]) -> str | None:
    """What went wrong in a run, in a sentence; None if nothing did."""
    status = entry.get("status") or {}
    for kind, data in status.get("messages", []):
        if kind == "execution_interrupted":
            return f"interrupted in node {data['node_id']} ({data['node_type']})"
        if kind == "execution_error":
            where = f"{data['exception_type']} in node {data['node_id']} ({data['node_type']})"
            return f"{where}: {data['exception_message']}\n{''.join(data['traceback'])}"
    return None if status.get("status_str") == "success" else f"ended with status {status}"


class ComfyServer(HostProcess):
    name = "ComfyUI"

    def _command(self) -> list[str]:
        command = ["main.py", "--cpu", "--listen", HOST, "--port", str(self._port)]
        command += ["--base-directory", str(self.home), "--database-url", f"sqlite:///{self.home / 'user' / 'host.db'}"]
        return [*command, "--disable-auto-launch", "--disable-api-nodes"]

    def _ready(self) -> bool:
        self.get("/system_stats")
        return True

    def import_failures(self) -> list[str]:
        """Folders of custom nodes that the host could not import: it only says so in its log and goes on."""
        return re.findall(r"\(IMPORT FAILED\): (.+)", self.log())

    # ------------------------------------------------------------------------------------------ runs

    def post(
        self,
        graph: Graph,
        client_id: str | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        extra_data: dict[str, Any] | None = None,
    ) -> str:
        """Queue a graph and return its prompt id; PromptRejected if the host finds it invalid."""
        extra = dict(extra_data or {})
        if extra_pnginfo is not None:
            extra["extra_pnginfo"] = extra_pnginfo
        message = {"prompt": graph, "client_id": client_id or uuid.uuid4().hex, "extra_data": extra}
        try:
            return str(self.post_json("/prompt", message)["prompt_id"])
        except RequestRefused as refused:
            raise PromptRejected(refused.status, refused.body) from None

    def wait(self, prompt_id: str, timeout: float = 120.0, allow_error: bool = False) -> dict[str, Any]:
        """The history entry of a run once it is over; ExecutionFailed if it failed and that is not allowed."""
        path = f"/history/{prompt_id}"
        entry: dict[str, Any] = self._until(lambda: self.get_json(path).get(prompt_id), timeout, f"finish {prompt_id}")
        if not allow_error and failure(entry) is not None:
            raise ExecutionFailed(entry)
        return entry

    def run(
        self,
        graph: Graph,
        client_id: str | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
        timeout: float = 120.0,
    ) -> dict[str, dict[str, Any]]:
        """Queue a graph and wait; what its output nodes showed, by node id.

        The host keeps the results of the graph before: nodes that did not change are not run again.
        """
        outputs: dict[str, dict[str, Any]] = self.wait(self.post(graph, client_id, extra_pnginfo), timeout)["outputs"]
        return outputs

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the current run, or this one if it is the current one."""
        self.post_json("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Drop all cached results and unload all models."""
        self.post_json("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.3)  # the host only notes it, and a run posted at once could overtake

    def object_info(self, node_class: str | None = None) -> dict[str, Any]:
        """The nodes the host knows, or one of them: {} if it does not know it."""
        info: dict[str, Any] = self.get_json(f"/object_info/{node_class}" if node_class else "/object_info")
        return info

    def view(self, image: Mapping[str, str]) -> bytes:
        """The file of one entry of an output's 'images'."""
        return self.get("/view?" + urlencode({key: image[key] for key in ("filename", "subfolder", "type")}))

    def events(self, client_id: str) -> EventStream:
        """Listen to what the host tells this client; close it, or use it as a context manager."""
        return EventStream(HOST, self._port, client_id)


class EventStream:
    """The host's messages to one client, read from its web socket by a thread of its own.

    ``messages`` holds all of them in order: {"type": ..., "data": ...}; binary ones (previews) have the type
    'binary' and bytes as data.
    """

    def __init__(self, host: str, port: int, client_id: str, timeout: float = 30.0) -> None:
        self.client_id = client_id
        self.messages: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._open = True
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._stream = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        query = urlencode({"clientId": client_id})
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
        hello = f"GET /ws?{query} HTTP/1.1\r\nHost: {host}:{port}\r\n{upgrade}\r\nSec-WebSocket-Key: {key}\r\n\r\n"
        self._socket.sendall(hello.encode())
        answer = self._stream.readline()
        while self._stream.readline() not in (b"\r\n", b""):
            pass
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, name=f"events of {client_id}", daemon=True)
        self._thread.start()
        if b" 101 " not in answer:
            self.close()
            raise RuntimeError(f"No web socket: {answer!r}")
        self.wait_for("status", timeout)  # the first message; from now on nothing is missed

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The data of all messages of one type."""
        with self._changed:
            return [message["data"] for message in self.messages if message["type"] == kind]

    def wait_for(self, kind: str, timeout: float = 60.0, where: Callable[[Any], bool] = lambda data: True) -> Any:
        """The data of the first message of this type (among those already there, too) for which ``where`` holds."""

        def found() -> list[Any]:
            return [m["data"] for m in self.messages if m["type"] == kind and where(m["data"])]

        with self._changed:
            self._changed.wait_for(lambda: found() or not self._open, timeout)
            if not (matches := found()):
                types = [message["type"] for message in self.messages]
                raise TimeoutError(f"No message {kind!r} within {timeout:g} s, but {types}.")
            return matches[0]

    def close(self) -> None:
        with suppress(OSError):  # the host may have hung up already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stream.close()
        self._socket.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self) -> None:
        try:
            while (frame := self._frame()) is not None:
                opcode, payload = frame
                if opcode == 1:
                    self._add(json.loads(payload))
                elif opcode == 2:
                    self._add({"type": "binary", "data": payload})
        except OSError:
            pass  # closed on either side
        finally:
            with self._changed:
                self._open = False
                self._changed.notify_all()

    def _add(self, message: dict[str, Any]) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def _frame(self) -> tuple[int, bytes] | None:
        """Opcode and payload (RFC 6455, 5.2; the host neither masks nor splits messages); None at the end."""
        head = self._stream.read(2)
        if len(head) < 2 or head[0] & 15 == 8:
            return None
        length = head[1] & 127
        if length == 126:
            (length,) = struct.unpack(">H", self._stream.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._stream.read(8))
        payload = self._stream.read(length)
        return (head[0] & 15, payload) if len(payload) == length else None
