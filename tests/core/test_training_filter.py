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
from sd_dejavu.core.denoiser import denoised_from_output, noise_to_signal, over_pixels
from sd_dejavu.core.schedule import Schedule
from sd_dejavu.training.filter import FilterSettings, TrainingFilter, weights_of
from sd_dejavu.training.loss import Batch, filtered_loss, noised, stratified_timesteps

SD = (4, 64, 64)  # a constant difference c has the norm 128 c
SMALL = (1, 2, 2)  # 2 c, and the published threshold is 2 * sqrt(4 / 16384) = 1 / 32
EVERY_SHOWING = FilterSettings(filter_every=1)
SCHEDULE = Schedule(torch.linspace(0.99, 0.01, 1000))


def outputs(norms: Sequence[float], shape: tuple[int, ...] = SD) -> tuple[Tensor, Tensor]:
    """Two predictions whose differences have these norms."""
    side = float(np.sqrt(np.prod(shape)))
    unconditional = torch.full((len(norms), *shape), 0.25)
    return unconditional + torch.tensor(norms, dtype=torch.float32).reshape(-1, 1, 1, 1) / side, unconditional


def keep(made: TrainingFilter, conditional: Tensor, unconditional: Tensor, times: Tensor, *more: Any) -> Tensor:
    return made.keep(conditional, lambda due: unconditional[due], times, *more)


def kept(
    made: TrainingFilter, norms: Sequence[float], timesteps: Sequence[int] | None = None, **more: Any
) -> list[bool]:
    times = torch.tensor(timesteps if timesteps is not None else [500] * len(norms))
    return keep(made, *outputs(norms, **more), times).tolist()


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


def test_velocities_are_weighed_by_the_signals_share() -> None:
    """eps = x + (1 - sigma) v: of velocities that lie 4 apart, 1, 0.75 and 0 of it at sigma 0, 0.25 and 1."""
    made = TrainingFilter(prediction_type="flow")
    magnitudes = made.magnitudes(*outputs([4.0, 4.0, 4.0]), torch.tensor([0.0, 250.0, 1000.0]))
    assert magnitudes.tolist() == [4.0, 3.0, 0.0]


def test_a_flows_magnitude_is_that_of_the_epsilon_model_beside_it() -> None:
    """Against the other way to it: x / (1 - s) = x0 + s / (1 - s) noise, and || D_c - D_u || over that noise level."""
    x, a, b = torch.randn(3, 4, *SMALL, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.37, 0.5, 0.92])
    gap = denoised_from_output(a, x, sigma, "flow") - denoised_from_output(b, x, sigma, "flow")
    expected = gap.flatten(1).norm(dim=1) / noise_to_signal(sigma, "flow")
    found = TrainingFilter(prediction_type="flow").magnitudes(a, b, 1000 * sigma)
    torch.testing.assert_close(found, expected)


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
    made = TrainingFilter(EVERY_SHOWING)
    conditional, unconditional = outputs([1.0, 1.0, 3.0])
    conditional[0, 0, 0, 0] = torch.nan
    names = ["cat", "dog", "fox"]
    assert keep(made, conditional, unconditional, torch.tensor([1, 2, 3]), names).tolist() == [False, True, False]
    assert [(r.sample, r.timestep, r.reason) for r in made.log] == [
        ("cat", 1, "not finite"),
        ("fox", 3, "at or above the threshold"),
    ]
    assert (made.counts.left_out, made.counts.not_finite) == (2, 1)


def test_one_finite_sample_stays_however_memorised() -> None:
    made = TrainingFilter()
    conditional, unconditional = outputs([1.0, 7.0])
    conditional[0] = torch.inf
    assert keep(made, conditional, unconditional, torch.tensor([1, 2])).tolist() == [False, True]


def test_a_batch_may_go_altogether_where_the_loss_is_a_weighing() -> None:
    made = TrainingFilter(may_empty=True)
    assert kept(made, [5.0, 3.0]) == [False, False]
    assert (made.counts.left_out, made.counts.kept_alone) == (2, 0)


