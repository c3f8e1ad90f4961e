"""Counts what would wait for a card, on machines that have none: values asked for of tensors that the host made.

Runs in the project's Python and in those of the hosts; needs torch and the core only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sd_dejavu.core.readout import Readout

CORE = Path(sys.modules[Readout.__module__].__file__ or "").parents[1]
READS = {
    *("item", "tolist", "numpy", "cpu", "equal", "allclose", "nonzero", "argwhere", "unique", "masked_select"),
    *("__bool__", "__float__", "__int__", "__index__", "__iter__", "__contains__", "__array__", "is_nonzero"),
}
HERE = "on_the_cpu"  # attribute of tensors that no device holds


class DeviceReads(TorchFunctionMode):
    """While open: ``places`` are the lines of the core that asked a device's tensor for its values, 'file:line'.

    With a ``monitor`` only those of its sampling loop count. On the CPU there are the numbers of a Readout, those that
    the core has made from Python's own, and what was made of them.
    """

    def __init__(self, monitor: Any = None) -> None:
        super().__init__()
        self.places: set[str] = set()
        self._monitor, self._looping = monitor, monitor is None
        self._wait = Readout.wait

    def __enter__(self) -> DeviceReads:
        wait = self._wait

        def marked(readout: Readout) -> Tensor:
            with torch._C.DisableTorchFunction():
                numbers = wait(readout).view_as(readout._held)
            setattr(numbers, HERE, True)
            return numbers

        Readout.wait = marked  # type: ignore[method-assign]
        if self._monitor is not None:
            loop = self._monitor._sampler_sample
            self._monitor._sampler_sample = lambda executor, *a, **k: loop(_Looping(self, executor), *a, **k)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Readout.wait = self._wait  # type: ignore[method-assign]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        place = _asked_by()
        if place is None:
            return found
        given = list(_tensors((args, kwargs.values())))
        here = all(getattr(tensor, HERE, False) for tensor in given)
        name = getattr(function, "__name__", "")
        away = name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))
        if self._looping and not here and (name in READS or away):
            self.places.add(place)
        if here and (given or not kwargs.get("device")):
            for tensor in _tensors([found]):
                setattr(tensor, HERE, True)
        return found


class _Looping:
    """Stands for the host's executor: what is below it runs in the sampler's loop."""

    def __init__(self, reads: DeviceReads, executor: Any) -> None:
        self._reads, self._executor, self.class_obj = reads, executor, executor.class_obj

    def __call__(self, *given: Any, **named: Any) -> Any:
        self._reads._looping = True
        try:
            return self._executor(*given, **named)
        finally:
            self._reads._looping = False


def _asked_by() -> str | None:
    """The line that called into torch, if it is one of the core's."""
    frame = sys._getframe(2)
    while frame is not None and "torch" in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or CORE not in Path(frame.f_code.co_filename).parents:
        return None
    return f"{Path(frame.f_code.co_filename).relative_to(CORE)}:{frame.f_lineno}"


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)) or type(value).__name__ == "dict_values":
            yield from _tensors(value)
