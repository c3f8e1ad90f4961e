"""The reference sampler against textbook steps, and shared batches against a plain loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hand_made import LinearDenoiser, v_scale
from torch import Tensor

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import (
    Evaluation,
    denoised_from_output,
    initial_latent,
    model_input,
    over_pixels,
    seeded_noise,
)
from sd_dejavu.core.sampling import Guidance, batches, first_step, predict, sample
from sd_dejavu.core.trace import Trace
from sd_dejavu.run.reference import sample_prompts, sampled

ABAR = [0.05, 0.3, 0.7, 0.95, 1.0]
SIGMAS = [((1 - a) / a) ** 0.5 for a in ABAR]


def conditioning(seed: int, rows: int = 3) -> Conditioning:
    return Conditioning(seeded_noise((rows, 4), seed, 1), prompt=str(seed))


class Textbook:
    """A network eps(x_t, c) = x_t / 2 + sum of rows, behind the denoiser's interface."""

    prediction_type = "epsilon"

    def eps(self, x_t: Tensor, rows: Tensor) -> Tensor:
        return x_t / 2 + rows.sum(1).reshape(-1, 1, 2, 2)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return denoised_from_output(self.eps(model_input(x, sigma), conditioning.rows), x, sigma, "epsilon")


def test_a_run_takes_textbook_ddim_steps_with_guidance() -> None:
    network, prompt, empty, scale = Textbook(), conditioning(1), conditioning(2), 7.5
    noise = seeded_noise((1, 2, 2), 0, 2)
    found = sample(network, initial_latent(noise, SIGMAS[0], "epsilon"), SIGMAS, prompt, Guidance(empty, scale))
    x_t = noise  # Song et al., 2021, equation 12 with sigma_t = 0, in the variance-preserving scale
    for a, following in pairwise(ABAR):
        e_u, e_c = network.eps(x_t, empty.rows), network.eps(x_t, prompt.rows)
        eps = e_u + scale * (e_c - e_u)
        x0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
        x_t = following**0.5 * x0 + (1 - following) ** 0.5 * eps
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-4)  # at abar = 1 both scales agree


def test_a_flow_run_takes_eulers_steps() -> None:
    network, prompt, empty = LinearDenoiser(prediction_type="flow", gain=0.5), conditioning(1), conditioning(2)
    levels = [1.0, 0.6, 0.3, 0.0]
    x = seeded_noise((1, 2, 2), 0, 2)
    found = sample(network, x, levels, prompt, Guidance(empty, 3.0))
    for level, following in pairwise(levels):  # dx/dsigma = velocity
        v_u, v_c = network.output(x, empty.rows), network.output(x, prompt.rows)
        x = x + (following - level) * (v_u + 3.0 * (v_c - v_u))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_a_run_hands_over_every_evaluation_and_tells_of_every_step() -> None:
    network, trace, seen = LinearDenoiser(), Trace(), []
    observed: list[Evaluation] = []

    def observe(evaluation: Evaluation) -> None:
        observed.append(evaluation)
        trace.record(evaluation.predictions)

    prompt, empty = conditioning(1), conditioning(2)
    x = seeded_noise((1, 2, 2), 0, 2)
    sample(network, x, SIGMAS, prompt, Guidance(empty), observe, seen.append)
    expected = float((prompt.rows - empty.rows).sum(1).norm())  # the same at every noise level
    assert seen == [0, 1, 2, 3]
    assert torch.equal(observed[0].x, x) and [float(e.sigma[0]) for e in observed] == pytest.approx(SIGMAS[:4])
    assert [r.sigma for r in trace.readings] == pytest.approx(SIGMAS[:4])
    assert [r.values for r in trace.readings] == [pytest.approx([expected] * 2, rel=1e-5)] * 4
    assert trace.baseline == "empty prompt"
    assert len(network.calls) == 2 * 4


def test_a_negative_prompt_is_measured_as_such_or_beside_the_empty_one() -> None:
    prompt, negative, empty = conditioning(1), conditioning(2), conditioning(3)
    x = seeded_noise((1, 2, 2), 0, 1)
    network, guidance = LinearDenoiser(), Guidance(negative, is_negative_prompt=True)
    (first,) = sampled(network, [prompt], guidance, x, SIGMAS, None, 1)
    assert len(network.calls) == 8
    (second,) = sampled(network, [prompt], guidance, x, SIGMAS, None, 1, "empty prompt", empty)
    assert len(network.calls) == 8 + 12  # one evaluation more at each step
    named, beside = first.trace, second.trace
    assert (named.baseline, beside.baseline) == ("negative prompt", "empty prompt")
    assert named.score().item() == pytest.approx(float((prompt.rows - negative.rows).sum(1).norm()), rel=1e-5)
    assert beside.score().item() == pytest.approx(float((prompt.rows - empty.rows).sum(1).norm()), rel=1e-5)
    assert torch.equal(first.latents, second.latents)


