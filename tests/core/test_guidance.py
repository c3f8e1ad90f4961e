"""Guidance rules and noise methods against numbers worked by hand, and their way through the reference sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hand_made import LinearDenoiser, encoder, v_scale
from torch import Tensor

from sd_dejavu.core.attention import AttentionRule
from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.core.guidance import GuidedStep, guided
from sd_dejavu.core.sampling import Guidance, sample
from sd_dejavu.mitigations import Outcome, Start, batch_wise_noise, per_sample_noise
from sd_dejavu.mitigations.batch_wise_noise import LateGuidance
from sd_dejavu.mitigations.guidance_transition import Transition
from sd_dejavu.run.measure import Measurement, sampled_with

SIGMA = 2.0
STRENGTHS = {"red": 0.5, "fox": 1.0}  # together a magnitude of 2 * 1.5 at gain 0


def step_of(number: int, sigma: float, magnitudes: list[float], scale: float = 7.5) -> GuidedStep:
    """Four numbers an image that differ by sigma * magnitude / 2 each: a norm of sigma * magnitude."""
    count = len(magnitudes)
    base = seeded_noise((1, 2, 2), 1, count)
    gap = torch.tensor(magnitudes).reshape(-1, 1, 1, 1) * sigma / 2
    return GuidedStep(base, torch.full((count,), sigma), base + gap, base, scale, number, lambda c: base)


def guiding(rule, step: GuidedStep, early: Tensor) -> list[bool]:
    """Which images were guided as usual; the others must be ``early`` bit for bit."""
    found = rule(step)
    usual = [torch.equal(a, b) for a, b in zip(found, step.plain, strict=True)]
    assert all(u or torch.equal(a, b) for u, a, b in zip(usual, found, early, strict=True))
    return usual


def test_guidance_is_the_textbook_formula_for_one_scale_and_for_one_an_image() -> None:
    c, u = seeded_noise((1, 2, 2), 0, 2), seeded_noise((1, 2, 2), 1, 2)
    torch.testing.assert_close(guided(c, u, 3.0), 3 * c - 2 * u)
    torch.testing.assert_close(guided(c, u, torch.tensor([3.0, 0.0])), torch.stack([3 * c[0] - 2 * u[0], u[1]]))


@pytest.mark.parametrize("before", ["off", "opposite"])
def test_guidance_begins_after_the_first_minimum_of_each_image(before) -> None:
    rule = Transition(before)
    curves = [[5.0, 3.0, 2.0, 2.5, 1.0], [1.0, 2.0, 1.0, 0.5, 0.4], [5.0, 4.0, 3.0, 2.0, 1.0]]
    seen = []
    for number, sigma in enumerate([8.0, 6.0, 4.0, 2.0, 1.0]):
        step = step_of(number, sigma, [curve[number] for curve in curves])
        opposite = 8.5 * step.unconditional - 7.5 * step.conditional
        found = rule(step)
        usual = [torch.equal(a, b) for a, b in zip(found, step.plain, strict=True)]
        early = step.unconditional if before == "off" else opposite
        torch.testing.assert_close(found, torch.where(torch.tensor(usual)[:, None, None, None], step.plain, early))
        seen.append(usual)
    assert list(zip(*seen, strict=True)) == [
        (False, False, False, True, True),
        (False, True, True, True, True),
        (False, False, False, False, False),
    ]


def test_a_second_evaluation_at_a_level_is_no_minimum() -> None:
    """Heun's sampler asks at 8, 6 (its corrector), 6, 4, 4, 2: the corrector's own magnitudes do not count."""
    rule, seen = Transition("off"), []
    path = [(8.0, 5.0), (6.0, 4.0), (6.0, 4.5), (4.0, 3.0), (4.0, 3.5), (2.0, 3.2)]
    for number, (sigma, value) in enumerate(path):
        step = step_of(number, sigma, [value])
        seen += guiding(rule, step, step.unconditional)
    assert seen == [False, False, False, False, False, True]


def test_late_guidance_begins_at_its_noise_level_however_often_a_level_is_asked() -> None:
    rule, seen = LateGuidance(0.5), []
    for number, sigma in enumerate([8.0, 6.0, 6.0, 4.0, 4.0, 1.0]):
        step = step_of(number, sigma, [1.0])
        seen += guiding(rule, step, step.unconditional)
    assert seen == [False, False, False, True, True, True]


def test_late_guidance_of_a_flow_model_counts_noise_over_signal() -> None:
    """s / (1 - s), at most 14.61: .64 of that is 9.35, which s = .9034 has."""
    rule, seen = LateGuidance(0.64, "flow"), []
    for number, sigma in enumerate([1.0, 0.95, 0.91, 0.9, 0.5]):
        step = step_of(number, sigma, [1.0])
        seen += guiding(rule, step, step.unconditional)
    assert seen == [False, False, False, True, True]


@pytest.mark.parametrize("rule", [Transition("off"), LateGuidance(0.5)])
def test_rules_about_guidance_refuse_a_run_without_it(rule) -> None:
    with pytest.raises(ValueError, match=r"changes guidance, and this run has none .*choose another method"):
        rule(step_of(0, 2.0, [1.0], scale=1.0))


# ---------------------------------------------------------------------- through the sampler


def test_a_rule_is_asked_at_every_step_and_may_predict_under_another_conditioning() -> None:
    model, encode = LinearDenoiser(gain=0.3), encoder(STRENGTHS)
    x, sigmas, seen = seeded_noise((1, 2, 2), 0, 2), [3.0, 2.0, 1.0, 0.0], []

    def rule(step: GuidedStep) -> Tensor:
        seen.append((step.number, float(step.sigma[0]), step.scale))
        torch.testing.assert_close(step.predict(encode("red")), model(step.x, step.sigma, encode("red")))
        return step.plain

    with_rule = sample(model, x, sigmas, encode("red fox"), Guidance(encode("")), rule=rule)
    assert seen == [(0, 3.0, 7.5), (1, 2.0, 7.5), (2, 1.0, 7.5)]
    assert torch.equal(with_rule, sample(model, x, sigmas, encode("red fox"), Guidance(encode(""))))


def test_an_outcome_is_drawn_from_its_noise_under_its_rule_and_its_attention() -> None:
    model, encode, wanted = LinearDenoiser(gain=0.3), encoder(STRENGTHS), Measurement(images=2, steps=3)
    model.encode = encode
    x, other = seeded_noise((1, 2, 2), 0, 2), seeded_noise((1, 2, 2), 5, 2)
    half = AttentionRule(torch.tensor([1.0, 0.5, 1.0, 1.0]), torch.tensor([True, True, False, True]))
    conditioning = replace(encode("red fox"), attention=half)
    outcome = Outcome(conditioning, 0, 0, x=other, rule=lambda: lambda step: step.conditional)
    found = sampled_with(model, outcome, x, wanted)
    # Half of 'red' and nothing of 'fox' is left; a rule that returns the conditional prediction is guidance 1.
    by_hand = sample(model, other, [3.0, 2.0, 1.0, 0.0], encoder({"red": 0.25})("red"), Guidance(encode(""), 1.0))
    torch.testing.assert_close(found.latents, by_hand)
    assert found.prompt == "red fox" and len(found.per_step) == 3
    assert found.per_step[0][1] == pytest.approx(sum(0.5 * abs(1 + 0.3 * float(i.mean())) for i in other) / 2, rel=1e-4)


# ------------------------------------------------------------------------------- initial noise


def begin(model: LinearDenoiser, images: int = 2) -> Start:
    return Start.of(model, seeded_noise((1, 2, 2), 0, images).abs(), SIGMA, encoder({})(""), 1.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_batch_wise_noise_moves_by_the_finite_difference(prediction_type) -> None:
    """Delta = k (1 + gain m(x)) (1.5, 1.5, 1.5, 1.5); a step of r along its direction moves the mean by r / 2."""
    model, gain, gamma, radius = LinearDenoiser(prediction_type=prediction_type, gain=0.2), 0.2, 0.7, 0.4
    settings = batch_wise_noise.Settings(noise_rounds=2, noise_strength=gamma, noise_radius=radius)
    first = begin(model)
    found = batch_wise_noise.adjust(model, encoder(STRENGTHS)("red fox"), first, settings)
    unit = 1.0 if prediction_type == "flow" else 5**0.5  # of the scale at sigma 2
    gap = v_scale(prediction_type, SIGMA) * gain * (unit * radius * 2 / 2) * 1.5  # radius counts sqrt(4) = 2
    torch.testing.assert_close(found.x, first.x - 2 * unit * gamma * gap)
    assert found.score(model, encoder(STRENGTHS)("red fox")) < first.score(model, encoder(STRENGTHS)("red fox"))


def test_per_sample_noise_takes_adamws_steps_until_each_image_is_there() -> None:
    """A constant gradient: AdamW decays the noise by lr / 100 of itself and takes lr from each number."""
    gain, rate = 0.2, 0.05
    model, encode = LinearDenoiser(gain=gain), encoder(STRENGTHS)
    first = begin(model)
    noise, means = first.x / 5**0.5, []
    for _ in range(4):
        means.append([3 * (1 + gain * float(image.mean()) * 5**0.5) for image in noise])
        noise = noise * (1 - 0.01 * rate) - rate
    low, high = sorted(range(2), key=lambda image: means[0][image])
    target = (means[1][low] + means[2][low]) / 2  # the lower image is there after two updates
    settings = per_sample_noise.Settings(noise_iterations=3, noise_rate=rate)
    found = per_sample_noise.optimise(model, encode("red fox"), encode(""), first.x, first.sigma, target, settings)
    assert [row[high] for row in found.magnitudes] == pytest.approx([row[high] for row in means], rel=1e-4)
    assert [row[low] for row in found.magnitudes] == pytest.approx([means[n][low] for n in (0, 1, 2, 2)], rel=1e-4)
    after = first.moved(model, found.x)
    assert after.score(model, encode("red fox")) == pytest.approx(max(means[2][low], means[3][high]), rel=1e-4)


def test_a_broken_model_or_target_stops_the_noise_method() -> None:
    model, broken = LinearDenoiser(), Conditioning(torch.full((1, 3, 4), float("nan")))
    first = begin(model)
    with pytest.raises(ValueError, match="at iteration 0"):
        per_sample_noise.optimise(model, broken, encoder({})(""), first.x, first.sigma, 1.0)
    with pytest.raises(ValueError, match="must be positive, not 0"):
        per_sample_noise.optimise(model, broken, encoder({})(""), first.x, first.sigma, 0.0)
