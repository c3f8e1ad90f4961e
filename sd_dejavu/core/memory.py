"""Memory: work that does not fit is tried again in smaller pieces, and where that fails a sentence says so."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

R = TypeVar("R")
T = TypeVar("T")

_MARKS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
_MEMINFO = Path("/proc/meminfo")


class OutOfMemory(ValueError):
    """Not even the smallest piece of the work fits; the text says what to lower."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory was short: PyTorch's own kind, or the CPU's, MPS's and CUDA libraries' texts."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in _MARKS)


def release() -> None:
    """Give back what PyTorch holds and nothing uses."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors could take there; None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "cpu" and _MEMINFO.is_file():
        line = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text(encoding="ascii"))
        return int(line[1]) * 1024 if line else None
    return None


@contextmanager
def telling() -> Iterator[None]:
    """Raises OutOfMemory for whatever means, within the block, that memory was short."""
    try:
        yield
    except Exception as error:  # sorted out by what it says: each device raises its own
        if not ran_out(error):
            raise
        raise OutOfMemory(too_large(error)) from error


def one_by_one(work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R | OutOfMemory]:
    """``work(items)``, a result an item; where memory runs out, item by item, with the fault of each that does not fit."""
    try:
        with telling():
            return list(work(items))
    except OutOfMemory as error:
        fault = OutOfMemory(str(error))  # without what it has seen, which holds on to memory
    release()
    return [fault] if len(items) == 1 else [found for item in items for found in one_by_one(work, [item])]


def in_pieces(work: Callable[[int, int], R], count: int, at_once: int) -> Iterator[R]:
    """``work(start, stop)`` for all of ``count`` images in turn, at most ``at_once`` together.

    A piece for which memory does not suffice is halved, and those after it are no larger. Raises OutOfMemory
    where it does not suffice for one image.
    """
    start, size = 0, max(1, at_once)
    while start < count:
        stop = min(start + size, count)
        try:
            with telling():
                done = work(start, stop)
        except OutOfMemory:
            if stop - start == 1:
                raise
        else:
            yield done
            start = stop
            continue
        release()  # only now has the error let go of what the piece had allocated
        size = (stop - start) // 2


def too_large(error: BaseException) -> str:
    """The sentence for an error that :func:`ran_out` of memory."""
    told = " ".join(str(error).split("\n")[0].split())[:120].rstrip(". ") or type(error).__name__
    return (
        f"there is not enough memory, even for one image at a time ({told}): use half precision (float16) or a "
        "smaller image, or close other programs that use the device"
    )