def test_every_prompt_runs_on_the_same_noise_and_may_end_early() -> None:
    network = LinearDenoiser(gain=0.3)
    prompts = [conditioning(1), conditioning(2, 5), conditioning(4), conditioning(5)]
    empty, noise = conditioning(3), seeded_noise((1, 2, 2), 0, 2)
    for batch_size, counts in ((1, [1, 1, 1, 1]), (4, [2, 1, 1]), (100, [3, 1])):
        done: list[int] = []
        runs = sample_prompts(network, prompts, Guidance(empty), noise, SIGMAS, 2, batch_size, done.append)
        assert done == counts  # the prompts of one length share batches, their images stay together
        for run, prompt in zip(runs, prompts, strict=True):
            x, alone = initial_latent(noise, SIGMAS[0], "epsilon"), Trace()
            latents = sample(
                network, x, SIGMAS[:3], prompt, Guidance(empty), lambda e, alone=alone: alone.record(e.predictions)
            )
            assert torch.allclose(run.latents, latents, rtol=1e-5)
            assert len(run.trace.readings) == 2
            assert run.trace.score(2).tolist() == pytest.approx(alone.score(2).tolist(), rel=1e-5)
            assert torch.allclose(run.trace.where(), alone.where(), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_first_step_in_shared_batches_equals_a_loop_over_prompts_and_images(prediction_type, batch_size) -> None:
    network, sigma = LinearDenoiser(prediction_type=prediction_type, gain=0.7), 0.9
    prompts = [conditioning(n, rows) for n, rows in enumerate([3, 5, 3, 2, 5, 3])]
    empty, noise, done = conditioning(9), seeded_noise((1, 2, 2), 0, 3), []
    found = first_step(network, prompts, empty, noise, sigma, batch_size, done.append)
    x = noise if prediction_type == "flow" else noise * (1 + sigma**2) ** 0.5
    for i, prompt in enumerate(prompts):
        for j in range(3):
            gap = network.output(x[j : j + 1], prompt.rows) - network.output(x[j : j + 1], empty.rows)
            by_hand = v_scale(prediction_type, sigma) * float(gap.square().sum() ** 0.5)
            assert found[i, j].item() == pytest.approx(by_hand, rel=1e-4)
    assert sum(done) == 6 * 3
    assert all(size <= batch_size for size, _ in network.calls)
    unconditional = sum(size for size, c in network.calls if torch.equal(c.rows[:1], empty.rows))
    assert unconditional == 3  # once a noise, whatever the number of prompts
    assert sum(size for size, _ in network.calls) == 3 + 6 * 3


def test_extras_travel_with_their_prompt_through_shared_batches() -> None:
    class Pooled(LinearDenoiser):
        def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            return super().__call__(x, sigma, conditioning) - sigma.reshape(-1, 1, 1, 1) * conditioning.extras[
                "pooled"
            ].reshape(-1, 1, 1, 1)

    zero = torch.zeros(1, 2, 4)
    prompts = [Conditioning(zero, {"pooled": torch.tensor([[p]])}) for p in (1.0, 2.0, 3.0)]
    empty = Conditioning(zero, {"pooled": torch.zeros(1, 1)})
    found = first_step(Pooled(), prompts, empty, seeded_noise((1, 2, 2), 0, 2), 2.0, 4)
    # The noise prediction differs by p in each of 4 elements: 2 p.
    assert found.flatten().tolist() == pytest.approx([2, 2, 4, 4, 6, 6], rel=1e-5)


def test_what_a_host_keeps_with_a_prompt_reaches_the_model_with_that_prompt_alone() -> None:
    class Host(LinearDenoiser):
        def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
            return super().__call__(x, sigma, conditioning) - over_pixels(sigma) * conditioning.host_values["number"]

    prompts = [Conditioning(torch.zeros(1, 2, 4), host_values={"number": p}) for p in (1.0, 2.0, 3.0)]
    empty = Conditioning(torch.zeros(1, 2, 4), host_values={"number": 0.0})
    noise = seeded_noise((1, 2, 2), 0, 2)
    found = first_step(Host(), prompts, empty, noise, 2.0, 4)
    # The noise prediction differs by the prompt's number in each of 4 elements: 2 p.
    assert found.flatten().tolist() == pytest.approx([2, 2, 4, 4, 6, 6], rel=1e-5)
    runs = sample_prompts(Host(), prompts, Guidance(empty, 1.0), noise, [2.0, 1.0, 0.0])
    assert [run.trace.score(1).tolist() for run in runs] == [pytest.approx([2 * p] * 2, rel=1e-5) for p in (1, 2, 3)]


def test_predictions_that_are_not_finite_raise_instead_of_scoring() -> None:
    broken = Conditioning(torch.full((1, 3, 4), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        first_step(LinearDenoiser(), [conditioning(1), broken], conditioning(2), seeded_noise((1, 2, 2), 0, 1), 1.0)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batches_hold_every_job_once_and_one_length_each(batch_size: int) -> None:
    lengths = [77, 154, 77, 77, 231]
    made = list(batches(lengths, 3, batch_size))
    assert sorted(job for part in made for job in part) == [(p, i) for p in range(5) for i in range(3)]
    assert all(len({lengths[p] for p, _ in part}) == 1 and len(part) <= batch_size for part in made)
    assert len(made) == sum(-(-jobs // batch_size) for jobs in (9, 3, 3))


def test_predicting_in_parts_equals_predicting_at_once() -> None:
    network, x, sigma = LinearDenoiser(gain=0.5), seeded_noise((1, 2, 2), 0, 5), torch.linspace(0.5, 2, 5)
    prompt = conditioning(1)
    torch.testing.assert_close(predict(network, x, sigma, prompt, 2), network(x, sigma, prompt))
    assert [size for size, _ in network.calls] == [2, 2, 1, 5]
