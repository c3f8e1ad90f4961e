"""Likeness: how much of the way from the base model's style to its training set's has a LoRA kept?

The style of a set of images is taken as the Gaussian of what is seen at a pixel: its three colours and how they differ
from those of the pixels to the right and below, a mean m [9] and a covariance S [9, 9] over all pixels of all images. Two
are compared by the Frechet distance (Dowson & Landau, 1982), as Heusel et al. (NeurIPS 2017) do with a network's features:

    d^2 = |m - n|^2 + tr(S + T - 2 (S T)^1/2).

It knows palette, contrast, and how soft or grainy images are, and nothing of where in an image something is, so that a copy
is worth no more than any other image of the same style. It needs no network, and no captions. With d to the training set,

    likeness = (d(base) - d(repaired)) / (d(base) - d(LoRA)),

each of images drawn of the same ordinary prompts from the same noises: 1 as the LoRA, 0 as the base model without it. The
Gaussian of pixels in the place of a network's features is our own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.statistics import spread
from ..reference.images import open_image, to_tensor
from ..reference.reference_set import ReferenceSet

MOST = 200  # training images that a style is taken from
LEAST = 0.05  # share of the base model's distance that a LoRA must take away for a likeness to be told


@dataclass(frozen=True)
class Style:
    """Mean [9] and covariance [9, 9] of colours (in 0..1) and their differences to the right and below, in fp64."""

    mean: Tensor
    covariance: Tensor


def style(images: Iterable[Tensor]) -> Style:
    """Of images [3, H, W] in 0..1, of any sizes from 2 x 2 on; each pixel counts once.

    Raises ValueError where there is none.

    >>> found = style([torch.tensor([0.0, 1.0]).expand(3, 2, 2)])  # each row is black, white
    >>> found.mean.tolist()  # the one pixel that has neighbours is black, with a rise of 1 to the right
    [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    count, total, squares = 0, torch.zeros(9, dtype=torch.float64), torch.zeros(9, 9, dtype=torch.float64)
    for image in images:
        seen = image.double().cpu()
        own = seen[:, :-1, :-1]
        values = torch.cat([own, seen[:, :-1, 1:] - own, seen[:, 1:, :-1] - own]).flatten(1)
        count, total, squares = count + values.shape[1], total + values.sum(1), squares + values @ values.T
    if not count:
        raise ValueError("there are no images to take a style from")
    mean = total / count
    return Style(mean, squares / count - mean.outer(mean))


def style_of(reference: ReferenceSet) -> Style:
    """Of a training set's images, as a reference set keeps them; of :data:`MOST` at even distances where there are more."""
    rows = spread(range(len(reference)), MOST)
    return style(to_tensor(open_image(bytes(reference.thumbnails[row])))[0] for row in rows)


def distance(a: Style, b: Style) -> float:
    """Frechet distance of two styles.

    >>> one, half = torch.eye(9).double(), torch.full((9,), 0.5).double()
    >>> round(distance(Style(half, one), Style(0 * half, 4 * one)), 4)  # sqrt(9 / 4 + 9 (2 - 1)^2)
    3.3541
    """
    root = _root(a.covariance)
    both = _root(root @ b.covariance @ root).trace()
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * both
    return float(squared.clamp_min(0).sqrt())


def likeness(repaired: float, lora: float, base: float) -> float | None:
    """From the distances to the training set; None where the LoRA brings no style nearer, so that there is none to keep.

    >>> likeness(0.3, 0.2, 0.7), likeness(0.3, 0.69, 0.7)
    (0.8, None)
    """
    if base - lora <= LEAST * base:
        return None
    return round((base - repaired) / (base - lora), 12)


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return found
