"""Who a network is: 16 hexadecimal digits from its weights, the same in every host that has loaded the same checkpoint.

Hosts name, order, view and store the same weights differently: 1x1 convolutions are linear layers elsewhere, a file in
float32 is held in float16, a table lies under a wrapper. So the digits come from the shapes, without sides of 1, and
from a few values of each tensor, rounded to float16; names and order do not count. Loads of one file in float32 and in
float16 agree. Those in bfloat16 or fp8 are other models: what is rounded more coarsely predicts something else, and no
rounding makes both agree, as a value between two steps of the coarser one may go either way.

Attention that is fused into one matrix here and lies in three there agrees for text encoders alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VALUES = 64  # of a tensor, evenly spaced

Named = tuple[str, Tensor, torch.dtype | None]  # a name, its weights, and the precision they are used in where known

# Of text encoders: what one host has and the next has not, or has transposed.
_NOT_EVERYWHERE = re.compile(r"(text_projection|logit_scale|position_ids|attn_mask)")
_LAYER = re.compile(r"\b(?:layers|resblocks)\.(\d+)\.")
_LAYERS = 23  # diffusers leaves out the last layer of Stable Diffusion 2.x's 24, which is not used


class Identity(str):
    """The digits of a network; ``former`` are those that release 0.1 gave the same network in the same host.

    >>> Identity("0123456789abcdef", "e6e99610c4").former
    'e6e99610c4'
    """

    former: str

    def __new__(cls, digits: str, former: str = "") -> Identity:
        made = super().__new__(cls, digits)
        made.former = former
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Identity:
        return self


@dataclass(frozen=True)
class Sample:
    """A tensor's name and shape, and up to 64 of its values, in float32 on the CPU."""

    name: str
    shape: tuple[int, ...]
    values: Tensor


def sampled(tensors: Iterable[Named]) -> list[Sample]:
    """A few values of each tensor; each device is read from once."""
    names, shapes, chosen = [], [], []
    for name, value, dtype in tensors:
        flat = value.detach().reshape(-1)
        names.append(name)
        shapes.append(tuple(value.shape))
        chosen.append(flat[:: max(1, flat.numel() // VALUES)][:VALUES].to(dtype or flat.dtype).float())
    read: list[Tensor] = [torch.empty(0)] * len(chosen)
    for device in {values.device for values in chosen}:
        places = [place for place, values in enumerate(chosen) if values.device == device]
        together = torch.cat([chosen[place] for place in places]).cpu()
        for place, values in zip(places, together.split([len(chosen[place]) for place in places]), strict=True):
            read[place] = values
    return [Sample(*told) for told in zip(names, shapes, read, strict=True)]


def fingerprint(samples: Iterable[Sample], prediction_type: str = "") -> str:
    """16 digits of a network, whatever its tensors are called.

    >>> conv, linear = torch.arange(6.0).view(2, 3, 1, 1), torch.arange(6.0).view(2, 3).half()
    >>> fingerprint(sampled([("a", conv, None)])) == fingerprint(sampled([("b", linear, None)]))
    True
    """
    told = (
        f"{[side for side in sample.shape if side != 1]}".encode() + sample.values.half().numpy().tobytes()
        for sample in samples
    )
    return digest(prediction_type.encode(), *sorted(told))


def named(samples: Iterable[Sample]) -> bytes:
    """Names, shapes and values as they are: where one program wrote all names, and what release 0.1 went by."""
    ordered = sorted(samples, key=lambda sample: sample.name)
    return b"".join(f"{sample.name}{sample.shape}".encode() + sample.values.numpy().tobytes() for sample in ordered)


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits of these bytes, one after another."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def of_module(module: nn.Module) -> Iterator[Named]:
    """All tensors of a module that holds its weights as it uses them. One that lies in two places is one: Forge has the
    tokens' table under a wrapper too.

    >>> table = nn.Embedding(2, 3)
    >>> wrapper = nn.Module()
    >>> wrapper.weight, wrapper.wrapped = table.weight, table
    >>> [name for name, *_ in of_module(wrapper)]
    ['weight']
    """
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value.detach(), None


def of_text_encoder(tensors: Iterable[Named]) -> Iterator[Named]:
    """Those that every host has of a text encoder, one for one: queries, keys and values apart."""
    for name, value, dtype in tensors:
        layer = _LAYER.search(name)
        if _NOT_EVERYWHERE.search(name) or (layer is not None and int(layer[1]) >= _LAYERS):
            continue
        parts = value.chunk(3) if "in_proj_" in name else (value,)
        yield from ((name, part, dtype) for part in parts)


def unpatched(tensors: Iterable[Named], kept: Callable[[str], Tensor | None]) -> Iterator[Named]:
    """The same, with what a host has ``kept`` of the weights that it has changed in place."""
    for name, value, dtype in tensors:
        before = kept(name)
        yield name, value if before is None else before, dtype
