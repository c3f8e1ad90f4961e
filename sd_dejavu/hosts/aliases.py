"""Gradients in a host's inference mode, through aliases of its weights.

ComfyUI and Forge run in inference mode, where nothing can be differentiated; an alias is a normal tensor on the same
storage (no copy), which can. All aliases are put back before anything else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def differentiable(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Out of inference mode, with every inference tensor of the modules aliased to a normal one; all put back."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        aliased(modules),
    ):
        yield


@contextmanager
def aliased(
    modules: Sequence[torch.nn.Module], skip: Callable[[torch.nn.Module], bool] = lambda part: False
) -> Iterator[None]:
    """The aliases alone; ``skip`` names the parts whose tensors are left as they are."""
    taken: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in (part for module in modules for part in module.modules() if not skip(part)):
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_inference():
                        taken.append((table, name, tensor))
                        table[name] = _alias(tensor, is_parameter=table is part._parameters)
        yield
    finally:
        for table, name, tensor in taken:
            table[name] = tensor


def _alias(tensor: Tensor, is_parameter: bool) -> Any:
    refuse_unusual(tensor)
    alias = as_normal(tensor)
    return torch.nn.Parameter(alias, requires_grad=False) if is_parameter else alias


def refuse_unusual(weight: Tensor) -> None:
    """Raises ValueError for weights that are more than numbers in memory (quantised ones, other packs' own)."""
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"gradients cannot be taken through {type(weight).__name__} weights: load a plain checkpoint")


def as_normal(tensor: Tensor) -> Tensor:
    """A normal tensor on the storage of one made in inference mode; itself where it is normal. Nothing is copied."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def normal(tensor: Tensor) -> Tensor:
    """A tensor that may be saved for backward."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