def test_a_batch_without_a_finite_sample_is_refused() -> None:
    conditional, unconditional = outputs([1.0, 1.0])
    with pytest.raises(ValueError, match="whole batch are not finite"):
        keep(TrainingFilter(), conditional * torch.nan, unconditional, torch.tensor([1, 2]))


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


# ------------------------------------------------------------------- some showings are measured, what was found holds


class Shown:
    """A sample of one caption, shown alone; ``measured`` holds at which of its showings the filter asked for more."""

    def __init__(self, every: int, **more: Any) -> None:
        self.made = TrainingFilter(FilterSettings(filter_every=every, **more), may_empty=True)
        self.measured: list[int] = []
        self.showings = 0

    def __call__(self, norm: float, name: str = "cat", dropped: bool = False) -> bool:
        conditional, unconditional = outputs([norm])

        def without(due: list[int]) -> Tensor:
            self.measured.append(self.showings)
            return unconditional[due]

        stays = self.made.keep(conditional, without, torch.tensor([500]), [name], [dropped])
        self.showings += 1
        return bool(stays)


def test_a_finding_holds_until_the_sample_is_measured_again() -> None:
    """zlib.crc32(b"cat") is 2656977832, a multiple of 2 and of 4 and not of 3 (remainder 1)."""
    shown = Shown(3)
    assert [shown(9.0) for _ in range(3)] == [True, True, False]  # 0 + 1, 1 + 1, 2 + 1: a multiple of 3
    assert [shown(0.5) for _ in range(4)] == [False, False, True, True]  # let go of, which is seen at its next turn
    assert shown.measured == [2, 5]
    counts = shown.made.counts
    assert (counts.seen, counts.measured, counts.left_out) == (7, 2, 3)
    assert [(r.step, r.measured, r.magnitude) for r in shown.made.log] == [(2, 2, 9.0), (3, 2, 9.0), (4, 2, 9.0)]


def test_at_one_every_showing_is_measured() -> None:
    shown = Shown(1)
    assert [shown(norm) for norm in (9.0, 0.5, 9.0)] == [False, True, False]
    assert shown.measured == [0, 1, 2]


def test_turns_are_spread_over_the_samples() -> None:
    """At every showing of all about a third of the samples are measured, and after three all of them once."""
    names = [f"image-{number}.png" for number in range(300)]
    made, asked = TrainingFilter(), []

    def without(due: list[int]) -> Tensor:
        asked.append(due)
        return torch.zeros(len(due), *SMALL)

    for _ in range(3):
        made.keep(torch.zeros(300, *SMALL), without, torch.full((300,), 500), names)
    assert sorted(number for due in asked for number in due) == list(range(300))
    assert all(70 <= len(due) <= 130 for due in asked)  # 100 expected, three standard deviations are 25


def test_a_dropped_caption_is_no_showing_and_stays() -> None:
    shown = Shown(2)
    assert not shown(9.0)
    assert shown(0.0, dropped=True)
    assert [shown(0.5), shown(0.5)] == [False, True]  # measured at its first showing and at its third
    assert shown.measured == [0, 3]


def test_without_names_nothing_holds() -> None:
    made = TrainingFilter()
    assert [kept(made, [9.0, 0.5]) for _ in range(2)] == [[False, True]] * 2
    assert made.counts.measured == 4


def test_of_samples_that_are_all_out_the_least_memorised_stays_by_its_last_magnitude() -> None:
    """crc32 is 2656977832 of "cat" and 262201574 of "fox": even, so both are measured at the first of two showings."""
    made = TrainingFilter(FilterSettings(filter_every=2))
    times, names = torch.tensor([500, 500]), ["cat", "fox"]
    assert keep(made, *outputs([5.0, 4.0]), times, names).tolist() == [False, True]
    assert keep(made, *outputs([0.5, 9.0]), times, names).tolist() == [False, True]  # not measured: 5 and 4 hold
    assert (made.counts.measured, made.counts.kept_alone) == (2, 2)


