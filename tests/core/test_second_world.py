"""The second little model memorises, and on it p-values hold with nulls that fit, as those that do not are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sd_dejavu.calibration.calibrate import calibrate
from sd_dejavu.calibration.misfit import stranger_nulls
from sd_dejavu.calibration.recombined import recombined
from sd_dejavu.core.similarity import COPY_THRESHOLD, grey_correlation
from sd_dejavu.core.statistics import kolmogorov_two_samples
from sd_dejavu.demo import bundled, second_world
from sd_dejavu.demo.world import ordinary_captions
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.run.measure import Measurement, measure, measure_runs

GIVEN, FRESH, NULLS = 120, 150, 400
ONE = Measurement(images=1)
CAPTIONS, _ = second_world.held_out(GIVEN + FRESH)


@pytest.fixture(scope="module")
def model():
    return load(str(second_world.FOLDER))


@pytest.fixture(scope="module")
def fresh(model) -> list[float]:
    """First-step scores of captions that training never saw, each on a noise of its own."""
    found = [measure(model, [c], Measurement(images=1, seed=30_000 + n))[0] for n, c in enumerate(CAPTIONS[GIVEN:])]
    return [float(one.scores.mean()) for one in found]


@pytest.fixture(scope="module")
def fitting(model):
    return calibrate(model, recombined(CAPTIONS[:GIVEN], NULLS), ONE, ordinary="recombined")


def test_its_pairs_are_copied_and_others_are_not(model):
    pairs = second_world.training_pairs()
    own = torch.from_numpy(np.stack([second_world.draw_pair(p) for p in pairs])).permute(0, 3, 1, 2).float() / 255
    captions = [p.caption for p in pairs[::4]] + CAPTIONS[:10]
    runs = measure_runs(model, [model.encode(c) for c in captions], model.noise(0, 1), Measurement(images=1, steps=20))
    likeness = torch.cat([grey_correlation(model.decode(run.latents), own) for run in runs])
    copied = [bool(likeness[n, 4 * n] >= COPY_THRESHOLD) for n in range(10)]
    assert sum(copied) >= 8
    assert not (likeness[10:].max(1).values >= COPY_THRESHOLD).any()


def test_it_is_small_and_another_world_than_the_bundled_one(model):
    files = [f for f in second_world.FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 4 * 2**20
    assert model.latent_shape == (4, 12, 12)
    assert not {p.caption for p in second_world.training_pairs()} & {p.caption for p in bundled.pairs()}


def distance(fresh, profile) -> float:
    return kolmogorov_two_samples(fresh, profile.null_scores("first step", 1))[0]


@pytest.fixture(scope="module")
def own_list(model):
    captions, _ = second_world.held_out(GIVEN + FRESH + NULLS)
    return calibrate(model, captions[GIVEN + FRESH :], ONE, ordinary="own list")


@pytest.fixture(scope="module")
def strangers(model):
    return calibrate(model, [caption for caption, _ in ordinary_captions(NULLS, 3)], ONE)


def test_p_values_of_its_own_ordinary_captions_are_uniform_against_others_of_its_world(fresh, own_list):
    nulls = own_list.null_scores("first step", 1)
    assert kolmogorov_two_samples(fresh, nulls)[1] > 0.05
    assert not stranger_nulls(fresh, nulls)


def test_recombined_ones_are_nearer_to_them_than_those_of_another_world(fresh, fitting, strangers):
    assert distance(fresh, fitting) < 0.8 * distance(fresh, strangers)
    assert fitting.ordinary == "recombined"


def test_with_the_bundled_worlds_captions_they_are_not_and_that_is_said(fresh, strangers):
    nulls = strangers.null_scores("first step", 1)
    assert kolmogorov_two_samples(fresh, nulls)[1] < 0.01
    assert stranger_nulls(fresh, nulls)


def test_the_mitigations_default_target_is_that_of_the_nulls_that_fit(model, fresh, own_list):
    assert own_list.quantile(0.5) == pytest.approx(float(np.median(fresh)), rel=0.1)
    memorised = [
        float(m.scores.mean()) for m in measure(model, [p.caption for p in second_world.training_pairs()], ONE)
    ]
    assert own_list.quantile(0.99) < np.median(memorised)
