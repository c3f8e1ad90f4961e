"""One process at a time: a lock that the system lets go of when its process ends, in whatever way."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .files import not_kept

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = "dejavu.lock"
_BEHIND = 1 << 30  # where Windows locks: what it locks cannot be read
_WHO = re.compile(r"process \d+ on [\w.-]+ since [\d: -]+")


class InUse(ValueError):
    """Another process is writing there. The text says which one."""


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
            number = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
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
