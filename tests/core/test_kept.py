"""Results that are written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sd_dejavu import kept
from sd_dejavu.kept import InUse, NotKept, json_text, locked, replacing, write_tensors, write_text

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import pathlib, sys, time
from sd_dejavu.kept import locked
with locked(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "dejavu.lock")):
    print("held", flush=True)
    time.sleep(600)
"""


def broken_off(path: Path, fault: Exception, folder: bool) -> None:
    with replacing(path) as partial:
        if folder:
            partial.mkdir()
            (partial / "half").write_text("x")
        else:
            partial.write_text("x")
        raise fault


def test_what_is_broken_off_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "first")
    with pytest.raises(ZeroDivisionError):
        broken_off(tmp_path / "a.txt", ZeroDivisionError(), False)
    assert (tmp_path / "a.txt").read_text() == "first"
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing:\n I/O error"), "Error while serializing: I/O error"),
        (RuntimeError("[enforce fail] unexpected pos 64 vs 0"), "[enforce fail] unexpected pos 64 vs 0"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tmp_path: Path, fault: Exception, said: str, folder: bool
) -> None:
    with pytest.raises(NotKept) as caught:
        broken_off(tmp_path / "result", fault, folder)
    assert str(caught.value) == f"{tmp_path / 'result'} cannot be written: {said}"
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_tensors_that_are_not_finite_are_not_saved(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"rows": torch.ones(3), "counts": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"a\.safetensors is not saved: its rows hold NaN or infinity"):
        write_tensors(path, {"rows": torch.tensor([1.0, value])})
    assert load_file(path)["rows"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"score": value})


def holder(folder: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_told_who_the_first_is_until_that_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "dejavu.lock"
    with holder(tmp_path) as process:
        said = rf"{tmp_path} is being written to by process {process.pid} on \S+ since \d{{4}}-.*: wait until"
        for _ in range(2):  # being refused does not take it away
            with pytest.raises(InUse, match=said), locked(tmp_path, lock):
                pytest.fail("both have it")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lock.exists()
    with locked(tmp_path, lock), pytest.raises(InUse, match=f"process {os.getpid()} on"), locked(tmp_path, lock):
        pytest.fail("both have it")
    assert not lock.exists()


def test_what_stands_in_a_foreign_lock_file_is_not_repeated(tmp_path: Path) -> None:
    lock = tmp_path / "dejavu.lock"
    with locked(tmp_path, lock):
        lock.write_text("process 3 on \x1b]0;mine\x07 since 2020")
        with pytest.raises(InUse, match="is being written to by another process: wait"), locked(tmp_path, lock):
            pytest.fail("both have it")


def test_a_file_that_the_one_before_removed_is_not_taken_for_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process removes its file between the second one's opening and taking it."""
    lock, times = tmp_path / "dejavu.lock", []
    real = kept._taken

    def taken(number: int) -> bool:
        times.append(number)
        if len(times) == 1:
            lock.unlink()
        return real(number)

    monkeypatch.setattr(kept, "_taken", taken)
    with locked(tmp_path, lock):
        assert lock.exists() and len(times) == 2


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path, tmp_path / "dejavu.lock"):
        assert (tmp_path / "dejavu.lock").exists()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NotKept, match=r"dejavu\.lock cannot be written: Not a directory"),
        locked(tmp_path, tmp_path / "file" / "dejavu.lock"),
    ):
        pytest.fail("there is no such folder")
