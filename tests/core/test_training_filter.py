"""The filter of training losses: by hand-worked norms, and against second implementations."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import denoised_from_output
from sd_dejavu.core.schedule import Schedule
from sd_dejavu.training.filter import FilterSettings, TrainingFilter, weights_of
from sd_dejavu.training.loss import Batch, filtered_loss, noised, stratified_timesteps

SD = (4, 64, 64)  # a constant difference c has the norm 128 c
SMALL = (1, 2, 2)  # 2 c, and the published threshold is 2 * sqrt(4 / 16384) = 1 / 32
SCHEDULE = Schedule(torch.linspace(0.99, 0.01, 1000))


def outputs(norms: Sequence[float], shape: tuple[int, ...] = SD) -> tuple[Tensor, Tensor]:
    """Two predictions whose differences have these norms."""
    side = float(np.sqrt(np.prod(shape)))
    unconditional = torch.full((len(norms), *shape), 0.25)
    return unconditional + torch.tensor(norms, dtype=torch.float32).reshape(-1, 1, 1, 1) / side, unconditional


def kept(
    made: TrainingFilter, norms: Sequence[float], timesteps: Sequence[int] | None = None, **more: Any
) -> list[bool]:
    times = torch.tensor(timesteps if timesteps is not None else [500] * len(norms))
    return made.keep(*outputs(norms, **more), times).tolist()


def quantile(share: float = 0.75, levels: int = 2, warm_up: int = 4, history: int = 6) -> TrainingFilter:
    return TrainingFilter(
        FilterSettings(
            "quantile",
            filter_quantile=share,
            filter_levels=levels,
            filter_warm_up=warm_up,
            filter_history=history,
        )
    )


# ------------------------------------------------------------------------------------------ threshold


def test_the_published_threshold_takes_two_and_more() -> None:
    made = TrainingFilter()
    assert kept(made, [1.984375, 2.0, 3.0, 0.0]) == [True, False, False, True]
    assert (made.counts.seen, made.counts.left_out, made.counts.kept_share) == (4, 2, 0.5)


def test_the_threshold_is_scaled_to_the_latents_shape() -> None:
    made = TrainingFilter()
    assert kept(made, [1 / 32, 1 / 32 - 1 / 256], shape=SMALL) == [False, True]
    assert [record.limit for record in made.log] == [1 / 32]


def test_half_precision_is_compared_in_fp32() -> None:
    made = TrainingFilter()
    big = torch.full((1, *SD), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
    assert made.magnitudes(big, torch.zeros_like(big), torch.tensor([0])).tolist() == [300 * 128]


def test_v_predictions_are_weighed_by_the_signals_share() -> None:
    made = TrainingFilter(prediction_type="v_prediction", alphas_cumprod=torch.tensor([1.0, 0.25, 0.0]))
    magnitudes = made.magnitudes(*outputs([3.0, 3.0, 3.0]), torch.tensor([0, 1, 2]))
    assert magnitudes.tolist() == [3.0, 1.5, 0.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_magnitude_is_that_of_the_detector(prediction_type: Any) -> None:
    """Against the other way to it: || D_c - D_u || / sigma."""
    generator = torch.Generator().manual_seed(0)
    abar = torch.linspace(0.99, 0.01, 10)
    x, a, b = torch.randn(3, 5, *SMALL, generator=generator)
    t = torch.tensor([0, 2, 4, 7, 9])
    sigma = ((1 - abar[t]) / abar[t]).sqrt()
    scaled = x / abar[t].sqrt().reshape(-1, 1, 1, 1)
    gap = denoised_from_output(a, scaled, sigma, prediction_type) - denoised_from_output(
        b, scaled, sigma, prediction_type
    )
    expected = gap.flatten(1).norm(dim=1) / sigma
    made = TrainingFilter(prediction_type=prediction_type, alphas_cumprod=abar)
    torch.testing.assert_close(made.magnitudes(a, b, t), expected)


# ------------------------------------------------------------------------------------ never an empty batch


def test_the_least_memorised_stays_where_all_would_go() -> None:
    made = TrainingFilter()
    assert kept(made, [5.0, 3.0, 4.0]) == [False, True, False]
    assert (made.counts.left_out, made.counts.kept_alone) == (2, 1)
    assert [record.sample for record in made.log] == ["0", "2"]
    assert kept(made, [9.0]) == [True]
    assert made.counts.kept_alone == 2


def test_what_is_not_finite_goes_for_its_own_reason() -> None:
    made = TrainingFilter()
    conditional, unconditional = outputs([1.0, 1.0, 3.0])
    conditional[0, 0, 0, 0] = torch.nan
    names = ["cat", "dog", "fox"]
    assert made.keep(conditional, unconditional, torch.tensor([1, 2, 3]), names).tolist() == [False, True, False]
    assert [(r.sample, r.timestep, r.reason) for r in made.log] == [
        ("cat", 1, "not finite"),
        ("fox", 3, "at or above the threshold"),
    ]
    assert (made.counts.left_out, made.counts.not_finite) == (2, 1)


def test_one_finite_sample_stays_however_memorised() -> None:
    made = TrainingFilter()
    conditional, unconditional = outputs([1.0, 7.0])
    conditional[0] = torch.inf
    assert made.keep(conditional, unconditional, torch.tensor([1, 2])).tolist() == [False, True]


def test_a_batch_may_go_altogether_where_the_loss_is_a_weighing() -> None:
    made = TrainingFilter(may_empty=True)
    assert kept(made, [5.0, 3.0]) == [False, False]
    assert (made.counts.left_out, made.counts.kept_alone) == (2, 0)


def test_a_batch_without_a_finite_sample_is_refused() -> None:
    conditional, unconditional = outputs([1.0, 1.0])
    with pytest.raises(ValueError, match="whole batch are not finite"):
        TrainingFilter().keep(conditional * torch.nan, unconditional, torch.tensor([1, 2]))


# ------------------------------------------------------------------------------------------- quantile


def test_a_noise_level_warms_up_before_its_quantile_counts() -> None:
    made = quantile()
    assert kept(made, [1, 2, 3, 4], [0, 100, 200, 499]) == [True] * 4
    # Of 1, 2, 3, 4 the quantile .75 is 3.25; the upper half of the schedule has seen nothing yet.
    assert kept(made, [3.0, 3.5, 3.5], [10, 10, 500]) == [True, False, True]
    assert (made.log[0].limit, made.log[0].reason) == (3.25, "above the quantile")


def test_the_quantile_runs_over_recent_magnitudes() -> None:
    """Against numpy's, over the last six of everything that came before the batch, left out or not."""
    made, rng, before = quantile(), np.random.default_rng(1), []
    for _ in range(30):
        norms = [float(n) for n in rng.uniform(1, 9, size=3).round()]
        limit = np.quantile(before[-6:], 0.75) if len(before) >= 4 else np.inf
        expected = [n <= limit for n in norms]
        if not any(expected):
            expected[norms.index(min(norms))] = True
        assert kept(made, norms) == expected
        before += norms
    assert 0 < made.counts.left_out < made.counts.seen


