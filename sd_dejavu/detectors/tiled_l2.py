"""Tiled L2 between several generations of one prompt.

Carlini et al., *Extracting Training Data from Diffusion Models*, USENIX Security 2023, section 4.2.2:
images are cut into non-overlapping tiles (4 x 4), the distance of two images is the largest L2
distance of corresponding tiles, and a prompt whose generations lie close together is suspect. The
score is minus the mean distance over all pairs, each divided by sqrt(elements of a tile).
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from . import Detector, Observed

TILES = 4


def tiled_distance(a: Tensor, b: Tensor, tiles: int = TILES) -> Tensor:
    """Largest per-tile RMS difference of two images [3, H, W]; a rest that fills no tile is left out.

    >>> a, b = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    >>> b[:, :2, :2] = 0.5  # the first of 4 x 4 tiles
    >>> tiled_distance(a, b)
    tensor(0.5000)
    """
    height, width = a.shape[-2] // tiles, a.shape[-1] // tiles
    gap = (a - b)[:, : height * tiles, : width * tiles].square()
    return gap.reshape(3, tiles, height, tiles, width).mean(dim=(0, 2, 4)).sqrt().max()


def score(observed: Observed) -> float:
    """Raises ValueError with fewer than two images."""
    images = observed.images
    if images is None or len(images) < 2:
        raise ValueError("tiled L2 compares several generations: at least 2 images are needed")
    distances = [tiled_distance(images[i], images[j]) for i, j in combinations(range(len(images)), 2)]
    return -float(torch.stack(distances).mean())


DETECTORS = (Detector("tiled_l2", "largest tile distance of several generations", "images", score, images=(4,)),)