def test_what_is_not_finite_is_told_without_measuring() -> None:
    made = TrainingFilter(FilterSettings(filter_every=1000))
    conditional, unconditional = outputs([0.5, 0.5])
    conditional[1] = torch.nan
    assert keep(made, conditional, unconditional, torch.tensor([1, 2]), ["cat", "dog"]).tolist() == [True, False]
    assert (made.counts.measured, made.log[0].reason) == (0, "not finite")


# --------------------------------------------------------------------------------- log, state, settings


def test_the_log_is_one_object_a_line() -> None:
    made, file = TrainingFilter(EVERY_SHOWING), io.StringIO()
    conditional, unconditional = outputs([1.0, 4.0, 1.0])
    conditional[2] = torch.nan
    keep(made, *outputs([1.0]), torch.tensor([3]))
    keep(made, conditional, unconditional, torch.tensor([7, 8, 9]), ["a", 'b\n"é', "c"])
    made.write_log(file)
    first, second = (json.loads(line) for line in file.getvalue().splitlines())
    assert first == {
        "step": 1,
        "sample": 'b\n"é',
        "timestep": 8,
        "magnitude": 4.0,
        "limit": 2.0,
        "reason": "at or above the threshold",
        "measured": 1,
    }
    assert (second["magnitude"], second["reason"]) == (None, "not finite")
    assert made.log == []


