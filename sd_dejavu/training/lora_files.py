"""LoRA files of every kind: what lies in one, which module each part is for, and how it changes a weight.

With W [out, in, ...] the weight, a = alpha / rank (1 without an alpha), a module makes of it W':

====== ================================== ===================================================================
kind   W'
====== ================================== ===================================================================
lora   W + a up down                      Hu et al., arXiv 2106.09685; with a middle part for convolutions: LoCon
loha   W + a (w1_a w1_b) * (w2_a w2_b)    element by element; Hyeon-Woo et al., arXiv 2108.06098
lokr   W + a kron(w1, w2)                 either may be a product of two; a = 1 where neither is
oft    R^T W, block by block              R = (I + Q) (I - Q)^-1, Q = B - B^T; Qiu et al., arXiv 2306.07280
boft   R_m ... R_1 W                      each R on other blocks, as a butterfly; Liu et al., arXiv 2311.06243
diff   W + diff
ia3    W + w W                            a number for each output or input; Liu et al., arXiv 2205.05638
====== ================================== ===================================================================

A DoRA (Liu et al., arXiv 2402.09353) has lengths m beside a lora, loha or lokr: W' m / |W'| row by row of outputs, or of
inputs, by the shape of m. LoHa, LoKr, and the layout of all these in files, are those of LyCORIS (Yeh et al., arXiv
2309.14859). At a strength s the weight is W + s (W' - W), as ComfyUI, Automatic1111 and Forge have it for a DoRA.
(For a DoRA over outputs ComfyUI and Forge divide by |W| where the paper and LyCORIS divide by |W'|.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kept.foreign import Unreadable, check_size, is_number, opened

LORA_BYTES = 16 << 30  # of one file
LORA_KEYS = 200_000  # in one file
_ADAPTERS = "lora_adapter_metadata"  # where diffusers notes the alphas of a file without alpha keys

_ENDINGS = tuple(
    (re.compile(rf"(.+?)(?:{pattern})"), part)
    for pattern, part in (
        (r"\.lora_down\.weight|\.lora_A(?:\.\w+)?\.weight|[._]lora\.down\.weight", "down"),
        (r"\.lora_up\.weight|\.lora_B(?:\.\w+)?\.weight|[._]lora\.up\.weight", "up"),
        (r"\.lora_linear_layer\.down\.weight", "down"),
        (r"\.lora_linear_layer\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "lengths"),
        (r"\.lora_magnitude_vector(?:\.\w+)*", "output_lengths"),
        *((rf"\.{part}", part) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
        *((rf"\.{part}", part) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
        *((rf"\.{part}", part) for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
        *((rf"\.{part}", part) for part in ("oft_blocks", "oft_diag", "rescale", "on_input")),
        (r"\.diff|\.w_norm", "diff"),
        (r"\.diff_b|\.b_norm", "bias"),
        (r"\.weight", "weight"),
    )
)
_OF_NO_KIND = ("alpha", "rescale", "weight")  # other files have keys that end so


@dataclass(frozen=True)
class Module:
    """What a file holds for one module of a model.

    ``kind`` is one of the table above, None where the file has an addition to the bias alone; ``parts`` are its
    tensors by what they are, ``alpha`` is None where the file names none. ``keys`` are the file's own.
    """

    name: str
    kind: str | None
    parts: Mapping[str, Tensor]
    alpha: float | None
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """All that a file holds: modules, and the keys that belong to no kind known here."""

    modules: tuple[Module, ...]
    unknown: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


# ---------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Contents:
    """The modules of a .safetensors file. Raises Unreadable, without its name, for what cannot be read or used."""
    try:
        with opened(path) as file:
            check_size(file.seek(0, 2), LORA_BYTES)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > LORA_KEYS:
                raise Unreadable(f"too many tensors: {len(names):,}, and at most {LORA_KEYS:,} are read")
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"it is broken: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_complex() or not _is_known(tensor.dtype):
            raise Unreadable(
                f"it holds numbers of a kind that is not read ({tensor.dtype}) in {name}: convert it first"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise Unreadable(f"it holds NaN or infinity in {name}: get it again, or take an earlier epoch")
    return modules_of(tensors, metadata)


def modules_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Contents:
    """The tensors of a file, grouped into modules in the order in which they come."""
    grouped: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, part = _split(key)
        grouped.setdefault(name, {})[part] = key
    alphas = _alphas_of_adapters(metadata or {})
    modules, unknown = [], []
    for name, keys in grouped.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        kind = _kind(parts)
        used = {*_KINDS[kind][1], "alpha", "lengths", "output_lengths", "bias"} if kind else {"bias"}
        unknown += [key for part, key in keys.items() if part not in used]
        if kind or "bias" in parts:
            alpha = float(parts["alpha"].flatten()[0]) if "alpha" in parts and parts["alpha"].numel() else None
            known = {part: tensor for part, tensor in parts.items() if part in used and part != "alpha"}
            if alpha is None and kind == "lora" and known["down"].dim():
                alpha = alphas(name, len(known["down"]))
            modules.append(Module(name, kind, known, alpha, tuple(k for p, k in keys.items() if p in used)))
        else:
            unknown += [key for part, key in keys.items() if part in used]
    return Contents(tuple(modules), tuple(unknown), tensors, metadata or {})


def _is_known(dtype: torch.dtype) -> bool:
    """Whether torch can make numbers of it: of two in one byte it cannot."""
    try:
        torch.empty(1, dtype=dtype).float()
    except RuntimeError:
        return False
    return True


def holds_lora(path: Path) -> bool:
    """Whether a file is a LoRA of any kind, by the names of its tensors; trainers keep other files beside theirs."""
    if not path.is_file():  # a pipe of that name would be waited for
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(_split(key)[1] not in ("", *_OF_NO_KIND) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _split(key: str) -> tuple[str, str]:
    """The name of a module and which part of it a key is; '' for no part that is known."""
    for ending, part in _ENDINGS:
        if found := ending.fullmatch(key):
            return found[1], part
    return key, ""


def _kind(parts: Mapping[str, Tensor]) -> str | None:
    """Of the parts of one module; None where they are of none, or not all there."""
    if {"down", "up"} <= parts.keys():
        return "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= parts.keys():
        return "loha" if ("hada_t1" in parts) == ("hada_t2" in parts) else None
    if all(f"lokr_{w}" in parts or {f"lokr_{w}_a", f"lokr_{w}_b"} <= parts.keys() for w in ("w1", "w2")):
        return "lokr"
    if "oft_blocks" in parts:
        return {3: "oft", 4: "boft"}.get(parts["oft_blocks"].dim())
    if "oft_diag" in parts:
        return "oft" if parts["oft_diag"].dim() == 3 else None
    if "diff" in parts:
        return "diff"
    return "ia3" if {"weight", "on_input"} <= parts.keys() else None


def _alphas_of_adapters(metadata: Mapping[str, str]) -> Callable[[str, int], float | None]:
    """(a module's name, its rank) -> the alpha that diffusers has noted for it in the file's metadata, or None."""
    try:
        told = json.loads(metadata.get(_ADAPTERS, "{}"))
    except (ValueError, RecursionError):
        told = {}

    def alpha(name: str, rank: int) -> float | None:
        part, _, module = name.partition(".")
        if not isinstance(told, dict):
            return None
        found: Any = told.get(f"{part}.lora_alpha")
        patterns = told.get(f"{part}.alpha_pattern")
        if isinstance(patterns, dict):
            found = next((value for end, value in patterns.items() if f".{module}".endswith(f".{end}")), found)
        if not is_number(found):
            return None
        return float(found) * (rank**0.5 if told.get(f"{part}.use_rslora") is True else 1.0)

    return alpha


# ------------------------------------------------------------------------------------------ the formulas


def changed(weight: Tensor, module: Module, strength: float = 1.0) -> Tensor:
    """The weight that the module makes of ``weight`` [out, in, ...] at a strength; computed in fp32, its dtype kept."""
    return _moved(weight, change(weight, module), strength)


def changed_bias(bias: Tensor, module: Module, strength: float = 1.0) -> Tensor:
    """The same of a bias [out]."""
    return _moved(bias, module.parts["bias"].float().to(bias.device).reshape(bias.shape), strength)


def change(weight: Tensor, module: Module) -> Tensor:
    """W' - W in fp32, as of the table above. Raises RuntimeError or ValueError where the module does not fit."""
    if module.kind is None:
        return torch.zeros_like(weight, dtype=torch.float32)
    own = weight.float()
    parts = {part: tensor.to(weight.device).float() for part, tensor in module.parts.items()}
    delta = _KINDS[module.kind][0](own, parts, module.alpha)
    if "output_lengths" in parts:
        return _with_lengths(own, delta, parts["output_lengths"].flatten())
    return _with_lengths(own, delta, parts["lengths"]) if "lengths" in parts else delta


def fits(weight: Tensor, module: Module, bias: Tensor | None = None) -> bool:
    """Whether the module's shapes are those of the weight (and of the bias where it adds to one); nothing is computed."""
    if any(tensor.numel() == 0 for tensor in module.parts.values()):  # a rank of 0
        return False
    empty = {part: torch.empty(tensor.shape, device="meta") for part, tensor in module.parts.items()}
    away = Module(module.name, module.kind, empty, module.alpha, module.keys)
    try:
        if module.kind == "ia3":  # which side it is of is a value, not a shape
            sides = weight.shape[1 if bool(module.parts["on_input"].flatten()[0]) else 0]
            if module.parts["weight"].numel() not in (1, sides):
                return False
        of_bias = "bias" not in empty or (bias is not None and changed_bias(bias.to("meta"), away).shape == bias.shape)
        return of_bias and change(weight.to("meta"), away).shape == weight.shape
    except (RuntimeError, ValueError, IndexError, TypeError):  # the last for parts without dimensions
        return False


def _moved(value: Tensor, by: Tensor, strength: float) -> Tensor:
    return (value.float() + strength * by).to(value.dtype)


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _lora(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    down, up = parts["down"].flatten(1), parts["up"].flatten(1)
    product = _tucker(parts["mid"], up.T, down) if "mid" in parts else up @ down
    return product.reshape(weight.shape) * _scale(alpha, len(down))


def _loha(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    def half(number: int) -> Tensor:
        a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        return _tucker(parts[f"hada_t{number}"], a, b) if "hada_t1" in parts else a @ b.flatten(1)

    return (half(1) * half(2)).reshape(weight.shape) * _scale(alpha, len(parts["hada_w1_b"]))


def _lokr(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    rank = next((len(parts[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        second = _tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        second = (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])
    first = first.reshape(*first.shape, *[1] * (second.dim() - first.dim()))
    scale = 1.0 if rank is None else _scale(alpha, rank)
    return torch.kron(first, second.contiguous()).reshape(weight.shape) * scale


def _oft(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    rotations = parts["oft_diag"] if "oft_diag" in parts else _rotations(parts["oft_blocks"], weight, alpha)
    blocks = weight.reshape(len(rotations), -1, *weight.shape[1:])
    turned = torch.einsum("k n m, k n ... -> k m ...", rotations, blocks).reshape(weight.shape)
    return _rescaled(turned, parts) - weight


def _boft(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    turned, size = weight, parts["oft_blocks"].shape[-1]
    for stage, rotations in enumerate(_rotations(parts["oft_blocks"], weight, alpha)):
        apart = 2**stage * (size // 2)  # rows that a stage brings together lie so far from one another
        rows = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        rows = torch.einsum("b i j, b j ... -> b i ...", rotations, rows).flatten(0, 1)
        turned = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(turned, parts) - weight


def _diff(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    return parts["diff"].reshape(weight.shape)


def _ia3(weight: Tensor, parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    over_inputs = bool(parts["on_input"].flatten()[0]) if not weight.is_meta else parts["weight"].numel() != len(weight)
    shape = (1, -1) if over_inputs else (-1, 1)
    return weight * parts["weight"].reshape(*shape, *[1] * (weight.dim() - 2))


def _rotations(blocks: Tensor, weight: Tensor, alpha: float | None) -> Tensor:
    """Cayley's rotations of skew-symmetric blocks; an alpha limits how far all of them together turn."""
    skew = blocks - blocks.transpose(-1, -2)
    if alpha is not None and alpha > 0:
        skew = skew * (alpha * len(weight) / (skew.norm() + 1e-8)).clamp(max=1.0)
    one = torch.eye(blocks.shape[-1], device=blocks.device)
    inverse: Tensor = torch.linalg.inv(one - skew)
    return (one + skew) @ inverse


def _rescaled(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if "rescale" not in parts:
        return weight
    return weight * parts["rescale"].reshape(-1, *[1] * (weight.dim() - 1))


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """Core [r, q, ...], out [r, O], into [q, I] -> [O, I, ...]."""
    return torch.einsum("r q ..., r o, q i -> o i ...", core, out, into)


def _with_lengths(weight: Tensor, delta: Tensor, lengths: Tensor) -> Tensor:
    """W' m / |W'| - W; lengths of outputs [out], [out, 1, ...], or of inputs [1, in, 1, ...]."""
    moved = weight + delta
    over_outputs = lengths.dim() == 1 or len(lengths) == len(weight)
    kept = 0 if over_outputs else 1
    norm = torch.linalg.vector_norm(moved, dim=[a for a in range(weight.dim()) if a != kept], keepdim=True)
    scale: Tensor = lengths.reshape(norm.shape) / (norm + torch.finfo(norm.dtype).eps)
    return moved * scale - weight


_KINDS: dict[str, tuple[Callable[[Tensor, Mapping[str, Tensor], float | None], Tensor], Sequence[str]]] = {
    "lora": (_lora, ("down", "up", "mid")),
    "loha": (_loha, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    "lokr": (_lokr, ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "oft": (_oft, ("oft_blocks", "oft_diag", "rescale")),
    "boft": (_boft, ("oft_blocks", "rescale")),
    "diff": (_diff, ("diff",)),
    "ia3": (_ia3, ("weight", "on_input")),
}  # how each changes a weight, and the parts that are its own


# ------------------------------------------------------------------------------------------------ names

_BEFORE_NETWORK = re.compile(r"(?:lora|lycoris|unet|transformer|base_model_model|model|diffusion_model)_")
_OF_ENCODER = re.compile(r"(?:lora_)?(?:te|text_encoder_?)(\d?)_(.+)")
_OF_ADAPTERS = ((re.compile(r"_processor_"), "_"), (re.compile(r"_to_out$"), "_to_out_0"))  # not in modules' names
_OF_CLIP = ((re.compile(r"_to_out$"), "_out_proj"), (re.compile(r"_to_([qkv])$"), r"_\1_proj"))


class Places:
    """The modules of a model by all names that trainers give them.

    ``parts`` are the model's parts with the names of their modules: the ``network``, and text encoders called
    text_encoder, text_encoder_2, ... ``also`` are further names of the network's modules. kohya writes them as
    ``lora_unet_down_blocks_0_...`` and ``lora_te2_...``, diffusers and peft as ``unet.down_blocks.0. ...``,
    ``transformer. ...``, ``base_model.model. ...``, OneTrainer as ``lora_transformer_...``, LyCORIS as ``lycoris_...``.
    """

    def __init__(self, network: str, parts: Mapping[str, Iterable[str]], also: Mapping[str, str] | None = None) -> None:
        self._network = network
        self._modules = {part: {_flat(name): name for name in names} for part, names in parts.items()}
        for other, name in (also or {}).items():
            self._modules[network].setdefault(_flat(other), name)
        for part in self._modules.keys() - {network}:
            short = {flat.removeprefix("text_model_"): name for flat, name in self._modules[part].items()}
            self._modules[part] |= short

    def of(self, name: str) -> tuple[str, str] | None:
        """(part, module) that a file calls so, None where there is none."""
        flat = _flat(name)
        if found := _OF_ENCODER.fullmatch(flat):
            part = "text_encoder" if found[1] in ("", "1") else f"text_encoder_{found[1]}"
            if part not in self._modules:  # T5 is Flux' second, and called the third
                part = max(self._modules.keys() - {self._network}, default="")
            rest = _replaced(found[2].removeprefix("base_model_model_").removeprefix("text_model_"), _OF_CLIP)
            module = self._modules.get(part, {}).get(rest)
            return None if module is None else (part, module)
        known = self._modules[self._network]
        while flat not in known and _replaced(flat, _OF_ADAPTERS) not in known:
            if not (before := _BEFORE_NETWORK.match(flat)):
                return None
            flat = flat[before.end() :]
        return self._network, known[flat if flat in known else _replaced(flat, _OF_ADAPTERS)]


def _replaced(text: str, patterns: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, instead in patterns:
        text = pattern.sub(instead, text)
    return text


def _flat(name: str) -> str:
    return name.replace(".", "_").lower()


def told_keys(used: int, of: int, unused: Iterable[str]) -> str:
    """'240 of 264 keys used, not the others, such as ...'."""
    first: Any = next(iter(unused), "")
    return f"{used} of {of} keys used" + (f", not the others, such as {first}" if used < of else "")
