"""What a run of Automatic1111 adds to its checkpoint, as far as its network tells: no host."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import pytest
from torch import Tensor, nn

from sd_dejavu.hosts.webui.guidance import patched


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()


def other(module: nn.Module, x: Tensor) -> Tensor:
    return x + 1


@pytest.fixture
def network() -> Any:
    return nn.Sequential(Block(), Block())


def test_a_checkpoint_alone_has_no_patches(network: Any) -> None:
    assert patched(network) == []


def test_a_forward_of_the_whole_network_is_told(network: Any) -> None:
    network.forward = MethodType(other, network)
    assert patched(network) == ["patched network"]
    network.forward = MethodType(nn.Sequential.forward, network)  # it was put back
    assert patched(network) == []


def test_forwards_of_attention_are_told_once_a_kind(network: Any) -> None:
    for block in network:
        block.attn2.forward = MethodType(other, block.attn2)
    assert patched(network) == ["patched attn2"]
    network[0].attn1.forward = partial(other, network[0].attn1)
    assert patched(network) == ["patched attn1", "patched attn2"]
