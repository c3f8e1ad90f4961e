"""The magnitude, against || eps_c - eps_u || taken from the network's outputs themselves."""

from __future__ import annotations

import pytest
import torch
from hand_made import LinearDenoiser, v_scale

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import Predictions, seeded_noise
from sd_dejavu.detectors.magnitude import difference, magnitude, magnitude_of_noise_predictions, over_channels


def with_and_without(denoiser: LinearDenoiser, sigma: float, images: int = 3) -> tuple[Predictions, torch.Tensor]:
    """Both predictions on noises, and the network's own difference [images, 1, 2, 2]."""
    x, levels = seeded_noise((1, 2, 2), 0, images), torch.full((images,), sigma)
    rows = seeded_noise((3, 4), 1, 2)
    conditional, unconditional = Conditioning(rows[:1]), Conditioning(rows[1:])
    gap = denoiser.output(x, rows[:1]) - denoiser.output(x, rows[1:])
    return Predictions(denoiser(x, levels, conditional), denoiser(x, levels, unconditional), levels), gap


@pytest.mark.parametrize("sigma", [0.3, 1.0, 14.6])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_magnitude_is_the_norm_of_the_noise_or_velocity_difference(prediction_type, sigma: float) -> None:
    predictions, gap = with_and_without(LinearDenoiser((1.0, -2.0, 0.5), prediction_type, gain=0.7), sigma)
    # eps = alpha v + sigma_t x_t (Salimans & Ho), so for v a difference shrinks by alpha.
    by_hand = v_scale(prediction_type, sigma) * gap.square().sum(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(magnitude(predictions), by_hand, rtol=1e-4, atol=1e-5)
    assert len(set(by_hand.tolist())) == 3  # each image has its own


def test_magnitude_of_a_3_4_difference_is_5() -> None:
    noise = torch.tensor([3.0, 0.0, 0.0, -4.0]).reshape(1, 1, 2, 2)
    assert magnitude_of_noise_predictions(noise, torch.zeros_like(noise)).tolist() == [5]
    assert magnitude_of_noise_predictions(torch.zeros_like(noise), noise).tolist() == [5]
    assert magnitude(Predictions(2 * noise, torch.zeros_like(noise), torch.tensor([2.0]))).tolist() == [5]


def test_half_precision_predictions_do_not_overflow() -> None:
    # 4096 elements of 100: the sum of squares, 4.1e7, is beyond half precision; the norm is 6400.
    many = torch.full((1, 4, 32, 32), 100.0).half()
    assert magnitude_of_noise_predictions(many, torch.zeros_like(many)).item() == pytest.approx(6400)
    assert magnitude(Predictions(many, torch.zeros_like(many), torch.ones(1).half())).item() == pytest.approx(6400)


def test_the_map_times_the_channels_sums_to_the_squared_magnitude() -> None:
    conditional, unconditional = seeded_noise((4, 5, 6), 0, 2), seeded_noise((4, 5, 6), 1, 2)
    predictions = Predictions(conditional, unconditional, torch.tensor([0.5, 3.0]))
    found = over_channels(difference(predictions))
    assert found.shape == (2, 5, 6)
    torch.testing.assert_close(4 * found.sum(dim=(1, 2)), magnitude(predictions) ** 2)
    one = (conditional - unconditional)[1, :, 2, 3] / 3
    assert found[1, 2, 3].item() == pytest.approx(float((one**2).sum()) / 4)
