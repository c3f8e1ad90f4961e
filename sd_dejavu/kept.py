"""Results that are kept: written whole or not at all, of finite numbers only, and by one process at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .foreign import one_line

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

PARTIAL = ".partial"
LOCK = "dejavu.lock"
_AT_ONCE = 1 << 24  # values looked at together
_BEHIND = 1 << 30  # where Windows locks: what it locks cannot be read
_WHO = re.compile(r"process \d+ on [\w.-]+ since [\d: -]+")


class NotKept(OSError, ValueError):
    """A result that could not be written. The text says which, and why."""


class InUse(ValueError):
    """Another process is writing there. The text says which one."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that becomes ``path`` when it is whole. Raises NotKept."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch raises the last for a full disk
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise not_kept(path, error) from error


def not_kept(path: Path, error: Exception) -> NotKept:
    return NotKept(f"{path} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}")


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def json_text(document: Any, **how: Any) -> str:
    """JSON of finite numbers. Raises ValueError for NaN and infinity, which JSON does not know."""
    return json.dumps(document, allow_nan=False, **how)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises ValueError for NaN and infinity, NotKept where it cannot be written."""
    check_finite(tensors, path.name)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata)


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError where a floating-point tensor holds NaN or infinity."""
    for name, values in tensors.items():
        if values.is_floating_point() and not is_finite(values):
            raise ValueError(f"{what} is not saved: its {name} hold NaN or infinity")


def is_finite(values: Tensor) -> bool:
    return all(bool(torch.isfinite(part).all()) for part in values.detach().reshape(-1).split(_AT_ONCE))


# ------------------------------------------------------------------------------------- one process at a time


@contextmanager
def locked(what: Path, lock: Path) -> Iterator[None]:
    """While open, no other process can open this. ``what`` is written to, ``lock`` a file that is there for so long.

    The system lets go of it when the process ends, in whatever way. Raises InUse where another process has it, and
    NotKept where there can be no such file.
    """
    number = _opened(what, lock)
    try:
        who = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        with suppress(OSError):  # a full disk: then nobody is told who it is
            os.write(number, who.encode("ascii", "replace"))
        yield
    finally:
        with suppress(OSError):  # Windows does not remove what is open
            lock.unlink()
        os.close(number)
        if sys.platform == "win32":
            with suppress(OSError):
                lock.unlink()


def _opened(what: Path, lock: Path) -> int:
    while True:
        try:
            number = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise not_kept(lock, error) from error
        if not _taken(number):
            os.lseek(number, 0, os.SEEK_SET)
            said = os.read(number, 200).decode("ascii", "replace")
            os.close(number)
            who = said if _WHO.fullmatch(said) else "another process"
            raise InUse(f"{what} is being written to by {who}: wait until that has ended, or name another place")
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), os.stat(lock)):
                return number
        os.close(number)  # whoever had it before has removed it meanwhile


def _taken(number: int) -> bool:
    """Whether this process has it now; also on a file system that knows no locks."""
    if sys.platform == "win32":
        os.lseek(number, _BEHIND, os.SEEK_SET)
        try:
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
