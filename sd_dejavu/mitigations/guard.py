"""Reference images as mitigations see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..reference.features import Features
from ..reference.reference_set import Neighbours


class Searched(Protocol):
    """What a mitigation needs of a reference set, wherever it is searched."""

    def search(self, queries: Tensor, k: int) -> Neighbours: ...

    def similarity(self, query: Tensor, index: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Guard:
    """Reference images, the features that their rows were made with, and their captions ('' where unknown)."""

    features: Features
    references: Searched
    captions: Sequence[str]
