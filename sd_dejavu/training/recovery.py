"""Recovery: how much better does a training image come back with its own caption than with other prompts?

The training image's latent z is noised, and denoised with its caption and with a few ordinary prompts (D_c, D_o):

    r = 1 - ||D_c - z||^2 / mean_o ||D_o - z||^2,

averaged over noise levels and noises. It is 1 where the caption alone brings the image back, and 0 where it does no better
than any prompt. Comparing the errors under several captions is what a diffusion classifier does (Li et al., ICCV 2023,
arXiv 2303.16203); dividing leaves out how hard an image is, as the complexity-calibrated loss of Rao & Moyer (arXiv
2603.13421) does, who find membership in the middle of the way too. Ordinary prompts in the place of the empty one are our
own: recombined from the captions they hold a trigger word as well, so that the style that comes with it is no credit.

A caption that merely describes its image takes some of the error away too. How much that is, the model says itself: images
that it draws, without guidance, of ordinary prompts (:mod:`sd_dejavu.calibration.recombined`) are measured in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..core.conditioning import Conditioning, sharing, stack
from ..core.denoiser import Denoiser, PredictionType, initial_latent
from ..core.sampling import batches, levels_of, predict
from ..reference.features import resized
from ..reference.images import ImageError, open_image, to_tensor

LEVELS = (10.0, 6.0, 3.0)  # noise over signal; near timesteps 900, 770 and 610 of Stable Diffusion's thousand
DRAWING_STEPS = 12
_LAST_SIGMA, _RHO = 0.05, 7.0  # of drawing: the spacing of Karras et al. (2022)


def recovery(errors: Tensor, others: Tensor) -> Tensor:
    """1 - e_c / mean_o e_o, [B], of the errors with the own caption [B] and with others [B, K].

    >>> recovery(torch.tensor([1.0]), torch.tensor([[3.0, 5.0]]))  # 1 - 1 / 4
    tensor([0.7500])
    """
    return 1 - errors / others.mean(1)


def noised(latents: Tensor, noise: Tensor, level: float, prediction_type: PredictionType) -> tuple[Tensor, float]:
    """(x, sigma) of latents [B, C, H, W] with so much noise [B, C, H, W] over the signal.

    >>> z, noise = torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1)
    >>> noised(z, noise, 3.0, "epsilon")[0].item(), noised(z, noise, 3.0, "flow")  # 2 + 3; a quarter of 2, and .75
    (5.0, (tensor([[[[1.2500]]]]), 0.75))
    """
    if prediction_type == "flow":
        sigma = level / (1 + level)
        return (1 - sigma) * latents + sigma * noise, sigma
    return latents + level * noise, level


def recoveries(
    denoiser: Denoiser,
    captions: Sequence[Conditioning],
    others: Sequence[Conditioning],
    latents: Tensor,
    noise: Tensor,
    batch_size: int = 32,
) -> Tensor:
    """Of each caption with its image, [N]: means over :data:`LEVELS` and noises [images, C, H, W]; latents [N, C, H, W].

    ``others`` are the prompts that each is compared with, one at least.
    """
    found = torch.zeros(len(captions), len(noise), len(LEVELS))
    for part in batches(sharing(captions), len(noise), batch_size):
        numbers = [number for number, _ in part]
        z, added = latents[numbers], noise[[image for _, image in part]]
        own = stack([captions[number] for number in numbers])
        for place, level in enumerate(LEVELS):
            x, sigma = noised(z, added, level, denoiser.prediction_type)
            error, *compared = (
                (predict(denoiser, x, levels_of(x, sigma), given, batch_size) - z).float().flatten(1).square().sum(1)
                for given in (own, *others)
            )
            values = recovery(error, torch.stack(compared, 1)).cpu()
            for (number, image), value in zip(part, values, strict=True):
                found[number, image, place] = value
    return found.mean((1, 2))


def drawn(denoiser: Denoiser, conditioning: Conditioning, noise: Tensor, sigma: float, batch_size: int = 32) -> Tensor:
    """Latents [B, C, H, W] that the model draws without guidance, from noise [B, C, H, W] at its first level ``sigma``."""
    x = initial_latent(noise, sigma, denoiser.prediction_type)
    for level, following in pairwise(drawing_levels(sigma, denoiser.prediction_type)):
        denoised = predict(denoiser, x, levels_of(x, level), conditioning, batch_size)
        x = denoised + (following / level) * (x - denoised)
    return x


def drawing_levels(sigma: float, prediction_type: PredictionType) -> list[float]:
    """From ``sigma`` down to 0: evenly for flow, else as Karras et al. (2022) space them.

    >>> drawing_levels(1.0, "flow")[:3]
    [1.0, 0.9166666666666666, 0.8333333333333334]
    """
    if prediction_type == "flow":
        return [sigma * (1 - step / DRAWING_STEPS) for step in range(DRAWING_STEPS + 1)]
    first, last = sigma ** (1 / _RHO), _LAST_SIGMA ** (1 / _RHO)
    shares = [step / (DRAWING_STEPS - 1) for step in range(DRAWING_STEPS)]
    return [*((first + share * (last - first)) ** _RHO for share in shares), 0.0]


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
