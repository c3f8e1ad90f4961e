"""The noise schedule, against levels worked by hand and against diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from sd_dejavu.core.schedule import Schedule

# abar 0.8, 0.5, 0.2 and 1/17: sigma^2 = (1 - abar) / abar is 1/4, 1, 4 and 16.
FOUR = Schedule(torch.tensor([0.8, 0.5, 0.2, 1 / 17], dtype=torch.float64))


def test_the_levels_of_whole_timesteps() -> None:
    assert FOUR.sigma(torch.tensor([3, 0, 1, 2])).tolist() == pytest.approx([4, 0.5, 1, 2])
    signal, noise = FOUR.scales(torch.tensor([1, 2]))
    assert signal.tolist() == pytest.approx([0.5**0.5, 0.2**0.5])
    assert noise.tolist() == pytest.approx([0.5**0.5, 0.8**0.5])
    assert signal.dtype == noise.dtype == torch.float32


def test_between_two_levels_timesteps_are_linear_in_log_sigma() -> None:
    # Every level is twice the one before, so log2(sigma) + 1 is the timestep.
    found = FOUR.timestep(torch.tensor([2**0.5, 2**1.75, 0.5 * 2**0.1]))
    assert found.tolist() == pytest.approx([1.5, 2.75, 0.1], abs=1e-6)


def test_outside_the_schedule_the_nearest_timestep_holds() -> None:
    assert FOUR.timestep(torch.tensor([0.0, 0.1, 9.0, float("inf")])).tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_level_leads_back_to_its_whole_timestep(precision: torch.dtype) -> None:
    """Exactly, whatever the rounding: another timestep would be another prediction."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = Schedule((1 - betas).cumprod(0).to(precision))
    timesteps = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.sigma(timesteps)), timesteps.float())


def test_a_run_begins_where_ddims_does() -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    schedule = Schedule(scheduler.alphas_cumprod)
    for steps in (1, 4, 50):
        scheduler.set_timesteps(steps)
        *found, last = schedule.sigmas(steps)
        assert last == 0
        assert schedule.timestep(torch.tensor(found)).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 5])
def test_a_number_of_steps_that_the_schedule_does_not_have(steps: int) -> None:
    with pytest.raises(ValueError, match=f"the number of steps must be between 1 and 4, not {steps}"):
        FOUR.sigmas(steps)
