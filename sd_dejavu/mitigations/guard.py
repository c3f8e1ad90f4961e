"""Reference pictures as mitigations see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..reference.features import Features
from ..reference.reference_set import Neighbours


class References(Protocol):
    """What a mitigation needs of a reference set, wherever it is searched."""

    @property
    def captions(self) -> Sequence[str]: ...

    def search(self, queries: Tensor, k: int) -> Neighbours: ...

    def similarity(self, query: Tensor, index: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Guard:
    """Reference pictures, and the features that their rows were made with."""

    features: Features
    references: References
