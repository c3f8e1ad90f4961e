"""SSCD as plain weights: Pizzi et al., *A Self-Supervised Descriptor for Image Copy Detection*, CVPR 2022.

A ResNet (He et al., CVPR 2016; grouped as ResNeXt for ``sscd_disc_large``), its last feature map pooled by the
generalised mean (GeM, Radenović et al., TPAMI 2018) with p = 3 over the places of each channel c, and a linear layer:

    g_c = (mean over places of max(x_c, 1e-6)^p)^(1/p),      row = W g + b

The authors publish the same weights as ``.torchvision.pt`` and ``.classy.pt``, which are pickles and not read here;
users save their tensors as safetensors. Both ways of naming them are known. Depth, widths and groups are those of the
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GEM_POWER, _GEM_LEAST = 3.0, 1e-6
_STAGES = 4
_CLASSY = re.compile(r"blocks\.(\d+)\.block\d+-(\d+)\.(?:_module\.)?")
_CLASSY_LAYERS = {
    "initial_block._module.0": "conv1",
    "initial_block._module.1": "bn1",
    **{
        f"convolutional_block.{place}": name
        for place, name in {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3"}.items()
    },
    "bn": "bn3",
    "embeddings.1": "fc",
}


class Block(nn.Module):
    """A bottleneck with its way around; the stride is in the middle convolution."""

    def __init__(self, entering: int, middle: int, leaving: int, groups: int, stride: int, around: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, leaving, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(leaving)
        self.downsample = (
            nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.BatchNorm2d(leaving))
            if around
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        found = F.relu(self.bn1(self.conv1(x)))
        found = F.relu(self.bn2(self.conv2(found)))
        return F.relu(self.bn3(self.conv3(found)) + self.downsample(x))


class Network(nn.Module):
    """Images [B, 3, H, W], normalised as ImageNet's, -> rows [B, D], not of unit length."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """For weights in torchvision's names. Raises KeyError or ValueError where they are of another network."""
        super().__init__()
        first = weights["conv1.weight"].shape[0]
        self.conv1 = nn.Conv2d(3, first, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        for stage in range(1, _STAGES + 1):
            self.add_module(f"layer{stage}", nn.Sequential(*_blocks(weights, stage)))
        dimensions, features = weights["fc.weight"].shape
        self.fc = nn.Linear(features, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        found = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, _STAGES + 1):
            found = self.get_submodule(f"layer{stage}")(found)
        row: Tensor = self.fc(gem(found))
        return row


def gem(x: Tensor, power: float = GEM_POWER) -> Tensor:
    """Generalised mean over the places of [B, C, H, W] -> [B, C].

    >>> import torch
    >>> gem(torch.tensor([[[[1.0, 3.0]]]]))  # (1 + 27) / 2 to the power of a third
    tensor([[2.4101]])
    """
    return x.clamp_min(_GEM_LEAST).pow(power).mean(dim=(2, 3)).pow(1 / power)


def network(weights: Mapping[str, Tensor]) -> Network:
    """The network of these weights, in either of the authors' ways of naming.

    Raises ValueError with a sentence where they are of another network.
    """
    try:
        named = {name: value.float() for key, value in weights.items() if (name := _name(key))}
        if nothing := [name for name, value in named.items() if not value.numel()]:
            raise ValueError(f"{nothing[0]} is empty")
        with torch.device("meta"):  # what shapes ask for takes no memory before the tensors are seen to have them
            made = Network(named)
        keys = made.load_state_dict(named, strict=False, assign=True)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"its tensors are not those of an SSCD network ({_said(error)})") from error
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # counts in training alone
    lacking = [name for name in keys.missing_keys if not name.endswith("num_batches_tracked")]
    if lacking or keys.unexpected_keys:
        raise ValueError(
            f"its tensors are not those of an SSCD network ({'it lacks' if lacking else 'unknown are'} "
            f"{', '.join((lacking or keys.unexpected_keys)[:3])})"
        )
    return made.eval().requires_grad_(False)


def _blocks(weights: Mapping[str, Tensor], stage: int) -> list[Block]:
    found: list[Block] = []
    while (first := weights.get(f"layer{stage}.{len(found)}.conv1.weight")) is not None:
        here = f"layer{stage}.{len(found)}"
        inner, leaving = weights[f"{here}.conv2.weight"], weights[f"{here}.conv3.weight"].shape[0]
        middle, entering = first.shape[:2]
        stride = 2 if stage > 1 and not found else 1
        around = f"{here}.downsample.0.weight" in weights
        found.append(Block(entering, middle, leaving, middle // inner.shape[1], stride, around))
    if not found:
        raise KeyError(f"layer{stage}.0.conv1.weight")
    return found


def _name(key: str) -> str:
    """torchvision's name of a tensor; '' for counts of batches, which are not used."""
    if key.endswith("num_batches_tracked"):
        return ""
    name = _CLASSY.sub(lambda match: f"layer{int(match[1]) + 1}.{match[2]}.", key.removeprefix("backbone."))
    stem, _, last = name.rpartition(".")
    head = re.match(r"layer\d+\.\d+\.", stem)
    before, inside = (head[0], stem[head.end() :]) if head else ("", stem)
    return f"{before}{_CLASSY_LAYERS.get(inside, inside)}.{last}"


def _said(error: Exception) -> str:
    return f"it lacks {error.args[0]}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
