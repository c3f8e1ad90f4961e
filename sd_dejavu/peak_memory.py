"""The largest memory in use while something runs."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

MEGABYTE = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """``megabytes`` is known when the block is left; NaN where the system does not tell."""

    megabytes: float = float("nan")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """On a GPU what PyTorch has allocated there; on a CPU under Linux the resident size of the whole process."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.megabytes = torch.cuda.max_memory_allocated(device) / MEGABYTE
        return
    known = device.type == "cpu" and _reset()
    yield found
    if known and (line := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))):
        found.megabytes = int(line[1]) * 1024 / MEGABYTE


def _reset() -> bool:
    """Begin a new peak; what earlier work has freed but the allocator still holds goes back first."""
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
