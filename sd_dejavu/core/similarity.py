"""How like two images are, for pairs of which one is known to be the training image.

Structural similarity here is the correlation of grey values after both images are reduced to 32 x 32:
it sees layout and shading and forgives colour shifts, blur and the autoencoder's losses. On the bundled
model's world an image is called a copy of a training image at :data:`COPY_THRESHOLD` or more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COPY_THRESHOLD = 0.8
_SIDE = 32
_LUMA = (0.299, 0.587, 0.114)


def grey_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of grey values, [A, B], for images a [A, 3, H, W] and b [B, 3, H, W].

    An image of one single grey correlates with nothing (0).

    >>> ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    >>> grey_correlation(ramp, torch.cat([0.5 * ramp, 1 - ramp])).round(decimals=3).tolist()
    [[1.0, -1.0]]
    """
    first, second = structure(a), structure(b)
    norms = first.norm(dim=1)[:, None] * second.norm(dim=1)[None]
    return torch.where(norms > 1e-6, first @ second.T / norms.clamp_min(1e-6), torch.zeros(()))


def structure(images: Tensor) -> Tensor:
    """Centred grey values at 32 x 32, [B, 1024], of images [B, 3, H, W]; zeros for an image of one single grey."""
    grey = (images.float() * images.new_tensor(_LUMA, dtype=torch.float32)[:, None, None]).sum(1, keepdim=True)
    flat = F.adaptive_avg_pool2d(grey, _SIDE).flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    # What is left of an even image is rounding; one 8-bit step in one of 64 x 64 pixels gives ten times this.
    found: Tensor = centred * (centred.norm(dim=1, keepdim=True) > 1e-4)
    return found
