"""An audit on a Ray cluster of two hosts, each a network namespace of Linux, one of which is lost on the way."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sd_dejavu.cli.main import main
from sd_dejavu.demo import bundled

pytestmark = pytest.mark.figures  # takes minutes
ROOT = Path(__file__).parents[2]
HEAD, PORT = "10.203.0.1", 6379


class Host:
    """One of two hosts of a network that holds nothing else."""

    def __init__(self, name: str, address: str, environment: dict[str, str]) -> None:
        self.name, self.address, self._environment = name, address, environment
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self.name, sys.executable, *command]
        quiet = subprocess.DEVNULL
        self._started.append(subprocess.Popen(inside, env=self._environment, stdout=quiet, stderr=quiet))
        return self._started[-1]

    def ray(self, *arguments: str) -> subprocess.Popen[bytes]:
        sizes = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
        here = f"--node-ip-address={self.address}"
        return self.start("-m", "ray.scripts.scripts", "start", here, *arguments, *sizes)

    def processes(self) -> dict[int, str]:
        """The command line of each process by its number."""
        found = {}
        for number in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split():
            try:
                found[int(number)] = Path(f"/proc/{number}/cmdline").read_text()
            except OSError:  # it is over
                continue
        return found

    def switch_off(self) -> None:
        """All its processes end at once, as without power."""
        while there := self.processes():
            for number in there:
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        for process in self._started:
            process.wait()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def two_hosts() -> Iterator[tuple[Host, Host, str]]:
    """Two hosts on one cable, and a folder for Ray with a short name, as the paths of sockets must be."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="dv", dir="/tmp" if os.name == "posix" else None)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    hosts = [Host(f"dv{os.getpid()}{side}", f"10.203.0.{n}", environment) for n, side in ((1, "a"), (2, "b"))]
    one, other = hosts
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ip("link", "add", "net0", "netns", one.name, "type", "veth", "peer", "name", "net0", "netns", other.name)
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "net0")
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "link", "set", "net0", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or error
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)
        pytest.skip(f"no network namespaces can be made here (they need Linux, iproute2 and root): {why}")
    try:
        yield one, other, folder
    finally:
        for host in hosts:
            host.switch_off()
            ip("netns", "delete", host.name)
        shutil.rmtree(folder, ignore_errors=True)


def test_an_audit_on_two_hosts_of_which_one_is_lost_finds_the_same(
    two_hosts: tuple[Host, Host, str], tmp_path: Path
) -> None:
    head, other, folder = two_hosts
    often = [pair.caption for pair in bundled.pairs() if pair.repetitions >= 300 and pair.kind == "hard"][:10]
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join([*often, *bundled.held_out_ordinary(20, 6001)]), encoding="utf-8")
    sizes = ["--nulls", "50", "--images", "1", "--partition", "25", "--worst", "0"]

    def audit(out: str) -> list[str]:
        return ["audit", "--dataset", str(captions), "--out", str(tmp_path / out), *sizes]

    assert main(audit("local")) == 0
    head.ray("--head", f"--port={PORT}", f"--temp-dir={folder}", "--include-dashboard=false")
    wait_for(lambda: any("raylet/raylet" in told for told in head.processes().values()), 120)
    other.ray(f"--address={HEAD}:{PORT}")
    wait_for(lambda: any("raylet/raylet" in told for told in other.processes().values()), 120)
    cluster = ["--engine", "ray", "--ray-address", f"{HEAD}:{PORT}", "--workers", "2"]
    running = head.start("-m", "sd_dejavu", *audit("cluster"), *cluster)
    kept = (tmp_path / "cluster" / "tasks").glob

    def in_the_middle() -> bool:
        assert running.poll() is None
        at_work = any(told.startswith("ray::MapWorker") for told in other.processes().values())
        return at_work and any(kept("*-*-*.json"))

    wait_for(in_the_middle, 600)
    other.switch_off()
    assert len(list(kept("*-*-*.json"))) < 8  # it was not the last task
    assert running.wait(600) == 0
    assert not other.processes()
    for name in ("audit.json", "audit.parquet"):
        assert (tmp_path / "cluster" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