def test_samples_whose_caption_was_dropped_stay_and_do_not_count() -> None:
    made = quantile()
    kept(made, [0.0] * 20)
    assert kept(made, [1, 2, 3, 4]) == [True] * 4
    assert kept(made, [0.0, 3.5, 3.0]) == [True, False, True]


# --------------------------------------------------------------------------------- log, state, settings


def test_the_log_is_one_object_a_line() -> None:
    made, file = TrainingFilter(), io.StringIO()
    conditional, unconditional = outputs([1.0, 4.0, 1.0])
    conditional[2] = torch.nan
    made.keep(*outputs([1.0]), torch.tensor([3]))
    made.keep(conditional, unconditional, torch.tensor([7, 8, 9]), ["a", 'b\n"é', "c"])
    made.write_log(file)
    first, second = (json.loads(line) for line in file.getvalue().splitlines())
    assert first == {
        "step": 1,
        "sample": 'b\n"é',
        "timestep": 8,
        "magnitude": 4.0,
        "limit": 2.0,
        "reason": "at or above the threshold",
    }
    assert (second["magnitude"], second["reason"]) == (None, "not finite")
    assert made.log == []


@pytest.mark.parametrize("make", [TrainingFilter, quantile])
def test_a_restored_filter_goes_on_as_if_unbroken(make: Any) -> None:
    batches = np.random.default_rng(2).uniform(0, 4, size=(20, 3)).tolist()
    unbroken, first, second = make(), make(), make()
    expected = [kept(unbroken, batch) for batch in batches]
    found = [kept(first, batch) for batch in batches[:11]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [kept(second, batch) for batch in batches[11:]]
    assert found == expected
    assert (second.counts, second.log) == (unbroken.counts, unbroken.log)


def test_a_state_of_other_noise_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="2 noise levels apart, this filter 3"):
        quantile(levels=3).load_state_dict(quantile(levels=2).state_dict())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"filter": "off"}, "filter must be one of none, threshold, quantile"),
        ({"filter_threshold": 0.0}, "filter threshold must be at least 0.001"),
        ({"filter_quantile": 1.0}, "filter quantile must be above 0 and below 1"),
        ({"filter_history": 10, "filter_warm_up": 11}, "at most filter history \\(10\\), not 11"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FilterSettings(**settings)


def test_filters_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="use threshold or quantile"):
        TrainingFilter(FilterSettings("none"))
    with pytest.raises(ValueError, match="not for 'flow'"):
        TrainingFilter(prediction_type="flow")
    with pytest.raises(ValueError, match="needs alphas_cumprod"):
        TrainingFilter(prediction_type="v_prediction")


