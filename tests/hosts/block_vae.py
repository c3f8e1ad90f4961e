"""SD1.5's autoencoder in its full layout, with weights made by hand: a latent is the mean colour of 8x8 pixels.

Hosts that build this autoencoder from a fixed configuration take no smaller one. All residual branches are zero, so
the signal passes on the shortcuts; a pair of large constants next to it in its group makes the last norm a division
by that constant, and silu(x) - silu(-x) is x again. What is zero costs one number in a torch-saved file.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SCALE = 0.18215  # hosts multiply by it after encoding and divide by it before decoding
CONTRAST = 4.0  # of latents: colours from -1 to 1 become -4 to 4; the fourth latent channel is not used
_WIDTHS = (128, 256, 512, 512)
_CONSTANT = 100.0
_COLOURS, _LATENTS = 3, 4


def block_vae() -> dict[str, Tensor]:
    """The weights, named as in a checkpoint below 'first_stage_model.'."""
    group_in, group_out = _WIDTHS[-1] // 32, _WIDTHS[0] // 32  # channels a group of the two last norms
    tensors = {"quant_conv.weight": _eye(2 * _LATENTS), "quant_conv.bias": _zeros(2 * _LATENTS)}
    tensors |= {"post_quant_conv.weight": _eye(_LATENTS), "post_quant_conv.bias": _zeros(_LATENTS)}
    tensors |= _start("encoder.conv_in", _COLOURS, _WIDTHS[0], group_in, 1.0)
    tensors |= _start("decoder.conv_in", _LATENTS, _WIDTHS[-1], group_out, SCALE / CONTRAST)
    for part in ("encoder", "decoder"):
        for block in ("block_1", "block_2"):
            tensors |= _idle_block(f"{part}.mid.{block}.", _WIDTHS[-1], _WIDTHS[-1])
        tensors |= _norm(f"{part}.mid.attn_1.norm", _WIDTHS[-1], 0.0)
        for name in ("q", "k", "v", "proj_out"):
            tensors |= _idle(f"{part}.mid.attn_1.{name}", _WIDTHS[-1], _WIDTHS[-1], 1)
    for level, (before, width) in enumerate(zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, strict=False)):
        for i in range(2):
            tensors |= _idle_block(f"encoder.down.{level}.block.{i}.", width if i else before, width)
        if level < 3:
            mean_of_four = ((0, 0), (0, 1), (1, 0), (1, 1))
            tensors |= _carry(f"encoder.down.{level}.downsample.conv", width, mean_of_four)
    for level, (before, width) in enumerate(zip((*_WIDTHS[1:], _WIDTHS[-1]), _WIDTHS, strict=True)):
        for i in range(3):
            tensors |= _idle_block(f"decoder.up.{level}.block.{i}.", width if i else before, width)
        if level > 0:
            tensors |= _carry(f"decoder.up.{level}.upsample.conv", width, ((1, 1),))
    tensors |= _end("encoder", _WIDTHS[-1], 2 * _LATENTS, group_in, CONTRAST / SCALE)
    tensors["encoder.conv_out.bias"][_LATENTS:] = -30.0  # the logarithm of the variance: encoding draws no noise
    return tensors | _end("decoder", _WIDTHS[0], _COLOURS, group_out, 1.0)


def encode(image: Tensor) -> Tensor:
    """What a host makes of an image [B, 3, 8H, 8W] in -1 to 1: its latent [B, 4, H, W]."""
    colours = CONTRAST * torch.nn.functional.avg_pool2d(image, 8)
    return torch.cat([colours, torch.zeros_like(colours[:, :1])], dim=1)


def decode(latent: Tensor) -> Tensor:
    """What a host shows of a latent [B, 4, H, W]: [B, 3, 8H, 8W] in -1 to 1."""
    colours = (latent[:, :_COLOURS] / CONTRAST).clamp(-1, 1)
    return colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


# ---------------------------------------------------------------------------------------------- parts


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(1).expand(shape)


def _eye(size: int) -> Tensor:
    return torch.eye(size)[:, :, None, None]


def _idle(name: str, outputs: int, inputs: int, size: int) -> dict[str, Tensor]:
    return {f"{name}.weight": _zeros(outputs, inputs, size, size), f"{name}.bias": _zeros(outputs)}


def _norm(name: str, channels: int, gain: float) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.tensor([gain]).expand(channels), f"{name}.bias": _zeros(channels)}


def _idle_block(prefix: str, inputs: int, outputs: int) -> dict[str, Tensor]:
    tensors = _norm(f"{prefix}norm1", inputs, 0.0) | _idle(f"{prefix}conv1", outputs, inputs, 3)
    tensors |= _norm(f"{prefix}norm2", outputs, 0.0) | _idle(f"{prefix}conv2", outputs, outputs, 3)
    if inputs != outputs:
        tensors[f"{prefix}nin_shortcut.weight"] = torch.eye(max(inputs, outputs))[:outputs, :inputs, None, None]
        tensors[f"{prefix}nin_shortcut.bias"] = _zeros(outputs)
    return tensors


@cache
def _taps(channels: int, where: tuple[tuple[int, int], ...]) -> Tensor:
    weight = torch.zeros(channels, channels, 3, 3)
    for row, column in where:
        weight[range(channels), range(channels), row, column] = 1 / len(where)
    return weight


def _carry(name: str, channels: int, where: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
    """Each channel to itself, as the mean of these taps."""
    return {f"{name}.weight": _taps(channels, where), f"{name}.bias": _zeros(channels)}


def _start(name: str, inputs: int, outputs: int, group: int, gain: float) -> dict[str, Tensor]:
    """One group a colour: x, -x and the two constants."""
    weight, bias = torch.zeros(outputs, inputs, 3, 3), torch.zeros(outputs)
    for colour in range(_COLOURS):
        first = group * colour
        weight[first, colour, 1, 1], weight[first + 1, colour, 1, 1] = gain, -gain
        bias[first + 2], bias[first + 3] = _CONSTANT, -_CONSTANT
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _end(part: str, inputs: int, outputs: int, group: int, gain: float) -> dict[str, Tensor]:
    weight, bias = torch.zeros(outputs, inputs, 3, 3), torch.zeros(outputs)
    undo = _CONSTANT * (2 / group) ** 0.5  # the deviation of a group, but for the signal's own part
    for colour in range(_COLOURS):
        weight[colour, group * colour, 1, 1] = gain * undo
        weight[colour, group * colour + 1, 1, 1] = -gain * undo
    return {f"{part}.conv_out.weight": weight, f"{part}.conv_out.bias": bias} | _norm(f"{part}.norm_out", inputs, 1.0)
