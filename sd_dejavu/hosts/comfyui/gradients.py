"""Gradients in ComfyUI, wherever the host keeps the weights: the layer asks for them again on the way back.

ComfyUI hands each layer its weight when the layer runs: from the card, streamed in from main memory, or (dynamic VRAM,
the default on NVIDIA since 0.16) out of memory that the next layer may take over; patched by a LoRA, cast from fp8.
Autograd would keep that very tensor for the backward pass and read whatever lies there by then. So no graph keeps a
weight here. Each of the host's layers runs as it always does, in inference mode, as one node of the graph; on the way
back it asks the host for its weight once more, uses it, and gives it back as a forward pass does:

    Linear        y = x W^T + b     dL/dx = dL/dy W
    convolution   y = x * W + b     dL/dx = the transposed convolution of dL/dy with W
    norms         dL/dx by autograd at the kept x, with a copy of the few numbers that scale it

Why this way: another copy of the model (what the host's own trainer takes) needs the memory of a whole model, and one
whose file is known; aliases of the resident weights are overwritten unseen when the model does not fit the card whole.
This needs the memory of one layer's weight, and less for activations than autograd takes, since a linear layer's input
is not kept. Numbers are those of the host's own forward pass, and nothing of its bookkeeping is touched, since all that
moves weights runs in inference mode, as it does when the host samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeGuard

import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.nn import grad

from ...core.gradients import BYTES_A_LATENT_PIXEL, RECOMPUTED_FROM, TOGETHER, recomputing
from ..aliases import aliased, as_normal, refuse_unusual
from .api import Layer, ModelPatcher

_HAND_BACK = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters  # 0.3.64 needs nothing back
_CONVOLUTIONS: dict[type, Callable[..., Tensor]] = {
    torch.nn.Conv1d: grad.conv1d_input,
    torch.nn.Conv2d: grad.conv2d_input,
    torch.nn.Conv3d: grad.conv3d_input,
}


@contextmanager
def differentiable(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Out of inference mode, with the host's layers differentiable in their inputs; all as before afterwards.

    A layer whose weights cannot be asked for again raises ValueError when a gradient is to go through it.
    """
    layers = {layer: None for module in modules for layer in module.modules() if is_layer(layer)}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        aliased(modules, skip=is_layer),
        torch.autograd.set_multithreading_enabled(False),  # the host's streams and interruption live in this thread
        _without_fused_kernels(),
        ExitStack() as stack,
    ):
        for layer in layers:
            stack.enter_context(_running(layer, partial(_run, layer, layer.forward)))
        yield


def is_layer(module: torch.nn.Module) -> TypeGuard[Layer]:
    """Whether the host hands this module its weights when it runs."""
    return isinstance(module, comfy.ops.CastWeightBiasOp)