# ----------------------------------------------------------------------------------------- in a loss


class Toy(torch.nn.Module):
    """eps(x, t, rows) = weight * x + mean of the rows: a prompt moves the prediction by as much as its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.calls: list[bool] = []

    def forward(self, x: Tensor, t: Tensor, rows: Tensor, **more: Any) -> Any:
        self.calls.append(torch.is_grad_enabled())
        return SimpleNamespace(sample=self.weight * x + rows.mean(dim=(1, 2)).reshape(-1, 1, 1, 1))


def toy_batch(strength: Sequence[float]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, len(strength), *SD, generator=generator)
    rows = torch.tensor(strength).reshape(-1, 1, 1).expand(-1, 3, 2)
    times = torch.arange(len(strength)) * 100
    return Batch(latents, Conditioning(rows), Conditioning(torch.zeros(1, 3, 2)), times, noise)


def test_the_loss_and_its_gradient_are_those_of_the_samples_that_stay() -> None:
    batch, model = toy_batch([0.0, 0.5, 0.001, 0.02]), Toy()  # norms 0, 64, 0.128, 2.56
    loss, stay = filtered_loss(model, SCHEDULE, "epsilon", batch, TrainingFilter())
    loss.backward()
    assert stay.tolist() == [True, False, True, False]
    assert model.calls == [True, False]
    alone = Toy()
    small = Batch(
        batch.latents[stay],
        Conditioning(batch.conditioning.rows[stay]),
        batch.empty,
        batch.timesteps[stay],
        batch.noise[stay],
    )
    expected, everything = filtered_loss(alone, SCHEDULE, "epsilon", small, None)
    expected.backward()
    assert everything.all() and alone.calls == [True]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.weight.grad, alone.weight.grad)


def test_the_one_line_of_another_training_loop() -> None:
    batch, model = toy_batch([0.0, 0.5, 0.001, 0.02]), Toy()
    noisy, target = noised(SCHEDULE, "epsilon", batch.latents, batch.noise, batch.timesteps)
    predicted = model(noisy, batch.timesteps, batch.conditioning.rows).sample
    predicted, target = TrainingFilter().sift(
        model, noisy, batch.timesteps, batch.empty.rows, predicted, target, added_cond_kwargs={}
    )
    expected, _ = filtered_loss(Toy(), SCHEDULE, "epsilon", batch, TrainingFilter())
    torch.testing.assert_close((predicted - target).square().mean(), expected)
    assert model.calls == [True, False]


def test_weights_make_the_mean_that_of_what_stays() -> None:
    batch, model = toy_batch([0.0, 0.5, 0.001, 0.02]), Toy()
    noisy, target = noised(SCHEDULE, "epsilon", batch.latents, batch.noise, batch.timesteps)
    predicted = model(noisy, batch.timesteps, batch.conditioning.rows).sample
    weights = TrainingFilter().weights(model, noisy, batch.timesteps, batch.empty.rows, predicted)
    assert weights.tolist() == [2, 0, 2, 0]
    each = (predicted - target).square().flatten(1).mean(1)
    expected, _ = filtered_loss(Toy(), SCHEDULE, "epsilon", batch, TrainingFilter())
    torch.testing.assert_close((each * weights).mean(), expected)
    assert weights_of(torch.tensor([False, False])).tolist() == [0, 0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_leads_back_to_the_clean_latent(prediction_type: Any) -> None:
    """Against the denoiser's own formula: a network that puts out its target predicts the clean latent."""
    batch = toy_batch([0.0] * 5)
    noisy, target = noised(SCHEDULE, prediction_type, batch.latents, batch.noise, batch.timesteps)
    abar = SCHEDULE.alphas_cumprod[batch.timesteps]
    x, sigma = noisy / abar.sqrt().reshape(-1, 1, 1, 1), ((1 - abar) / abar).sqrt()
    torch.testing.assert_close(
        denoised_from_output(target, x, sigma, prediction_type), batch.latents, atol=1e-4, rtol=1e-4
    )


def test_every_batch_covers_the_schedule() -> None:
    found = stratified_timesteps(8, 1000, torch.Generator().manual_seed(4))
    assert sorted((found // 125).tolist()) == list(range(8))
    assert found.tolist() != sorted(found.tolist())
