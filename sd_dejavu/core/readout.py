"""Numbers on their way from a device to the CPU, so that whoever launches work never waits for its results.

Asking a card for a value (``float``, ``.cpu()``, ``torch.equal``) waits until all that was launched before it is done,
and leaves the card idle until more is launched. A :class:`Readout` starts the copy into pinned memory instead and marks
its place among the work with an event: it can be asked whether the copy is done, and only who needs the numbers waits,
for no more than was launched before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readout:
    """One small tensor of any shape, as it is now; later changes of it do not show.

    Devices that are neither a CPU nor a CUDA (or ROCm) card have no such copy here: there the tensor is kept, and
    read when it is asked for.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Launches a copy, and waits for nothing."""
        self._event: Any = None
        tensor = tensor.detach()
        if tensor.device.type == "cuda":
            self._held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._held.copy_(tensor, non_blocking=True)
            with torch.cuda.device(tensor.device):
                self._event = torch.cuda.Event()
                self._event.record()
        else:
            self._held = tensor.clone()

    def ready(self) -> bool:
        """Whether :meth:`wait` gives the numbers at once."""
        event = self._event
        return event is None or bool(event.query())

    def wait(self) -> Tensor:
        """The numbers on the CPU. Not to be changed: every caller gets the same tensor."""
        if (event := self._event) is not None:
            event.synchronize()
            self._held = self._held.clone()  # pinned memory is short, and dear to make: back with it
            self._event = None
        elif self._held.device.type != "cpu":
            self._held = self._held.cpu()
        return self._held
