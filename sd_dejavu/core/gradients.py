"""Gradients of the first step's magnitude, in the model's own precision and in little memory.

The loss is the mean over the images of || Delta ||_2; an image that has reached a target adds nothing to the
gradients. It is a sum over images, so they go through the network one
after another (a few together where they are small) and their gradients add up exactly; the text encoder's graph is
made once and gone back through once, with the sum. Values, losses and gradients are fp32; the network computes in
what it was loaded in. In half precision small gradients would become 0, so each loss is scaled up by a power of two
before the backward pass and its gradients down after it, which is exact (Micikevicius et al., *Mixed Precision
Training*, ICLR 2018); a scale at which gradients overflow is lowered, and the pass made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..detectors.magnitude import magnitude
from .conditioning import Conditioning
from .denoiser import Denoiser, Model, Predictions
from .memory import OutOfMemory, in_pieces, release, telling

R = TypeVar("R")

BYTES_A_LATENT_PIXEL = 320_000  # kept for the backward pass in half precision: 180,000 in SD1.5, 313,000 in SDXL
TOGETHER = 2**30  # bytes kept for images that go through the network together
RECOMPUTED_FROM = 3 * 2**30  # bytes kept for one image: more would not fit beside the weights on a card of 12 GB
TRIES, STEP = 4, 2.0**4


@dataclass
class LossScale:
    """What losses are multiplied by before the backward pass; once lowered it stays so for the iterations to come."""

    factor: float = 2.0**10


@dataclass(frozen=True)
class Taken:
    """The conditioning at which gradients were taken (without a graph), magnitudes [B], and dL/d leaf of each leaf."""

    conditioning: Conditioning
    magnitudes: Tensor
    gradients: tuple[Tensor, ...]

    @property
    def loss(self) -> float:
        return float(self.magnitudes.mean())


def value_and_gradients(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    base: Tensor,
    rebuild: Callable[[Sequence[Tensor]], Conditioning],
    leaves: Sequence[Tensor],
    at_once: int | None = None,
    scale: LossScale | None = None,
    target: float = -math.inf,
) -> Taken:
    """Magnitudes at x [B, C, H, W], sigma [B], and the gradient of their mean at each of ``leaves``, in fp32.

    ``base`` [B, C, H, W] is the denoised prediction without the prompt; ``rebuild`` makes the conditioning from the
    leaves, which require gradients. Images below ``target`` add nothing to the gradients. At most ``at_once``
    images share a pass. A magnitude that is not finite is returned as it is. Raises OutOfMemory where one image
    does not fit, and ValueError where gradients are not finite under any scale.
    """
    scale = scale or LossScale()
    with torch.enable_grad():
        made = rebuild(leaves)
    extras = [name for name, value in made.extras.items() if value.requires_grad]
    joints = [made.rows, *(made.extras[name] for name in extras)]
    cut = [joint.detach().requires_grad_(True) for joint in joints]
    given = made.with_rows(cut[0], {**made.extras, **dict(zip(extras, cut[1:], strict=True))})

    def one_pass(start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        def values() -> Tensor:
            denoised = denoiser(x[start:stop], sigma[start:stop], given.of_images(start, stop, len(x)))
            return magnitude(Predictions(denoised, base[start:stop], sigma[start:stop]))

        return scaled_gradients(values, cut, scale, target)

    magnitudes, totals = [], [torch.zeros_like(joint, dtype=torch.float32) for joint in cut]
    for found, parts in in_pieces(one_pass, len(x), given.images_at_once(len(x), together(x, at_once))):
        magnitudes.append(found)
        totals = [total + part / len(x) for total, part in zip(totals, parts, strict=True)]
    detached = {name: value.detach() for name, value in made.extras.items()} if extras else made.extras
    conditioning = made.with_rows(made.rows.detach().float().clone(), detached)
    return Taken(conditioning, torch.cat(magnitudes), _through(joints, totals, leaves))


def together(x: Tensor, at_once: int | None = None) -> int:
    """How many images of x [B, C, H, W] share a backward pass: at most ``at_once``, and as memory allows."""
    fit = TOGETHER // (BYTES_A_LATENT_PIXEL * x[0, 0].numel())
    return max(1, fit if at_once is None else min(fit, at_once))


def scaled_gradients(
    values_of: Callable[[], Tensor], leaves: Sequence[Tensor], scale: LossScale, target: float = -math.inf
) -> tuple[Tensor, list[Tensor]]:
    """``values_of()`` [B] without their graph, and the gradients of the sum of those that are not below ``target``, in fp32.

    They are 0 at a leaf that is not used.

    Raises ValueError where gradients are not finite under any scale, though the values are.
    """
    for _ in range(TRIES):
        with torch.enable_grad():
            values = values_of()
            found = torch.autograd.grad(values.clamp_min(target).sum() * scale.factor, leaves, allow_unused=True)
        gradients = [_unscaled(g, leaf, scale.factor) for g, leaf in zip(found, leaves, strict=True)]
        values = values.detach()
        if not bool(values.isfinite().all()) or all(bool(g.isfinite().all()) for g in gradients):
            return values, gradients
        del found, gradients
        scale.factor /= STEP
    raise ValueError(NOT_FINITE)


NOT_FINITE = "the gradients are not finite (NaN or infinity) in this precision: use bfloat16 or float32"


def _unscaled(gradient: Tensor | None, leaf: Tensor, factor: float) -> Tensor:
    return torch.zeros_like(leaf, dtype=torch.float32) if gradient is None else gradient.float() / factor


def _through(joints: Sequence[Tensor], above: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients at the leaves from those at what was made of them, in a backward pass of its own scale."""
    largest = max(float(gradient.abs().max()) for gradient in above)
    sound = math.isfinite(largest)
    factor = 2.0 ** (6 - round(math.log2(largest))) if sound and largest else 1.0
    for attempt in range(TRIES):
        given = [(gradient * factor).to(joint.dtype) for gradient, joint in zip(above, joints, strict=True)]
        found = torch.autograd.grad(joints, leaves, given, retain_graph=attempt < TRIES - 1, allow_unused=True)
        gradients = tuple(_unscaled(g, leaf, factor) for g, leaf in zip(found, leaves, strict=True))
        if not sound or all(bool(g.isfinite().all()) for g in gradients):
            return gradients
        factor /= STEP
    raise ValueError(NOT_FINITE)


