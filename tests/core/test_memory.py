"""Work that does not fit: halved, told, and no other error taken for it."""

from __future__ import annotations

import pytest
import torch

from sd_dejavu.core.memory import OutOfMemory, free_memory, in_pieces, one_by_one, ran_out, telling

CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.99 GB)"),
        RuntimeError(CPU),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 137438953472 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        MemoryError(),
    ],
)
def test_every_kind_of_short_memory_becomes_one_sentence(error: Exception) -> None:
    assert ran_out(error)
    with pytest.raises(OutOfMemory, match=r"not enough memory.* use half precision") as told, telling():
        raise error
    assert "\n" not in str(told.value)


def test_the_cpus_own_allocator_is_understood() -> None:
    with pytest.raises(OutOfMemory), telling():
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), KeyError("x")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as told, telling():
        raise error
    assert told.value is error
    with pytest.raises(type(error)):
        list(in_pieces(lambda start, stop: (_ for _ in ()).throw(error), 4, 4))


def room_for(most: int, seen: list[tuple[int, int]]):
    def work(start: int, stop: int) -> list[int]:
        seen.append((start, stop))
        if stop - start > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return list(range(start, stop))

    return work


@pytest.mark.parametrize(
    ("most", "at_once", "pieces"),
    [
        (9, 4, [(0, 4), (4, 7)]),
        (2, 7, [(0, 7), (0, 3), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        (3, 7, [(0, 7), (0, 3), (3, 6), (6, 7)]),
        (1, 2, [(0, 2), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        (9, 0, [(n, n + 1) for n in range(7)]),
    ],
)
def test_what_does_not_fit_is_halved_and_stays_so(most: int, at_once: int, pieces: list[tuple[int, int]]) -> None:
    seen: list[tuple[int, int]] = []
    found = list(in_pieces(room_for(most, seen), 7, at_once))
    assert [n for part in found for n in part] == list(range(7))
    assert seen == pieces


def test_where_one_does_not_fit_it_is_told() -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(OutOfMemory, match=r"even for one image at a time \(CUDA out of memory\)"):
        list(in_pieces(room_for(0, seen), 7, 4))
    assert seen == [(0, 4), (0, 2), (0, 1)]


def test_one_item_that_does_not_fit_costs_no_other() -> None:
    asked: list[list[str]] = []

    def work(items: list[str]) -> list[str]:
        asked.append(list(items))
        if "large" in items:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return [item.upper() for item in items]

    found = one_by_one(work, ["a", "large", "b"])
    assert (found[0], found[2]) == ("A", "B")
    assert isinstance(found[1], OutOfMemory) and found[1].__traceback__ is None
    assert asked == [["a", "large", "b"], ["a"], ["large"], ["b"]]
    assert one_by_one(work, ["a", "b"]) == ["A", "B"] and asked[-1] == ["a", "b"]
    assert one_by_one(work, []) == []


def test_free_memory_is_known_on_the_cpu_and_honestly_unknown_elsewhere() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None
