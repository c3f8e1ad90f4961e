"""Results that are written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sd_dejavu.kept import (
    InUse,
    NotKept,
    Resumable,
    digest_of,
    file_digest,
    json_digest,
    json_text,
    locked,
    model_digest,
    replacing,
    write_tensors,
    write_text,
)
from sd_dejavu.kept import lock as locking
from sd_dejavu.kept.foreign import Unreadable

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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(NotKept, match=f"{name} is a device or a pipe, .* give the name of a file"):
            write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


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


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_in_a_foreign_folder_lead_no_writing_elsewhere(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("mine")
    for name in ("report.html.partial", "dejavu.lock", "report.html"):
        (tmp_path / name).symlink_to(own)
    write_text(tmp_path / "report.html", "theirs")
    assert (tmp_path / "report.html").read_text() == "theirs"
    with pytest.raises(NotKept, match=r"dejavu\.lock cannot be written"), locked(tmp_path, tmp_path / "dejavu.lock"):
        pass
    assert own.read_text() == "mine"


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
    real = locking._taken

    def taken(number: int) -> bool:
        times.append(number)
        if len(times) == 1:
            lock.unlink()
        return real(number)

    monkeypatch.setattr(locking, "_taken", taken)
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


# ---------------------------------------------------------------------------------------- resumable work

ABOUT = {"model": "abc", "images": 4, "score": None, "settings": {"rank": 8, "kinds": ["a"]}}


def work(folder: Path, **more: Any) -> Resumable:
    return Resumable(folder, "a test", "call another", **more)


def test_work_goes_on_where_it_is_the_same(tmp_path: Path) -> None:
    work(tmp_path / "w").begin(ABOUT)
    (tmp_path / "w" / "piece").write_text("done")
    work(tmp_path / "w").begin({**ABOUT, "settings": {"rank": 8, "kinds": ("a",)}})  # JSON knows no tuples
    assert (tmp_path / "w" / "piece").read_text() == "done"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "abd"}, "another model"),
        ({"images": 8, "score": 0.5}, "images 4 instead of 8 and score None instead of 0.5"),
        ({"settings": {"rank": None, "kinds": ["b"]}}, "rank 8 instead of None and another kinds"),
        ({"settings": {"rank": 8, "kinds": ["a"], "near_by": True}}, "near by None instead of True"),
        ({"settings": {"rank": 8}}, "another kinds"),
    ],
)
def test_other_work_is_refused_and_what_differs_is_said(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    work(tmp_path).begin(ABOUT)
    before = (tmp_path / "begun.json").read_text()
    with pytest.raises(ValueError, match="holds a test") as caught:
        work(tmp_path).begin({**ABOUT, **change})
    assert str(caught.value) == f"{tmp_path} holds a test with {said}: go on as it was begun, or call another"
    assert (tmp_path / "begun.json").read_text() == before


def test_the_notes_of_release_0_1_are_read(tmp_path: Path) -> None:
    """An audit's on one line, a fine-tuning's in groups and under a name of its own."""
    (tmp_path / "begun.json").write_text('{"model": "bundled", "loras": ["a 12"], "images": 4, "alpha": 0.01}')
    work(tmp_path).begin({"model": "bundled", "loras": ("a 12",), "images": 4, "alpha": 0.01})
    (tmp_path / "finetune.json").write_text('{\n "model": "m",\n "settings": {\n  "rank": null,\n  "seed": 0\n }\n}\n')
    tuned = work(tmp_path, note="finetune.json", shared=True)
    tuned.begin({"model": "m", "settings": {"rank": None, "seed": 0}})
    with pytest.raises(ValueError, match="with seed 0 instead of 1"):
        tuned.begin({"model": "m", "settings": {"rank": None, "seed": 1}})


@pytest.mark.parametrize("text", ["null", "[]", "3", "{", "[" * 100_000, "\xff"])
def test_a_damaged_note_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "begun.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"begun\.json is damaged \(.*\): call another$") as caught:
        work(tmp_path).begin(ABOUT)
    assert "\n" not in str(caught.value)


def test_files_of_the_users_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not a test: move it away, or name another one"):
        work(tmp_path).begin(ABOUT)
    work(tmp_path).discard()
    assert (tmp_path / "letter.txt").read_text() == "dear"
    work(tmp_path, shared=True).begin(ABOUT)


def test_what_is_left_of_a_discarded_folder_is_swept_away(tmp_path: Path) -> None:
    half = tmp_path / "w.over"
    half.mkdir()
    (half / "begun.json").write_text("{}")
    work(tmp_path / "w").begin(ABOUT)
    assert not half.exists()
    work(tmp_path / "w").discard()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ digests


def test_a_model_is_told_by_its_contents_wherever_it_lies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 256, 3_000_000, dtype=np.uint8)
    file = tmp_path / "model.safetensors"
    file.write_bytes(weights.tobytes())
    known = model_digest(file)
    moved = file.rename(tmp_path / "moved.safetensors")
    assert model_digest(moved) == known
    moved.write_bytes((weights + (rng.random(len(weights)) < 0.01)).astype(np.uint8).tobytes())  # trained on
    assert model_digest(moved) != known
    folder = tmp_path / "folder" / "unet"
    folder.mkdir(parents=True)
    moved.rename(folder / "weights.safetensors")
    whole = model_digest(folder.parent)
    (folder.parent / "preview.png").write_bytes(b"of no matter")
    assert model_digest(folder.parent) == whole
    (folder / "config.json").write_text("{}")
    assert model_digest(folder.parent) != whole
    with pytest.raises(Unreadable):
        model_digest(tmp_path / "gone")


def test_digests_are_those_that_are_written_in_folders_and_sets(tmp_path: Path) -> None:
    """Against the published values of SHA-256 for 'abc', and hashlib for what we have written with it since 0.1."""
    assert digest_of(["ab", b"c"], 64) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc", 8) == "ba7816bf"
    assert json_digest(["é", 1.5]) == hashlib.sha256(b'["\\u00e9", 1.5]').hexdigest()[:16]
    assert digest_of(["a\udcff", b"b"], 32, "blake2b") == hashlib.blake2b(b"a\xffb", digest_size=16).hexdigest()
    with pytest.raises(Unreadable, match="not a regular file"):
        file_digest(tmp_path)