def with_gradients(model: Model, work: Callable[[], R], checkpointing: bool = False) -> R:
    """``work()`` while the model can be differentiated; where memory runs out, once more with less of it.

    ``checkpointing`` recomputes activations from the first try on.
    """
    try:
        with telling(), model.differentiable(checkpointing):
            return work()
    except OutOfMemory:
        if checkpointing:
            raise
    release()
    with telling(), model.differentiable(True):
        return work()


@contextmanager
def recomputing(modules: Iterable[torch.nn.Module], of_copies: bool = False) -> Iterator[None]:
    """While open, these modules keep nothing but their inputs for the backward pass, and compute the rest again there.

    ``of_copies``: of copies of their inputs, for networks that add to those in place, in a block and after it.
    """
    before: list[tuple[torch.nn.Module, object]] = []
    try:
        for module in modules:
            before.append((module, vars(module).get("forward")))
            again = _again_of_copies if of_copies else checkpoint
            module.forward = partial(again, module.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for module, kept in reversed(before):
            if kept is None:
                del module.forward  # the class's own shows again
            else:
                module.forward = kept  # type: ignore[assignment]


def _again_of_copies(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """As PyTorch's own checkpoint, whose settings are among ``named``."""

    def run(*given: Any, **more: Any) -> Any:
        return forward(*map(_copied, given), **{name: _copied(value) for name, value in more.items()})

    return checkpoint(run, *map(_copied, arguments), **{name: _copied(value) for name, value in named.items()})


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
