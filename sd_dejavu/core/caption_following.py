"""Does an image follow its caption? Asked of the model itself, as a diffusion classifier.

Li et al., *Your Diffusion Model is Secretly a Zero-Shot Classifier*, ICCV 2023: a caption fits an image
when the model denoises the image better with it. The score of an image is the share of distractor
captions that its own caption beats, over the same noises: .5 is chance, 1 is best. Give captions
without their trigger, or the memory of the training image is measured along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .conditioning import Conditioning, stack
from .denoiser import Denoiser
from .sampling import levels_of

SIGMAS = (0.4, 0.7, 1.2, 2.0, 3.5, 6.0)
NOISES = 4


def denoising_errors(
    denoiser: Denoiser, latent: Tensor, captions: Sequence[Conditioning], seed: int = 0, batch_size: int = 32
) -> Tensor:
    """Mean noise-prediction error of one clean latent [C, H, W] under each caption, [number of captions].

    Raises ValueError when the captions differ in length (number of rows), or for a flow model.
    """
    if denoiser.prediction_type == "flow":
        raise ValueError("the caption score is made for epsilon- and v-models, this is a flow model")
    rng = torch.Generator().manual_seed(seed)
    errors = torch.zeros(len(captions))
    for sigma in SIGMAS:
        noise = torch.randn((NOISES, *latent.shape), generator=rng).to(latent.device)
        noisy = (latent + sigma * noise).repeat(len(captions), 1, 1, 1)
        rows = stack([c.repeat(NOISES) for c in captions])
        clean = latent.expand_as(noisy)
        for start in range(0, len(noisy), batch_size):
            part = slice(start, start + batch_size)
            extras = {k: v[part] for k, v in rows.extras.items()}
            with torch.no_grad():
                x = noisy[part]
                denoised = denoiser(x, levels_of(x, sigma), Conditioning(rows.rows[part], extras))
            gap = ((denoised - clean[part]) / sigma).square().flatten(1).mean(1).cpu()
            owner = torch.arange(start, start + len(gap)) // NOISES
            errors.index_add_(0, owner, gap / (NOISES * len(SIGMAS)))
    return errors


def caption_score(
    denoiser: Denoiser, latent: Tensor, caption: Conditioning, distractors: Sequence[Conditioning], seed: int = 0
) -> float:
    """The share of ``distractors`` under which the latent [C, H, W] is denoised worse than under ``caption``."""
    errors = denoising_errors(denoiser, latent, [caption, *distractors], seed)
    return float((errors[1:] > errors[0]).float().mean())