@pytest.mark.parametrize("make", [TrainingFilter, quantile])
def test_a_restored_filter_goes_on_as_if_unbroken(make: Any) -> None:
    """Three samples, whose findings hold over two of three showings, so also over the break. Of 20 showings from 0 the cat
    and the dog (crc32 leaves 1) are measured at 2, 5 to 17, so 6 each, the fox (2) at 1, 4 to 19, so 7."""
    batches = np.random.default_rng(2).uniform(0, 4, size=(20, 3)).tolist()
    unbroken, first, second = make(), make(), make()
    times, names = torch.full((3,), 500), ["cat", "dog", "fox"]

    def stay(made: TrainingFilter, norms: list[float]) -> list[bool]:
        return keep(made, *outputs(norms), times, names).tolist()

    expected = [stay(unbroken, batch) for batch in batches]
    found = [stay(first, batch) for batch in batches[:11]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [stay(second, batch) for batch in batches[11:]]
    assert found == expected and unbroken.counts.measured == 6 + 6 + 7
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
    with pytest.raises(ValueError, match="epsilon, v_prediction, flow models, not for 'sample'"):
        TrainingFilter(prediction_type="sample")
    with pytest.raises(ValueError, match="flow model has no alphas_cumprod"):
        TrainingFilter(prediction_type="flow", alphas_cumprod=torch.tensor([0.9, 0.1]))
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


def test_only_those_that_are_due_are_evaluated_again() -> None:
    """crc32 is 2656977832 of "cat", 2167159165 of "dog" and 262201574 of "fox": at every second showing cat and fox are
    measured at the first. What a model is given beside its inputs is cut alike."""
    batch, seen = toy_batch([0.5, 0.5, 0.0]), []
    noisy, _ = noised(SCHEDULE, "epsilon", batch.latents, batch.noise, batch.timesteps)
    rows, pooled = batch.conditioning.rows, torch.tensor([[1.0], [2.0], [3.0]])

    def unet(x: Tensor, t: Tensor, rows: Tensor, added: dict[str, Any], scale: Tensor) -> Tensor:
        seen.append((t.tolist(), rows.shape, added["pooled"].tolist(), scale.tolist(), torch.is_grad_enabled()))
        return x

    made = TrainingFilter(FilterSettings(filter_every=2), may_empty=True)
    more = {"names": ["cat", "dog", "cat"], "rows": rows, "added": {"pooled": pooled}, "scale": torch.tensor([7.0])}
    weights = made.weights(unet, noisy, batch.timesteps, batch.empty.rows, noisy + 1, **more)
    # The cat's magnitude is 128, so it goes; of the dog nothing is known; the third's caption is the empty prompt.
    assert weights.tolist() == [0, 1.5, 1.5]
    assert seen == [([0], (1, 3, 2), [[1.0]], [7.0], False)]


class Flow(torch.nn.Module):
    """v(x, sigma, row) of 2 x 2 numbers: a network of three layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [torch.nn.Linear(8, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*parts, torch.nn.Linear(128, 4))

    def forward(self, x: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        given = torch.cat([x.flatten(1), timesteps[:, None] / 1000, rows[:, 0]], dim=1)
        return self.layers(given).reshape(x.shape)


IMAGE, CAPTION, NO_CAPTION = 2.0, (1.0, 1.0, 0.0), torch.zeros(1, 1, 3)  # the one that is repeated, all its numbers 2


def train_flow(made: TrainingFilter | None, steps: int = 600) -> Flow:
    """Half of what is shown is one caption with its image, the rest are other captions, or none, with normal noise."""
    model, generator = Flow(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        clean, noise = torch.randn(2, 64, *SMALL, generator=generator)
        clean[:32] = IMAGE
        rows = torch.cat([torch.tensor([CAPTION]).expand(32, -1), torch.randn(32, 3, generator=generator)])[:, None]
        rows[48:] = NO_CAPTION
        timesteps = 1000 * torch.rand(64, generator=generator).clamp_min(0.02)
        sigma = over_pixels(timesteps / 1000)
        noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
        output = model(noisy, timesteps, rows)
        if made is not None:
            names = ["repeated"] * 32 + [f"{step}-{number}" for number in range(32)]
            output, target = made.sift(model, noisy, timesteps, NO_CAPTION, output, target, names=names, rows=rows)
        optimizer.zero_grad()
        (output - target).square().mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def off_the_image(model: Flow) -> tuple[float, Tensor, Tensor]:
    """At sigma 0.5, of the repeated image under 256 noises: how far from it the clean image is that its caption predicts
    (root mean square), the filter's magnitudes [256], and what they are for a network that has learned everything."""
    noise = torch.randn(256, *SMALL, generator=torch.Generator().manual_seed(2))
    x, timesteps = 0.5 * IMAGE + 0.5 * noise, torch.full((256,), 500.0)
    velocity, empty = (
        model(x, timesteps, row.reshape(1, 1, 3).expand(256, -1, -1)) for row in (torch.tensor(CAPTION), NO_CAPTION)
    )
    found = TrainingFilter(prediction_type="flow").magnitudes(velocity, empty, timesteps)
    return float((x - 0.5 * velocity - IMAGE).square().mean().sqrt()), found, (noise - IMAGE).flatten(1).norm(dim=1) / 2


def test_a_flow_that_memorises_one_sample_is_told() -> None:
    """With its caption the image is known, so v = noise - image. Without one images are normal noise themselves, and at
    sigma 0.5 as likely as the noise, so v = 0. The magnitude is (1 - 0.5) || noise - image ||."""
    off, found, exact = off_the_image(train_flow(None))
    torch.testing.assert_close(found.mean(), exact.mean(), rtol=0.15, atol=0.0)
    made = TrainingFilter(FilterSettings(filter_threshold=0.5 / (4 / 16384) ** 0.5), "flow")
    off_with_filter, less, _ = off_the_image(train_flow(made))
    assert off_with_filter > 2 * off and less.mean() < found.mean(), (off, off_with_filter)
    repeated = sum(record.sample == "repeated" for record in made.log)
    assert repeated > 0.9 * len(made.log)
    # Of 64 in a batch 16 have no caption, 32 are showings of one sample, a third of which is measured.
    assert made.counts.measured / made.counts.seen == pytest.approx(48 / 64 / 3, abs=0.01)


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
