"""What gradients need of ComfyUI: memory, an attention that has a backward pass, blocks that recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
