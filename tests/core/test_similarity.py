"""Grey correlation against numpy, and a caption's fit by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hand_made import LinearDenoiser

from sd_dejavu.core.caption_following import NOISES, SIGMAS, caption_score, denoising_errors
from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import denoised_from_output
from sd_dejavu.core.similarity import grey_correlation


def images(seed: int, count: int, side: int = 64) -> torch.Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(seed))


def test_grey_correlation_is_numpys_on_reduced_grey_images() -> None:
    a, b = images(0, 2), images(1, 3)
    b[0] = (a[1] + b[0]) / 2

    def reduced(image: torch.Tensor) -> np.ndarray:
        grey = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(float), 1)  # ITU-R BT.601 luma
        return grey.reshape(32, 2, 32, 2).mean(axis=(1, 3)).ravel()

    expected = [[np.corrcoef(reduced(p), reduced(q))[0, 1] for q in b] for p in a]
    assert grey_correlation(a, b).numpy() == pytest.approx(np.array(expected), abs=1e-4)


@pytest.mark.parametrize("side", [32, 50, 64])
def test_brightness_and_contrast_do_not_matter_and_a_negative_is_the_opposite(side: int) -> None:
    a = images(0, 1, side)
    found = grey_correlation(a, torch.cat([a, 0.3 * a + 0.5, 1 - a]))
    assert found.flatten().tolist() == pytest.approx([1, 1, -1], abs=1e-4)


@pytest.mark.parametrize("side", [50, 64])
def test_an_even_image_correlates_with_nothing(side: int) -> None:
    even = torch.cat([torch.full((1, 3, side, side), level) for level in (0.0, 0.7, 1.0)])
    assert grey_correlation(even, even).tolist() == [[0] * 3] * 3
    assert grey_correlation(even, images(0, 1, side)).flatten().tolist() == [0, 0, 0]


# ------------------------------------------------------------------------- caption following


class Painter(LinearDenoiser):
    """Believes the image to be the sum of the rows, whatever the noisy latent shows."""

    def __call__(self, x, sigma, conditioning):
        image = self.output(x, conditioning.rows)
        s = sigma.reshape(-1, 1, 1, 1)
        self.calls.append((x.shape[0], conditioning))
        return denoised_from_output((x - image) / s, x, sigma, "epsilon")


def caption(value: float) -> Conditioning:
    return Conditioning(torch.full((1, 1, 4), value), {"pooled": torch.full((1, 1), value)})


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_captions_error_is_the_mean_squared_noise_prediction_error(batch_size: int) -> None:
    denoiser, latent = Painter(), torch.full((1, 2, 2), 0.5)
    found = denoising_errors(denoiser, latent, [caption(v) for v in (0.5, 0.7, 2.5)], batch_size=batch_size)
    # eps - eps_true = (latent - D) / sigma, the same for each noise.
    mean = sum(s**-2 for s in SIGMAS) / len(SIGMAS)
    assert found.tolist() == pytest.approx([0, 0.2**2 * mean, 2.0**2 * mean], rel=1e-3, abs=1e-9)
    assert all(bool((c.extras["pooled"][:, 0] == c.rows[:, 0, 0]).all()) for _, c in denoiser.calls)
    assert sum(size for size, _ in denoiser.calls) == 3 * NOISES * len(SIGMAS)


def test_a_captions_score_is_the_share_of_distractors_it_beats() -> None:
    latent = torch.full((1, 2, 2), 0.5)
    distractors = [caption(v) for v in (0.5, 0.8, 0.0, 9.0)]
    assert caption_score(Painter(), latent, caption(0.7), distractors) == 3 / 4
