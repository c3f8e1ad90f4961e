"""Conversions to the x0 prediction, against the forward processes they undo."""

from __future__ import annotations

import pytest
import torch

from sd_dejavu.core.denoiser import denoised_from_output, initial_latent, model_input, over_pixels, seeded_noise

SIGMAS = torch.tensor([0.05, 1.0, 14.6])


def world(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return seeded_noise((2, 3, 3), seed, 3), seeded_noise((2, 3, 3), seed + 1, 3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_network_gives_the_clean_latent_back(prediction_type) -> None:
    clean, noise = world()
    s = over_pixels(SIGMAS if prediction_type != "flow" else torch.tensor([0.05, 0.5, 1.0]))
    if prediction_type == "flow":  # x = (1 - s) x0 + s n, velocity dx/ds = n - x0
        x, output = (1 - s) * clean + s * noise, noise - clean
    else:  # v = alpha n - sigma_t x0 with alpha^2 = abar = 1 / (1 + s^2) (Salimans & Ho)
        x, abar = clean + s * noise, 1 / (1 + s**2)
        output = noise if prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * clean
    found = denoised_from_output(output, x, s.flatten(), prediction_type)
    torch.testing.assert_close(found, clean, atol=2e-5, rtol=1e-5)


def test_half_precision_outputs_are_converted_in_fp32() -> None:
    # 60000 - 14.6 * 1 is 59985.4; half precision has steps of 32 there.
    found = denoised_from_output(
        torch.ones(1, 1, 1, 1).half(), torch.full((1, 1, 1, 1), 6e4).half(), SIGMAS[2:], "epsilon"
    )
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(60000 - 14.6)


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ValueError, match="'sample' is unknown: use epsilon, v_prediction or flow"):
        denoised_from_output(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), SIGMAS[:1], "sample")  # type: ignore[arg-type]


def test_the_input_of_the_network_is_the_variance_preserving_latent() -> None:
    clean, noise = world()
    abar = 1 / (1 + over_pixels(SIGMAS) ** 2)
    expected = abar.sqrt() * clean + (1 - abar).sqrt() * noise  # Ho et al., 2020, equation 4
    torch.testing.assert_close(model_input(clean + over_pixels(SIGMAS) * noise, SIGMAS), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_run_starts_at_pure_noise_as_the_network_sees_it(prediction_type) -> None:
    noise = world()[0][:1]
    torch.testing.assert_close(model_input(initial_latent(noise, 14.6, prediction_type), SIGMAS[2:]), noise)
    assert torch.equal(initial_latent(noise, 1.0, "flow"), noise)


def test_the_first_images_of_a_seed_do_not_depend_on_how_many_are_asked_for() -> None:
    assert torch.equal(seeded_noise((1, 4, 4), 7, 4)[:2], seeded_noise((1, 4, 4), 7, 2))
    assert not torch.equal(seeded_noise((1, 4, 4), 7, 1), seeded_noise((1, 4, 4), 8, 1))
