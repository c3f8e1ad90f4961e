"""Run by a host's own Python, in its folder: gradients while the host keeps weights as it does under dynamic VRAM.

Stand-ins take the places of what needs a card: each layer's resident weight lies in plain attributes (``_v_weight``,
``_v_bias``), made in inference mode; it is handed out in memory that the next layer takes over, and that is spoilt as
soon as it is given back. Prints one JSON object. Without a pytest of its own: the host's environment has none.

    cd ComfyUI && venv/bin/python gradient_probe.py PACK --cpu
"""

from __future__ import annotations

import copy
import json
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

pack = sys.argv.pop(1)
sys.path.insert(0, ".")  # the host's own modules before ours: the pack has a folder called nodes
sys.path.append(pack)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402

from sd_dejavu.hosts import aliases  # noqa: E402
from sd_dejavu.hosts.comfyui import gradients  # noqa: E402
from sd_dejavu.hosts.comfyui.model import fingerprint  # noqa: E402

POOL = 2**16  # bytes: more than any weight here


class Net(torch.nn.Module):
    """Every kind of layer that diffusion networks have, and a parameter that no layer holds."""

    def __init__(self, ops, rms: bool) -> None:
        super().__init__()
        self.conv = ops.Conv2d(4, 8, 3, padding=1)
        self.down = ops.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.wrapped = ops.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.deep = ops.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))
        self.line = ops.Conv1d(8, 8, 3, padding=1)
        self.group = ops.GroupNorm(4, 8)
        self.layer = ops.LayerNorm(8)
        self.bare = ops.LayerNorm(8, elementwise_affine=False)
        self.rms = ops.RMSNorm(8) if rms else None
        self.up = ops.Linear(8, 16)
        self.back = ops.Linear(16, 8, bias=False)
        self.words = ops.Embedding(5, 8)
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.group(self.conv(x))
        x = self.wrapped(torch.nn.functional.silu(self.down(x)))
        x = self.deep(x[:, :, None])[:, :, 0]
        rows = self.layer(x.flatten(2).transpose(1, 2))
        rows = rows + self.line(rows.transpose(1, 2)).transpose(1, 2)
        rows = rows + self.words(torch.tensor([[1, 2]]), out_dtype=rows.dtype).sum(1, keepdim=True)
        rows = self.bare(rows if self.rms is None else self.rms(rows))
        rows += self.back(torch.nn.functional.gelu(self.up(rows)))  # in place, as the host's own encoder does
        return (rows * comfy.ops.cast_to_input(self.scale, rows)).square().mean() + rows.sum() * 0.1


