"""Alignment: does the prompt move the first prediction towards the very image it was trained with?

The magnitude (Wen et al., ICLR 2024) asks how far a prompt moves the prediction. Who trained a model knows more: the
training image of each caption. With z its latent, and the denoised predictions of the first step with the prompt
and without, D_c and D_u,

    a = cos(D_c - D_u, z - D_u),

averaged over noises. It is 1 where the prompt alone brings the image back. This statistic is our own. It is needed
because a LoRA that overfits raises the magnitude of ordinary prompts too, so that its captions no longer stand out by
it (docs/audit.md).

What counts is the contrast, a less the mean alignment with other training images: a LoRA that draws everything in
the style of its training set moves every prompt towards all of it. A caption that merely describes its image has a
little contrast too, on any model. Where the model is at hand that was trained on, what counts is therefore the gain
over it, c - max(0, c_base). Ordinary prompts have no training image: each is given one at random, and its contrast
or gain is taken on the same weights. Without a base model the highest contrast of several images stands for it, as
nothing else accounts for the describing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.denoiser import Predictions
from ..reference.features import resized
from ..reference.images import ImageError, open_image, to_tensor

COMPARED = 8  # training images that each ordinary prompt is compared with
NEAREST_OF = 4  # of these the one with the highest contrast counts, without a base model


def alignment(predictions: Predictions, latents: Tensor) -> Tensor:
    """[B, N]: the cosine of D_c - D_u [B, C, H, W] with the way from D_u to each latent [N, C, H, W].

    >>> with_prompt, without = torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 1, 2)
    >>> alignment(Predictions(with_prompt, without, torch.ones(1)), torch.tensor([[[[2.0, 0.0]]], [[[0.0, 1.0]]]]))
    tensor([[1., 0.]])
    """
    moved = (predictions.conditional - predictions.unconditional).float().flatten(1)
    start = predictions.unconditional.float().flatten(1)
    ways = latents.float().flatten(1)[None] - start[:, None]
    return F.cosine_similarity(moved[:, None], ways, dim=2)


def as_trained(images: Sequence[bytes], height: int, width: int) -> Tensor:
    """Image files, their middle cut to the model's shape and size as trainers do: [B, 3, height, width] in 0..1.

    Raises ValueError for one that cannot be used.
    """
    try:
        return torch.cat([_cut(to_tensor(open_image(data)), height, width) for data in images])
    except ImageError as error:
        raise ValueError(f"a thumbnail in the reference set cannot be used ({error}): build the set again") from error


def _cut(image: Tensor, height: int, width: int) -> Tensor:
    have_height, have_width = image.shape[-2:]
    scale = max(height / have_height, width / have_width)
    tall, wide = max(height, round(have_height * scale)), max(width, round(have_width * scale))
    whole = resized(image, tall, wide, "bicubic").clamp(0, 1)
    top, left = (tall - height) // 2, (wide - width) // 2
    return whole[..., top : top + height, left : left + width]


def contrast(own: float, others: Sequence[float]) -> float:
    """Alignment with an image less the mean of that with others; the alignment itself where there are none."""
    return own - sum(others) / len(others) if others else own
