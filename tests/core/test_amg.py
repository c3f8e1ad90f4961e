"""Anti-memorization guidance against the paper's formulas in the paper's own scale, written out a second time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hand_made import LinearDenoiser, encoder
from memoriser import SHAPE as PIXELS
from memoriser import Memoriser
from torch import Tensor

from sd_dejavu.core.conditioning import Conditioning
from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.core.guidance import GuidedStep
from sd_dejavu.mitigations.anti_memorization_guidance import (
    DDPM,
    AntiMemorization,
    Settings,
    similarity_gradient,
    strengths,
    threshold_at,
    time_of,
)
from sd_dejavu.mitigations.guard import Guard
from sd_dejavu.reference.build import from_images
from sd_dejavu.reference.features import Pixels

SCALE, COPY = 7.5, -1.4  # nL2 above which the paper calls an image a copy
CAPTIONS = ("red", "red fox", "fox", "", "red red red")


class Network:
    """Features of a small random network with a smooth non-linearity, for cosine."""

    name, metric = "random network", "cosine"

    def __init__(self, width: int = 6) -> None:
        self.weight = seeded_noise((width, 48), 3, 1)[0] / 4

    def __call__(self, images: Tensor) -> Tensor:
        return F.normalize(torch.tanh(images.flatten(1).float() @ self.weight.T.to(images)), dim=1)


def decode(latents: Tensor) -> Tensor:
    """[B, 1, 2, 2] -> [B, 3, 4, 4], not linear."""
    larger = latents.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return torch.sigmoid(torch.cat([larger, larger**2, -larger], 1))


def guard_of(features=None, captions=CAPTIONS) -> Guard:
    features = features or Network()
    images = decode(seeded_noise((1, 2, 2), 4, len(captions)))
    reference = from_images(images, captions, list("abcde"), features)
    return Guard(features, reference, reference.captions)


def step_of(images: int = 3, sigma: float = 2.0, gain: float = 0.3) -> GuidedStep:
    model, encode = LinearDenoiser(gain=gain), encoder({"red": 0.2, "fox": 0.1})
    x, level = 2 * seeded_noise((1, 2, 2), 0, images), torch.full((images,), sigma)

    def predict(conditioning: Conditioning) -> Tensor:
        return model(x, level, conditioning)

    return GuidedStep(x, level, predict(encode("fox")), predict(encode("")), SCALE, 0, predict)


ENCODE = encoder({"red": 0.2, "fox": 0.1})


# ------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("schedule", ["stable diffusion", "ddpm"])
def test_a_level_of_the_schedule_is_its_place_in_it(schedule) -> None:
    abar, levels = 1.0, []
    for n in range(1000):  # one product after the other, in Python's double precision
        share = n / 999
        beta = 1e-4 + share * (0.02 - 1e-4)
        if schedule == "stable diffusion":
            beta = (0.00085**0.5 + share * (0.012**0.5 - 0.00085**0.5)) ** 2
        abar *= 1 - beta
        levels.append(((1 - abar) / abar) ** 0.5)
    places = [0, 1, 500, 981, 999]
    found = time_of(torch.tensor([levels[p] for p in places]), schedule)
    assert found.tolist() == pytest.approx([p / 1000 for p in places], abs=2e-5)
    between = (levels[500] * levels[501]) ** 0.5  # half way in log sigma
    assert float(time_of(torch.tensor([between]), schedule)) == pytest.approx(0.5005, abs=2e-5)
    assert time_of(torch.tensor([1e-9, 1e9]), schedule).tolist() == pytest.approx([0, 0.999])


def test_the_threshold_rises_as_published() -> None:
    t = torch.tensor([1.0, 0.5, 0.0])
    expected = [0.3 + 0.1 * 2.718281828**-5, 0.3 + 0.1 * 2.718281828**-2.5, 0.4]
    assert threshold_at(t, Settings()).tolist() == pytest.approx(expected, rel=1e-5)
    assert threshold_at(torch.zeros(1), DDPM).item() == pytest.approx(-1.5)


@pytest.mark.parametrize(
    ("similarity", "scale", "s1", "s2"),
    [
        (0.1, 7.5, 1.3, 6.5 / 3),  # c1 s and c2 s
        (0.4, 7.5, 5.2, 1.3),  # s2 has what s1 leaves of 6.5
        (0.6, 7.5, 6.5, 0.0),
        (-0.5, 7.5, 0.0, 0.0),
        (0.5, 1.0, 0.0, 0.0),  # no guidance to take from
        (0.5, 0.5, 0.0, 0.0),
    ],
)
def test_guidance_is_taken_back_down_to_one(similarity, scale, s1, s2) -> None:
    found = strengths(torch.tensor([similarity]), scale, Settings())
    assert [float(v) for v in found] == pytest.approx([s1, s2], rel=1e-5, abs=1e-6)


def in_the_papers_scale(step: GuidedStep, guard: Guard, settings: Settings) -> Tensor:
    """Equations 10 to 17 in x_t, abar and eps; returns x0_hat of the new eps."""
    sigma = step.sigma.reshape(-1, 1, 1, 1)
    abar = 1 / (1 + sigma**2)
    x_t = (abar.sqrt() * step.x).requires_grad_(True)

    def eps_of(denoised: Tensor) -> Tensor:
        return (step.x - denoised) / sigma

    eps_c, eps_u = eps_of(step.conditional), eps_of(step.unconditional)
    eps = eps_u + SCALE * (eps_c - eps_u)
    x0 = (x_t - (1 - abar).sqrt() * eps.detach()) / abar.sqrt()
    embedded = guard.features(decode(x0))
    every = embedded @ guard.references.embeddings.T  # type: ignore[attr-defined]
    s, nearest = every.max(1)
    gradient = torch.autograd.grad(s.sum(), x_t)[0]
    s = s.detach()
    t = time_of(step.sigma, settings.training_schedule)
    new = eps.clone()
    for image in range(len(x_t)):
        if s[image] <= settings.threshold + settings.threshold_rise * torch.exp(-settings.threshold_rate * t[image]):
            continue
        s1 = max(min(settings.despecification * float(s[image]), SCALE - 1), 0)
        s2 = max(min(settings.deduplication * float(s[image]), SCALE - s1 - 1), 0)
        caption = guard.captions[int(nearest[image])]
        eps_n = eps_of(step.predict(ENCODE(caption)))
        c3 = settings.dissimilarity
        if settings.dissimilarity_strength == "published":
            c3 = c3 * (float(s[image]) - 0.3) * float(torch.exp((1000 - 1000 * t[image]) / 170))
        new[image] -= s1 * (eps_c - eps_u)[image] + s2 * (eps_n - eps_u)[image]
        new[image] += c3 * float((1 - abar)[image].sqrt()) * gradient[image]
    return ((x_t - (1 - abar).sqrt() * new) / abar.sqrt()).detach()


TERMS = {
    "all": {},
    "constant strength": {"dissimilarity_strength": "constant", "dissimilarity": 0.5},
    "despecification": {"deduplication": 0, "dissimilarity": 0},
    "deduplication": {"despecification": 0, "dissimilarity": 0},
    "dissimilarity": {"despecification": 0, "deduplication": 0},
    "none": {"despecification": 0, "deduplication": 0, "dissimilarity": 0},
}


@pytest.mark.parametrize("sigma", [0.4, 2.0, 9.0])
@pytest.mark.parametrize("terms", TERMS)
def test_the_guided_prediction_is_that_of_the_papers_equations(terms, sigma) -> None:
    guard, step = guard_of(), step_of(images=4, sigma=sigma)
    settings = Settings(threshold=-1, threshold_rise=0, **{"dissimilarity": 0.01, "despecification": 2, **TERMS[terms]})
    shifted = replace(settings, threshold=0.3) if terms != "constant strength" else settings
    rule = AntiMemorization(guard, decode, ENCODE, shifted, "epsilon")
    found, expected = rule(step), in_the_papers_scale(step, guard, shifted)
    assert rule.acted[0].any()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    changed = float((found - step.plain).abs().max())
    assert (changed == 0) == (terms == "none")


@pytest.mark.parametrize(("kind", "level"), [("v_prediction", 2.0), ("flow", 0.3), ("flow", 0.8), ("flow", 0.93)])
@pytest.mark.parametrize("terms", ["all", "dissimilarity"])
def test_v_and_flow_models_are_guided_by_the_same_equations(kind, level, terms) -> None:
    """A flow model's x = (1 - s) x0 + s noise over (1 - s) is the paper's, at sigma = s / (1 - s)."""
    guard, model = guard_of(), LinearDenoiser(prediction_type=kind, gain=0.3)
    x, levels = 2 * seeded_noise((1, 2, 2), 0, 4), torch.full((4,), level)

    def predict(conditioning: Conditioning) -> Tensor:
        return model(x, levels, conditioning)

    step = GuidedStep(x, levels, predict(ENCODE("fox")), predict(ENCODE("")), SCALE, 0, predict)
    signal = 1 - level if kind == "flow" else 1.0
    the_papers = replace(step, x=x / signal, sigma=levels / signal)
    settings = Settings(
        threshold=0.2, threshold_rise=0, **{"dissimilarity": 0.01, "despecification": 2, **TERMS[terms]}
    )
    rule = AntiMemorization(guard, decode, ENCODE, settings, kind)
    found = rule(step)
    assert rule.acted[0].any() and not torch.equal(found, step.plain)
    # 0.3 is the published strength's threshold, written into the equations above.
    expected = in_the_papers_scale(the_papers, guard, replace(settings, dissimilarity=0))
    acted = rule.acted[0]
    sigma = level / signal
    s = guard.references.search(guard.features(decode(step.plain)), 1)
    slope = similarity_gradient(guard, decode, step.plain, s.index[:, 0])
    t = time_of(torch.tensor([sigma]), "stable diffusion")
    strength = 0.01 * (s.similarity[:, 0] - 0.2) * torch.exp((1000 - 1000 * t) / 170) * sigma**2
    expected = expected - (strength * acted)[:, None, None, None] * slope
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_pure_noise_counts_as_the_training_schedules_highest_level() -> None:
    abar = 1.0
    for n in range(1000):
        abar *= 1 - (0.00085**0.5 + n / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
    highest = ((1 - abar) / abar) ** 0.5  # 14.6
    guard, given = guard_of(), step_of(images=3)
    only = {"despecification": 0, "deduplication": 0, "dissimilarity": 0.01, "dissimilarity_strength": "constant"}
    rule = AntiMemorization(guard, decode, ENCODE, Settings(threshold=-1, threshold_rise=0, **only), "flow")
    index = guard.references.search(guard.features(decode(given.plain)), 1).index[:, 0]
    slope = similarity_gradient(guard, decode, given.plain, index)
    for s in (1.0, 0.99, 0.95):  # s / (1 - s) is infinite, 99 and 19
        found = rule(replace(given, sigma=torch.full((3,), s)))
        torch.testing.assert_close(found, given.plain - 0.01 * highest**2 * slope, rtol=1e-4, atol=1e-4)


def test_images_below_the_threshold_are_left_bit_for_bit() -> None:
    guard, step = guard_of(), step_of(images=6)
    s = guard.references.search(guard.features(decode(step.plain)), 1).similarity[:, 0]
    middle = float(s.sort().values[2:4].mean())
    for threshold, acting in ((1.0, torch.zeros(6, dtype=torch.bool)), (middle, s > middle)):
        rule = AntiMemorization(guard, decode, ENCODE, Settings(threshold=threshold, threshold_rise=0), "epsilon")
        found = rule(step)
        assert rule.acted[0].tolist() == acting.tolist()
        for image in range(6):
            assert torch.equal(found[image], step.plain[image]) != bool(acting[image])


def test_captions_are_encoded_once_and_captions_of_one_length_share_an_evaluation() -> None:
    encoded, asked = [], []
    guard, step = guard_of(), step_of(images=6)

    def encode(caption: str) -> Conditioning:
        encoded.append(caption)
        return ENCODE(caption)

    def predict(conditioning: Conditioning) -> Tensor:
        asked.append(tuple(conditioning.rows.shape[:2]))
        return step.predict(conditioning)

    rule = AntiMemorization(guard, decode, encode, Settings(threshold=-1, despecification=0), "epsilon")
    asking = replace(step, predict=predict)
    index = guard.references.search(guard.features(decode(step.plain)), 1).index[:, 0].tolist()
    captions = {CAPTIONS[i] for i in index} - {""}
    assert len(captions) > 1  # else this test says nothing
    first = rule(asking)
    assert sorted(encoded) == sorted(captions)
    assert sorted(asked) == sorted({(6, len(c.split()) + 2) for c in captions})
    assert torch.equal(first, rule(asking)) and sorted(encoded) == sorted(captions)


@pytest.mark.parametrize("features", [Network(), Pixels(4)], ids=["cosine", "normalised L2"])
def test_the_gradient_is_that_of_finite_differences(features) -> None:
    """Through decoder and features, in double precision; nL2's denominator is a constant, and held so here."""
    guard, latents = guard_of(features), seeded_noise((1, 2, 2), 11, 3)
    index = torch.tensor([4, 0, 2])
    found = similarity_gradient(guard, decode, latents, index)
    rows = guard.references.embeddings[index].double()  # type: ignore[attr-defined]
    held = None if features.metric == "cosine" else guard.references.denominator(features(decode(latents)))  # type: ignore[attr-defined]

    def similarity(at: Tensor) -> Tensor:
        if held is None:
            weight = features.weight.double()
            return (F.normalize(torch.tanh(decode(at).flatten(1) @ weight.T), dim=1) * rows).sum(1)
        return -(decode(at).flatten(1) - rows).norm(dim=1) / held.double()

    h, at = 1e-6, latents.double()
    for place in range(4):
        nudge = torch.zeros(4, dtype=torch.float64)
        nudge[place] = h
        nudge = nudge.reshape(1, 1, 2, 2)
        expected = (similarity(at + nudge) - similarity(at - nudge)) / (2 * h)
        torch.testing.assert_close(found.flatten(1)[:, place].double(), expected, atol=1e-4, rtol=1e-3)