class Spoilt:
    """The host's cast, with weights in one piece of memory that every layer uses after the other."""

    def __init__(self) -> None:
        self.pool = torch.empty(POOL, dtype=torch.uint8)
        self.open = self.casts = 0
        self.wrong_mode = self.wrong_thread = False

    def cast(self, s, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False, **more):
        self.casts += 1
        self.wrong_mode |= not torch.is_inference_mode_enabled()
        self.wrong_thread |= threading.current_thread() is not threading.main_thread()
        dtype = dtype or (input.dtype if input is not None else torch.float32)
        self.spoil()
        weight = self._placed(s._v_weight, dtype, 0)
        for function in s.weight_function:
            weight = function(weight)
        bias = None if s._v_bias is None else self._placed(s._v_bias, dtype, POOL // 2)
        self.open += 1
        return (weight, bias, ("stream", None, None)) if offloadable else (weight, bias)

    def give_back(self, s, weight, bias, stream) -> None:
        self.open -= 1
        self.spoil()

    def spoil(self) -> None:
        with torch.inference_mode():
            self.pool.fill_(255)  # NaN in every floating dtype

    def _placed(self, value, dtype, start):
        size = value.numel() * torch.empty((), dtype=dtype).element_size()
        place = self.pool[start : start + size].view(dtype).view(value.shape)
        place.copy_(value)
        return place


@contextmanager
def spoiling(stand_in):
    names = ("cast_bias_weight", *(["uncast_bias_weight"] if hasattr(comfy.ops, "uncast_bias_weight") else []))
    before = {name: getattr(comfy.ops, name) for name in names}
    comfy.ops.cast_bias_weight = stand_in.cast
    if len(names) > 1:
        comfy.ops.uncast_bias_weight = stand_in.give_back
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(comfy.ops, name, function)


def state(net):
    return {name: (id(value), value.is_inference()) for name, value in net.named_parameters()}


def gradient_of(net, x, context):
    with context:
        leaf = x.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(net(leaf), leaf)
    return found.float()


def compare(weight_dtype, dtype, with_lora):
    """Our gradient against autograd's through a plain network of the same weights."""
    torch.manual_seed(0)
    ops = comfy.ops.manual_cast
    rms = hasattr(torch.nn.functional, "rms_norm")
    with torch.inference_mode(False):
        plain = Net(comfy.ops.disable_weight_init, rms)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.copy_(torch.randn(parameter.shape).to(weight_dtype).float())
        plain.requires_grad_(False)
        x = torch.randn(2, 4, 8, 8)
        delta = torch.randn(16, 8)
        expected_net = copy.deepcopy(plain)
        if with_lora:
            expected_net.up.weight += 0.3 * delta
        expected_net.to(dtype)
        leaf = x.to(dtype).clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(expected_net(leaf), leaf)
    with torch.inference_mode():
        net = Net(ops, rms)
        stand_in = Spoilt()
        for name, module in net.named_modules():
            known = dict(plain.named_modules())[name]
            if gradients.is_layer(module) and module.weight is not None:
                module.weight = torch.nn.Parameter(known.weight.to(weight_dtype), requires_grad=False)
                module._v_weight = known.weight.to(weight_dtype)
                module._v_bias = None if module.bias is None else known.bias.clone()
                module.comfy_cast_weights = True
        net.scale = torch.nn.Parameter(plain.scale.clone(), requires_grad=False)
        if with_lora:
            net.up.weight_function = [lambda weight: weight + 0.3 * delta.to(weight)]
        kept = state(net)
        with spoiling(stand_in):
            found = gradient_of(net, x.to(dtype), gradients.differentiable([net]))
        told = {
            "open": stand_in.open if hasattr(comfy.ops, "uncast_bias_weight") else 0,
            "casts": stand_in.casts,
            "wrong_mode": stand_in.wrong_mode,
            "wrong_thread": stand_in.wrong_thread,
            "kept": kept == state(net),
            "patched": sum("forward" in vars(module) for module in net.modules()),
        }
        with spoiling(stand_in):  # the stand-in does spoil a gradient whose graph keeps the weights
            told["graph that keeps weights"] = kept_by_the_graph(net, x.to(dtype), expected)
    return {"worst": float((found - expected.float()).abs().max() / expected.float().abs().max()), **told}


@contextmanager
def keeping(net):
    with torch.inference_mode(False), torch.enable_grad(), aliases.aliased([net]):
        yield


def kept_by_the_graph(net, x, expected):
    try:
        found = gradient_of(net, x, keeping(net))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "right" if torch.allclose(found, expected.float(), rtol=1e-3) else "wrong"


class GGMLTensor(torch.Tensor):
    """What a pack for quantised files keeps its weights in."""


class ForeignLinear(comfy.ops.manual_cast.Linear):
    def forward_comfy_cast_weights(self, input):
        return torch.nn.functional.linear(input, self.weight.as_subclass(torch.Tensor) * 2, self.bias)


def refusals():
    told = {}
    with torch.inference_mode():
        layers = {"foreign layer": ForeignLinear(4, 4), "foreign weights": comfy.ops.manual_cast.Linear(4, 4)}
        layers["foreign weights"].weight = torch.nn.Parameter(
            torch.randn(4, 4).as_subclass(GGMLTensor), requires_grad=False
        )
        for name, layer in layers.items():
            try:
                gradient_of(layer, torch.randn(1, 4), gradients.differentiable([layer]))
            except ValueError as error:
                told[name] = str(error)
            told[f"{name}: without gradients"] = "forward" not in vars(layer) and bool(layer(torch.ones(1, 4)).numel())
    return told


def fingerprints():
    """Of weights held in fp8, and of the same as they lie in their file, to be cast to fp8 on their way to the card."""
    found = {}
    with torch.inference_mode():
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).half()
        kinds = {"file": weight, "held": weight.to(torch.float8_e4m3fn), "cast on the way": weight}
        for name, value in kinds.items():
            layer = torch.nn.Linear(16, 16, bias=False)
            layer.weight = torch.nn.Parameter(value, requires_grad=False)
            layer.weight_comfy_model_dtype = value.dtype if name != "cast on the way" else torch.float8_e4m3fn
            model = torch.nn.Module()
            model.diffusion_model = torch.nn.ModuleDict({"layer": layer})
            sampling = comfy.model_sampling.EPS()
            patcher = SimpleNamespace(model=model, patches={}, patches_uuid=name, backup={}, attachments={})
            patcher.get_model_object = {"model_sampling": sampling}.get
            found[name] = fingerprint(patcher)
    return found


if __name__ == "__main__":
    cases = {
        "fp32": (torch.float32, torch.float32),
        "fp16": (torch.float16, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "fp8": (torch.float8_e4m3fn, torch.float32),
    }
    found = {
        f"{name}{', LoRA' if lora else ''}": compare(*kinds, lora) for name, kinds in cases.items() for lora in (0, 1)
    }
    print(json.dumps({"cases": found, "refusals": refusals(), "fingerprints": fingerprints()}))
