"""A host in a process of its own, reached over HTTP: what the harnesses of all hosts have in common.

Needs the standard library only, so that it runs in the project's environment while the host has its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

HOST = "127.0.0.1"
_Self = TypeVar("_Self", bound="HostProcess")


def find_installs(folder: str, variable: str, program: str) -> list[Path]:
    """What the environment variable names, or the folders in the user's cache that match; only those with a host.

    A host is there if its program is, and an environment called venv next to it.
    """
    kept = Path.home() / ".cache" / "sd-dejavu" / "hosts"
    return [install for install in named(variable) or sorted(kept.glob(folder)) if _is_host(install, program)]


def named(variable: str) -> list[Path]:
    """The folders that the environment variable names, separated as in PATH."""
    return [Path(folder) for folder in os.environ.get(variable, "").split(os.pathsep) if folder]


def not_there(variable: str, program: str) -> list[Path]:
    """The folders that the environment variable names and where no host is."""
    return [folder for folder in named(variable) if not _is_host(folder, program)]


def _is_host(install: Path, program: str) -> bool:
    return (install / program).is_file() and python(install).is_file()


def python(install: Path) -> Path:
    return install / "venv" / "bin" / "python"


def number(install: Path, file: str, pattern: str) -> str:
    """The version, such as '0.3.64': what the pattern finds in the file."""
    found = re.search(pattern, (install / file).read_text(encoding="utf-8"))
    return found.group(1) if found else "of unknown version"


def version(install: Path, number: str) -> str:
    """Such as '0.3.64 (a125cd84)'; without the commit where that is not known."""
    try:
        return f"{number} ({git(install, 'rev-parse', '--short=8', 'HEAD')})"
    except (OSError, subprocess.CalledProcessError):
        return number


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def link(folders: Mapping[str, Path], into: Path) -> None:
    for name, folder in folders.items():
        (into / name).symlink_to(folder.resolve(), target_is_directory=True)


class RequestRefused(RuntimeError):
    """The host answered with an error; ``status`` and ``body`` are its HTTP answer."""

    def __init__(self, status: int, body: str, log: str = "") -> None:
        super().__init__(f"HTTP {status}: {body}\n{log}".rstrip())
        self.status, self.body = status, body


class HostProcess(ABC):
    """The process and its HTTP interface; a context manager that is left with the process ended.

    ``options`` go to the command line and ``env`` into the environment, above what the tests always set.
    """

    name: str
    threads = int(os.environ.get("OMP_NUM_THREADS", 2))

    def __init__(
        self, install: Path, home: Path, options: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> None:
        self.install, self.home = install, home
        self._options, self._env = list(options), dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._opener = build_opener(ProxyHandler({}))
        self._log = home / "host.log"
        self._port = 0
        self._stopped = False

    def _folder(self) -> Path:
        """Where the program is started."""
        return self.install

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments, after the host's Python; see :meth:`_folder`."""

    @abstractmethod
    def _ready(self) -> bool:
        """True if the host answers; an error of the connection means that it does not yet."""

    # ------------------------------------------------------------------------------------------ life

    def start(self: _Self, timeout: float = 240.0) -> _Self:
        """Returns when the host answers; RuntimeError with its log if it does not."""
        self._port = _free_port()
        command = [str(python(self.install)), *self._command(), *self._options]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder(),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._until(self._answers, timeout, "become ready", pause=0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, patience: float = 10.0) -> None:
        """Ask the process to end, and end it with all that it started if it does not listen."""
        if self._process is None or self._stopped:
            return
        self._stopped = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self: _Self) -> _Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("The server was not started.")
        return self._process.pid

    def rss_mb(self, peak: bool = False) -> float:
        """Resident memory of the process now, or the most it ever had, in MiB."""
        field = "VmHWM" if peak else "VmRSS"
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise RuntimeError("The server's process has ended.")
        return int(found.group(1)) / 1024

    def log(self, last: int | None = None) -> str:
        """What the host has written so far, or the last so many characters of it."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-(last or 0) :]

    # ------------------------------------------------------------------------------------------ HTTP

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        try:
            with self._opener.open(self.url + path, timeout=timeout) as answer:
                body: bytes = answer.read()
        except HTTPError as error:
            error.close()  # it holds the connection
            raise
        return body

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post_json(self, path: str, message: Any, timeout: float = 60.0) -> Any:
        """The answer's JSON, or None where it is empty; RequestRefused if the host answers with an error."""
        headers = {"Content-Type": "application/json"}
        request = Request(self.url + path, json.dumps(message).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                body = answer.read()
        except HTTPError as error:
            with error:
                raise RequestRefused(error.code, error.read().decode("utf-8", "replace"), self.log(2000)) from None
        return json.loads(body) if body else None

    # ------------------------------------------------------------------------------------------ inner

    def _environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        threads = {key: str(self.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        own = {"SD_DEJAVU_HOME": str(self.home / "dejavu"), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return kept | threads | offline | own | self._env

    def _answers(self) -> bool:
        try:
            return self._ready()
        except (URLError, ConnectionError):
            return False

    def _until(self, done: Callable[[], Any], timeout: float, what: str, pause: float = 0.05) -> Any:
        """Ask until the answer is true; RuntimeError if the process ended, TimeoutError if it takes too long."""
        end = time.monotonic() + timeout
        while True:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended and did not {what}.\n{self.log(4000)}")
            if answer := done():
                return answer
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} did not {what} within {timeout:g} s.\n{self.log(4000)}")
            time.sleep(pause)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port
