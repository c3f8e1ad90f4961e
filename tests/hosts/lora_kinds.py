"""LoRA files of every kind for one model: on a linear layer, a kernel and a layer of the text encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Modules as diffusers calls them, with their outputs and inputs; the kernel's are equal. All are multiples of 16."""

    linear: str
    outputs: int
    inputs: int
    kernel: str
    channels: int
    text: str
    text_outputs: int
    text_inputs: int


def kinds(at: Places) -> dict[str, dict[str, Tensor]]:
    """A file of each kind. ComfyUI lets an OFT turn by a strength twice, and divides a DoRA over outputs by the length of
    the weight before it, where the papers and LyCORIS do not: those are tried at full strength, and over inputs."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int, by: float = 0.25) -> Tensor:
        return torch.randn(*shape, generator=rng) * by

    def kohya(module: str, before: str = "lora_unet_", **parts: Tensor) -> dict[str, Tensor]:
        return {f"{before}{module.replace('.', '_')}.{part.replace('__', '.')}": t for part, t in parts.items()}

    def plain(module: str, out: int, into: int, before: str = "lora_unet_") -> dict[str, Tensor]:
        up, down = randn(out, 4), randn(4, into)
        return kohya(module, before, lora_up__weight=up, lora_down__weight=down, alpha=torch.tensor(3.0))

    out, into, c = at.outputs, at.inputs, at.channels
    text = plain(at.text, at.text_outputs, at.text_inputs, "lora_te_")
    linear = plain(at.linear, out, into)
    a = {f"hada_w{n}_a": randn(c, 4, by=0.3) for n in (1, 2)}
    b = {f"hada_w{n}_b": randn(4, c * 9, by=0.3) for n in (1, 2)}
    core = {f"hada_w{n}_{x}": randn(4, c, by=0.4) for n in (1, 2) for x in "ab"}
    core |= {f"hada_t{n}": randn(4, 4, 3, 3, by=0.4) for n in (1, 2)}
    alpha = torch.tensor(2.0)
    narrow = {"lora_down__weight": randn(4, c, 1, 1, by=0.5), "lora_up__weight": randn(c, 4, 1, 1, by=0.5)}
    none = torch.zeros(())
    attention = f"unet.{at.linear.replace('.to_k', '.processor.to_k')}"  # the one form of diffusers' that ComfyUI knows
    return {
        "lora": linear | text,
        "convolution": kohya(at.kernel, lora_down__weight=randn(4, c, 3, 3), lora_up__weight=randn(c, 4, 1, 1)),
        "middle": kohya(at.kernel, lora_mid__weight=randn(4, 4, 3, 3, by=0.5), alpha=alpha, **narrow),
        "diffusers": {f"{attention}_lora.down.weight": randn(4, into), f"{attention}_lora.up.weight": randn(out, 4)},
        "dora": linear | text | kohya(at.linear, dora_scale=randn(1, into).abs() + 1),
        "loha": kohya(at.kernel, alpha=alpha, **a, **b),
        "loha-core": kohya(at.kernel, alpha=alpha, **core),
        "lokr": kohya(at.linear, lokr_w1=randn(8, 4), lokr_w2=randn(out // 8, into // 4)),
        "lokr-in-two": kohya(
            at.linear,
            lokr_w1=randn(8, 4, by=1),
            lokr_w2_a=randn(out // 8, 2),
            lokr_w2_b=randn(2, into // 4),
            alpha=alpha,
        ),
        "lokr-convolution": kohya(at.kernel, lokr_w1=randn(4, 4), lokr_w2=randn(c // 4, c // 4, 3, 3)),
        "oft": kohya(at.linear, oft_blocks=randn(out // 8, 8, 8), alpha=none),
        "boft": kohya(at.kernel, oft_blocks=randn(3, c // 4, 4, 4), alpha=none),
        "diff": kohya(at.kernel, diff=randn(c, c, 3, 3, by=0.03), diff_b=randn(c)),
        "partly": linear | plain("not_there", 8, 8),
    }