@contextmanager
def _running(module: torch.nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While open, the module runs by another forward; then what it had shows again."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _run(layer: Layer, forward: Callable[..., Tensor], x: Tensor, **named: object) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Layer.apply(x, layer, forward, named)  # type: ignore[no-untyped-call]
        return result
    return _forward(forward, x, named)


def _forward(forward: Callable[..., Tensor], x: Tensor, named: dict[str, object]) -> Tensor:
    with torch.inference_mode():
        return as_normal(forward(x.detach(), **named))


class _Layer(torch.autograd.Function):
    """One layer of the host's as a node of the graph that keeps no weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, forward: Callable[..., Tensor], named: dict[str, object]) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        ctx.formula = _formula(layer, named)
        kept = [] if ctx.formula is None else [x.clone()]  # the host goes on to add to x in place
        ctx.save_for_backward(*kept)
        return _forward(forward, x, named)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.inference_mode(), _weight_and_bias(ctx.layer, ctx.dtype, gradient.device) as (weight, bias):
            if ctx.formula is None:
                found = _of_linear_map(ctx.layer, ctx.shape, weight, gradient)
            else:
                (x,) = ctx.saved_tensors
                found = _of_formula(ctx.formula, x, weight, bias, gradient)
        return as_normal(found), None, None, None


Formula = Callable[[Tensor, "Tensor | None", "Tensor | None"], Tensor]  # of input, weight and bias


def _formula(layer: Layer, named: dict[str, object]) -> Formula | None:
    """What a layer that needs its input for the gradient does; None where its weight is enough.

    Raises ValueError for layers that are not the host's own: how they come by a weight, and what they do with it, is
    not known.
    """
    if layer.weight is not None and not _is_quantised(layer.weight):
        refuse_unusual(layer.weight)
    for method in ("forward", "forward_comfy_cast_weights"):
        home = getattr(type(layer), method).__module__
        if home != comfy.ops.__name__:
            raise ValueError(f"gradients cannot be taken through the layers of {home}: load a plain checkpoint")
    if isinstance(layer, torch.nn.GroupNorm):
        return lambda x, weight, bias: F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, torch.nn.LayerNorm):
        return lambda x, weight, bias: F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, comfy.ops.disable_weight_init.RMSNorm):
        return lambda x, weight, bias: F.rms_norm(x, layer.normalized_shape, weight, layer.eps)
    if isinstance(layer, tuple(_CONVOLUTIONS)):
        convolution: Any = layer
        plain = convolution.padding_mode == "zeros" and "_conv_forward" not in vars(layer) and not named
        return None if plain else lambda x, weight, bias: convolution._conv_forward(x, weight, bias, **named)
    if hasattr(layer, "in_features") and getattr(layer, "pre_quant_scale", None) is None:
        return None
    raise ValueError(f"gradients cannot be taken through this model's {type(layer).__name__} layers")


def _is_quantised(weight: Tensor) -> bool:
    kind = getattr(comfy.ops, "QuantizedTensor", None)
    return kind is not None and isinstance(weight, kind)


@contextmanager
def _weight_and_bias(layer: Layer, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, Tensor | None]]:
    """What the host would hand the layer for an input of this dtype, for as long as this is open."""
    if layer.weight is None or not (layer.comfy_cast_weights or layer.weight_function or layer.bias_function):
        yield layer.weight, layer.bias
        return
    wanted = {"dtype": dtype, "device": device, "bias_dtype": dtype}
    if not _HAND_BACK:
        yield comfy.ops.cast_bias_weight(layer, **wanted)
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, **wanted, offloadable=True)
    try:
        yield weight.dequantize() if _is_quantised(weight) else weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


def _of_linear_map(layer: Layer, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
    known = next((formula for kind, formula in _CONVOLUTIONS.items() if isinstance(layer, kind)), None)
    if known is None:
        return gradient @ weight
    return known(shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups)


def _of_formula(formula: Formula, x: Tensor, weight: Tensor | None, bias: Tensor | None, gradient: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        own = (None if part is None else part.detach().clone() for part in (weight, bias))
        (found,) = torch.autograd.grad(formula(leaf, *own), leaf, gradient)
    return found


@contextmanager
def _without_fused_kernels() -> Iterator[None]:
    """Some of the host's kernels have no backward pass; it leaves them out by itself while it trains."""
    managed = comfy.model_management
    if not hasattr(managed, "in_training"):
        yield
        return
    before, managed.in_training = managed.in_training, True
    try:
        yield
    finally:
        managed.in_training = before


def kept_by_an_image(patcher: ModelPatcher, latent_pixels: int) -> int:
    """Bytes that the backward pass of one image needs kept from its forward pass."""
    computes_in = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    return latent_pixels * BYTES_A_LATENT_PIXEL * int(comfy.model_management.dtype_size(computes_in)) // 2


def must_recompute(patcher: ModelPatcher, latent_pixels: int) -> bool:
    """Whether one image's activations are more than fits beside the weights on a card of 12 GB, or than is free."""
    count_free = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return kept_by_an_image(patcher, latent_pixels) > min(RECOMPUTED_FROM, count_free(patcher.load_device))


def make_room(patcher: ModelPatcher, images: int, latent_pixels: int) -> None:
    """Ask the host for the memory of a backward pass: its own estimate knows only the forward pass.

    Other models are unloaded for it where need be, never the one that is being sampled. To be called in inference
    mode: weights that the host moves outside of it cannot be used again. Under dynamic VRAM there is nothing to ask
    for: the host gives weights' memory to whoever needs it, when it is needed.
    """
    managed = comfy.model_management
    if getattr(patcher, "is_dynamic", lambda: False)():
        return
    one = kept_by_an_image(patcher, latent_pixels)
    own = [m for m in managed.current_loaded_models if m.model is not None and patcher.is_clone(m.model)]
    managed.free_memory(min(images * one, max(TOGETHER, one)), patcher.load_device, keep_loaded=own)


def plain_attention(function: object, *arguments: object, **settings: object) -> Tensor:
    """PyTorch's own attention: every other kind of the host may lack a backward pass."""
    return attention_pytorch(*arguments, **settings)


@contextmanager
def checkpointed(network: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """While open, the blocks of the network recompute their activations in the backward pass."""
    if not wanted:
        yield
        return
    lists = [
        getattr(network, name, None)
        for name in ("input_blocks", "middle_block", "output_blocks", "joint_blocks", "double_blocks", "single_blocks")
    ]
    outer = [block for part in lists if part is not None for block in part]
    inner = (part for one in outer for part in (one if isinstance(one, torch.nn.Sequential) else [one]))
    with recomputing((part for part in inner if not is_layer(part)), of_copies=True):
        yield
