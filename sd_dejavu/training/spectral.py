"""A LoRA's file with parts of its update held back: its spectral channels, and three ways to weigh them.

The update of a weight W is D = W' - W = sum_i s_i u_i v_i^T (its singular value decomposition); channel i is held back by
a factor f_i in 0..1 on s_i. With ``kept``, a number in 0..1:

=============== ===================================================================================================
way             f
=============== ===================================================================================================
strength        ``kept`` for all: what every host's slider does
text layers     ``kept`` for the layers that read the prompt (cross-attention, and the text encoders), 1 for the rest
base-anchored   1 for the share ``kept`` of each layer's channels (one at least) that agree most with the weight, else 0
=============== ===================================================================================================

'base-anchored' is Base-Anchored Filtering (Zhe et al., arXiv 2605.10439): channels outside the principal subspace of the
pretrained weight W = P S Q^T are taken for what was memorised. The agreement with its first k directions on either side
is |P_k^T u_i|^2 |Q_k^T v_i|^2. The paper's abstract names neither k nor how many channels stay: those here, and the
product of both sides, are our own. 'text layers' is our own: that a caption brings *its* image about must pass through
the layers that read captions, while a palette or a way of drawing can lie in the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .lora_files import Contents, Module, change, fits

Way = Literal["strength", "text layers", "base-anchored"]
WAYS: tuple[Way, ...] = get_args(Way)
SUBSPACE = 0.5  # share of a weight's directions that are its principal ones
_NEGLIGIBLE = 1e-6  # of the largest singular value: what rounding leaves
_WEIGHT, _NETWORK = ".weight", "diffusion_model."
_ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
_CROSS = "attn2"  # what cross-attention is called in a UNet, by diffusers and by Stability AI


@dataclass(frozen=True)
class Place:
    """Which weight of a model a file's module is for: ``part`` of the pipeline, ``name`` there, the base ``weight``.

    ``cut`` says that ``weight`` is only a part of what is called so, or in another order: the module's own name alone tells.
    """

    part: str
    name: str
    weight: Tensor
    cut: bool = False

    @property
    def reads_text(self) -> bool:
        return self.part.startswith("text_encoder") or _CROSS in self.name.split(".")


@dataclass(frozen=True)
class HostPart:
    """A part of a model in a host that knows for each name that files give a module which weight it is for.

    ``keys`` has the weight's name for it, or (name, (dimension, start, length) or None, ...) where it is for a part of that
    weight, or for all of it in another order;
    ``tensor`` gives what is called so, without LoRAs, None where there is nothing.
    """

    part: str
    keys: Mapping[str, Any]
    tensor: Callable[[str], Tensor | None]


def places_by_keys(contents: Contents, parts: Iterable[HostPart]) -> dict[str, Place]:
    """The place of each module of a file that a host would put on its model, by name.

    >>> from .lora_files import modules_of
    >>> contents = modules_of({"x.diff": torch.ones(1, 2), "y.diff": torch.ones(1, 2)})
    >>> joined = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> part = HostPart("unet", {"x": ("diffusion_model.a.attn2.weight", (0, 1, 1))}, lambda name: joined)
    >>> places_by_keys(contents, [part])
    {'x': Place(part='unet', name='a.attn2', weight=tensor([[3., 4.]]), cut=True)}
    """
    known, found = list(parts), dict[str, Place]()
    for module in contents.modules:
        for one in known:
            if (key := one.keys.get(module.name)) is None:
                continue
            name, cut = (key, None) if isinstance(key, str) else key[:2]
            weight, bias = one.tensor(name), one.tensor(f"{name.removesuffix(_WEIGHT)}.bias")
            if weight is not None and cut is not None:
                weight = weight.narrow(*cut)
            if weight is not None and fits(weight, module, bias):
                called = _place(one.part, name.removesuffix(_WEIGHT))
                found[module.name] = Place(*called, weight.detach().cpu(), not isinstance(key, str))
                break
    return found


def _place(part: str, name: str) -> tuple[str, str]:
    """(part, name) as trainers know them, of what a host calls clip_g.transformer.text_model..., diffusion_model...."""
    encoder, _, own = name.partition(".transformer.")
    return (_ENCODERS[encoder], own) if encoder in _ENCODERS else (part, name.removeprefix(_NETWORK))


@dataclass(frozen=True)
class Channels:
    """Left [out, R] and right [R, in] singular vectors of an update, and its singular values [R], largest first."""

    left: Tensor
    values: Tensor
    right: Tensor


def channels(update: Tensor) -> Channels:
    """Of an update [out, in, ...], what is rounding left out.

    >>> channels(torch.tensor([[3.0, 0.0], [0.0, 0.0]])).values
    tensor([3.])
    """
    left, values, right = torch.linalg.svd(update.double().flatten(1), full_matrices=False)
    rank = int((values > _NEGLIGIBLE * values[0]).sum())
    return Channels(left[:, :rank].float(), values[:rank].float(), right[:rank].float())


def agreement(weight: Tensor, found: Channels, subspace: float = SUBSPACE) -> Tensor:
    """|P_k^T u_i|^2 |Q_k^T v_i|^2, [R], with the first ``subspace`` (a share in 0..1) of the weight's directions.

    >>> found = channels(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    >>> agreement(torch.diag(torch.tensor([1.0, 5.0])), found, 0.5)  # the weight's first direction is the second axis
    tensor([1.])
    """
    left, values, right = torch.linalg.svd(weight.float().flatten(1), full_matrices=False)
    k = max(1, math.ceil(subspace * len(values)))
    both: Tensor = (left[:, :k].T @ found.left).square().sum(0) * (right[:k] @ found.right.T).square().sum(0)
    return both


class Update:
    """What a LoRA adds to a model, ready to be held back in any way. Decompositions are made once, when asked for."""

    def __init__(self, contents: Contents, places: Mapping[str, Place]) -> None:
        self._contents, self._places = contents, places
        self._modules = [module for module in contents.modules if module.name in places]
        # Automatic1111 knows the first of two text encoders by its number alone, and one alone without.
        two = any(place.part == "text_encoder_2" for place in places.values())
        self._encoder = "te1" if two else "te"
        self._channels: dict[str, Channels] = {}
        self._agreement: dict[str, Tensor] = {}
        if not self._modules:
            raise ValueError("the LoRA holds nothing for this model: it was made for another kind of model")

    def acts(self, way: Way) -> bool:
        """Whether this way can hold anything back, and leaves anything."""
        text = [self._places[module.name].reads_text for module in self._modules]
        return way != "text layers" or (any(text) and not all(text))

    def tensors(self, way: Way, kept: float) -> dict[str, Tensor]:
        """The tensors of a file: modules that stay whole as they came, others as kohya writes a LoRA, none for those that
        are held back altogether.

        Raises ValueError for a share outside 0..1.
        """
        if not 0 <= kept <= 1:
            raise ValueError(f"what is kept must be a share from 0 to 1, not {kept:g}")
        found: dict[str, Tensor] = {}
        for module in self._modules:
            found |= self._held_back(module, way, kept)
        return found

    def _held_back(self, module: Module, way: Way, kept: float) -> dict[str, Tensor]:
        place = self._places[module.name]
        if kept == 1 or (way == "text layers" and not place.reads_text):
            return {key: self._contents.tensors[key] for key in module.keys}
        if way == "base-anchored":
            return self._anchored(module, place, kept)
        return self._scaled(module, place, kept) if kept else {}

    def _anchored(self, module: Module, place: Place, kept: float) -> dict[str, Tensor]:
        if module.kind is None or place.weight.dim() < 2:  # biases and norms have no directions
            return {key: self._contents.tensors[key] for key in module.keys}
        own = self._channels_of(module, place)
        if module.name not in self._agreement:
            self._agreement[module.name] = agreement(place.weight, own)
        best = self._agreement[module.name].argsort(descending=True, stable=True)
        factors = torch.zeros(len(own.values))
        factors[best[: max(1, round(kept * len(best)))]] = 1.0
        return {
            **_written(self._name(module, place), own, factors, place.weight, _dtype(module)),
            **self._bias(module, place, 1.0),
        }

    def _scaled(self, module: Module, place: Place, kept: float) -> dict[str, Tensor]:
        name, dtype = self._name(module, place), _dtype(module)
        if module.kind is None:
            return self._bias(module, place, kept)
        if place.weight.dim() < 2:
            own = {f"{name}.diff": (kept * change(place.weight, module)).to(dtype)}
        else:
            found = self._channels_of(module, place)
            own = _written(name, found, torch.full((len(found.values),), kept), place.weight, dtype)
        return {**own, **self._bias(module, place, kept)}

    def _channels_of(self, module: Module, place: Place) -> Channels:
        if module.name not in self._channels:
            self._channels[module.name] = channels(change(place.weight, module))
        return self._channels[module.name]

    def _bias(self, module: Module, place: Place, kept: float) -> dict[str, Tensor]:
        if "bias" not in module.parts:
            return {}
        return {f"{self._name(module, place)}.diff_b": (kept * module.parts["bias"].float()).to(_dtype(module))}

    def _name(self, module: Module, place: Place) -> str:
        """kohya's (``lora_unet_...``, ``lora_te_...``), as the file has it where it is that, or kohya has none."""
        if module.name.startswith("lora_") or place.cut:
            return module.name
        part = self._encoder if place.part == "text_encoder" else place.part.replace("text_encoder_", "te")
        return f"lora_{part}_{place.name.replace('.', '_')}"


def _written(name: str, found: Channels, factors: Tensor, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A LoRA's module in kohya's names: up and down share each singular value, so that neither leaves half precision."""
    stay = factors > 0
    if not bool(stay.any()):
        return {}
    root = (found.values * factors)[stay].sqrt()
    up, down = found.left[:, stay] * root, root[:, None] * found.right[stay]
    kernel = weight.shape[2:]
    return {
        f"{name}.lora_up.weight": up.reshape(*up.shape, *[1] * len(kernel)).to(dtype).contiguous(),
        f"{name}.lora_down.weight": down.reshape(len(down), weight.shape[1], *kernel).to(dtype).contiguous(),
        f"{name}.alpha": torch.tensor(float(len(root))),
    }


def _dtype(module: Module) -> torch.dtype:
    """The file's own, but of two bytes at least: in one the channels would be others."""
    found = next((part.dtype for part in module.parts.values() if part.is_floating_point()), torch.float32)
    return found if found.itemsize > 1 else torch.float16
