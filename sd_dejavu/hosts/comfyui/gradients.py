"""Gradients in the host's inference mode, through aliases of its weights.

The host executes prompts in inference mode, where nothing can be differentiated; an alias is a normal tensor on the
same storage (no copy), which can. All aliases are put back before anything else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

BYTES_A_LATENT_PIXEL = 360_000  # activations kept in fp32: 2.74 GiB for two SD1.5 pictures of 512 x 512


def make_room(patcher: Any, latent_pixels: int) -> None:
    """Ask the host for the memory of a backward pass: its own estimate knows only the forward pass.

    Other models are unloaded for it where need be, never the one that is being sampled. To be called in inference
    mode: weights that the host moves outside of it cannot be used again.
    """
    managed = comfy.model_management
    computes_in = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    needed = latent_pixels * BYTES_A_LATENT_PIXEL * managed.dtype_size(computes_in) // 4
    own = [m for m in managed.current_loaded_models if m.model is not None and patcher.is_clone(m.model)]
    managed.free_memory(needed, patcher.load_device, keep_loaded=own)


@contextmanager
def differentiable(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Out of inference mode, with every inference tensor of the modules aliased to a normal one; all put back."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.allow_mutation_on_saved_tensors(),
        ExitStack() as stack,
    ):
        for module in modules:
            stack.enter_context(_aliased(module))
        yield


@contextmanager
def _aliased(module: torch.nn.Module) -> Iterator[None]:
    taken: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for part in module.modules():
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
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"gradients cannot be taken through {type(tensor).__name__} weights: load a plain checkpoint")
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.nn.Parameter(alias, requires_grad=False) if is_parameter else alias


def normal(tensor: Tensor) -> Tensor:
    """A tensor that may be saved for backward."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def plain_attention(function: Any, *arguments: Any, **settings: Any) -> Tensor:
    """PyTorch's own attention: every other kind of the host may lack a backward pass."""
    return attention_pytorch(*arguments, **settings)


@contextmanager
def checkpointed(network: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """While open, the blocks of the network recompute their activations in the backward pass."""
    if not wanted:
        yield
        return
    lists = [
        getattr(network, name, None) for name in ("input_blocks", "output_blocks", "joint_blocks", "double_blocks")
    ]
    blocks = [block for part in lists if part is not None for block in part]
    plain = []
    try:
        for block in (
            inner for outer in blocks for inner in (outer if isinstance(outer, torch.nn.Sequential) else [outer])
        ):
            plain.append(block)
            block.forward = _recomputing(block.forward)
        yield
    finally:
        for block in plain:
            del block.forward  # the class's own shows again


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **settings: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(forward, *arguments, use_reentrant=False, **settings)

    return run