# --------------------------------------------------------------------- a model without a prompt

MEMORISER = Memoriser()
LEVELS = torch.linspace(20 ** (1 / 7), 0.02 ** (1 / 7), 40) ** 7
UNCONDITIONAL = replace(DDPM, threshold=-1.5, threshold_rise=0.1)  # 64 images have nearer neighbours than 50,000


def images(x: Tensor) -> Tensor:
    return x / 2 + 0.5


@pytest.fixture(scope="module")
def training() -> Guard:
    features, shown = Pixels(4), images(MEMORISER.training_images())
    reference = from_images(shown, [""] * len(shown), [str(n) for n in range(len(shown))], features)
    return Guard(features, reference, reference.captions)


def refuse(conditioning: Conditioning) -> Tensor:
    raise AssertionError("a model without prompts was asked for one")


def nearest(guard: Guard, x: Tensor) -> Tensor:
    return guard.references.search(guard.features(images(x)), 1).similarity[:, 0]


def drawn(rule, images: int = 48) -> Tensor:
    x = seeded_noise(PIXELS, 0, images) * LEVELS[0]
    for number, (level, following) in enumerate(pairwise([*LEVELS, torch.zeros(())])):
        sigma = level.expand(images)
        denoised = MEMORISER.denoised(x, sigma)
        if rule is not None:
            denoised = rule(GuidedStep(x, sigma, denoised, denoised, 1.0, number, refuse))
        x = denoised + following / level * (x - denoised)
    return x


def test_an_unconditional_model_stops_copying_and_its_other_images_stay(training) -> None:
    plain = drawn(None)
    copied = nearest(training, plain) > COPY
    assert 0.25 <= float(copied.float().mean()) <= 0.75  # half of its mass is memorised
    rule = AntiMemorization(training, images, None, UNCONDITIONAL, "epsilon")
    found = drawn(rule)
    acted = torch.stack(rule.acted).any(0)
    assert not bool((nearest(training, found) > COPY).any())
    assert bool(acted[copied].all())
    same = torch.tensor([torch.equal(a, b) for a, b in zip(found, plain, strict=True)])
    assert torch.equal(same, ~acted) and int(same.sum()) >= 12
    # What they became is no noise: as broad as the law they come from (its standard deviation is .5).
    assert float(found[copied].std()) == pytest.approx(0.5, abs=0.1)
    off = AntiMemorization(training, images, None, replace(UNCONDITIONAL, dissimilarity=0), "epsilon")
    assert torch.equal(drawn(off), plain)  # the other two terms have nothing to take back
