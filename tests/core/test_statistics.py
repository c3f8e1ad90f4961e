"""Figures of merit against slow second implementations and known formulas."""

from __future__ import annotations

import math
import random

import pytest

from sd_dejavu.core.statistics import (
    Z95,
    auc,
    auc_interval,
    kolmogorov_two_samples,
    kolmogorov_uniform,
    tpr_at_fpr,
    wilson,
)


def tied_scores(seed: int, count: int, shift: float) -> list[float]:
    rng = random.Random(seed)
    return [round(rng.gauss(shift, 1), 1) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_auc_counts_every_pair_with_ties_as_half(seed: int) -> None:
    positives, negatives = tied_scores(seed, 23, 0.8), tied_scores(seed + 100, 31, 0.0)
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    assert any(v == 0.5 for v in pairs)
    assert auc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_tpr_is_the_best_of_all_thresholds_that_keep_the_fpr(seed: int, fpr: float) -> None:
    positives, negatives = tied_scores(seed, 40, 1.0), tied_scores(seed + 100, 100, 0.0)
    thresholds = [*positives, *negatives, math.inf]
    kept = [t for t in thresholds if sum(n >= t for n in negatives) <= fpr * len(negatives)]
    best = max(sum(p >= t for p in positives) / len(positives) for t in kept)
    assert tpr_at_fpr(positives, negatives, fpr) == pytest.approx(best)


def test_the_bootstrap_interval_agrees_with_hanley_and_mcneil() -> None:
    positives, negatives = tied_scores(0, 120, 1.2), tied_scores(1, 150, 0.0)
    a, m, n = auc(positives, negatives), 120, 150
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)  # Hanley & McNeil, Radiology 1982
    error = math.sqrt((a * (1 - a) + (m - 1) * (q1 - a**2) + (n - 1) * (q2 - a**2)) / (m * n))
    low, high = auc_interval(positives, negatives)
    assert low < a < high
    assert high - low == pytest.approx(2 * Z95 * error, rel=0.2)
    assert (low, high) == auc_interval(positives, negatives)  # seeded
    assert auc_interval([2.0, 3.0], [0.0, 1.0]) == (1, 1)


@pytest.mark.parametrize(("share", "count"), [(0.936, 500), (0.5, 7), (0.02, 50)])
def test_wilsons_bounds_solve_the_score_equation(share: float, count: int) -> None:
    for bound in wilson(share, count):  # (share - p)^2 = z^2 p (1 - p) / n
        assert (share - bound) ** 2 == pytest.approx(Z95**2 * bound * (1 - bound) / count)


def test_wilson_at_the_ends_and_at_a_published_value() -> None:
    assert wilson(0, 10) == pytest.approx((0, Z95**2 / (10 + Z95**2)), abs=1e-12)
    assert wilson(1, 10) == pytest.approx((10 / (10 + Z95**2), 1), abs=1e-12)
    assert wilson(0.936, 500) == pytest.approx((0.911, 0.954), abs=1e-3)


def test_z95_is_the_975_quantile_of_the_normal_law() -> None:
    assert 0.5 * (1 + math.erf(Z95 / 2**0.5)) == pytest.approx(0.975, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_kolmogorovs_distance_is_the_largest_gap_of_the_step_function(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.randint(0, 20) / 20 for _ in range(30)]  # with ties, as conformal p-values have
    at_or_below = [abs(sum(v <= x for v in values) / 30 - x) for x in values]
    just_below = [abs(sum(v < x for v in values) / 30 - x) for x in values]
    assert kolmogorov_uniform(values)[0] == pytest.approx(max(at_or_below + just_below))


@pytest.mark.parametrize("squeeze", [0.0, 0.05, 0.1, 0.2])
def test_kolmogorovs_p_value_agrees_with_the_theta_series(squeeze: float) -> None:
    values = [squeeze + (1 - squeeze) * (i + 0.5) / 80 for i in range(80)]
    distance, p = kolmogorov_uniform(values)
    t = (80**0.5 + 0.12 + 0.11 / 80**0.5) * distance  # Stephens, 1970
    # The same law by Jacobi's other series: P(K <= t) = sqrt(2 pi) / t * sum exp(-(2k - 1)^2 pi^2 / (8 t^2)).
    below = math.sqrt(2 * math.pi) / t * sum(math.exp(-(((2 * k - 1) * math.pi / t) ** 2) / 8) for k in range(1, 200))
    assert p == pytest.approx(1 - below, abs=1e-9)


def test_perfectly_even_p_values_are_never_called_uneven() -> None:
    count = 20_000  # t is so small here that the alternating series does not converge
    assert kolmogorov_uniform([(i + 0.5) / count for i in range(count)])[1] == 1.0


def test_the_distance_of_two_samples_by_counting() -> None:
    rng = random.Random(2)
    first, second = ([round(rng.gauss(m, 1), 1) for _ in range(n)] for m, n in ((0, 150), (0.2, 400)))  # with ties
    gaps = [abs(sum(v <= x for v in first) / 150 - sum(v <= x for v in second) / 400) for x in (*first, *second)]
    distance, p = kolmogorov_two_samples(first, second)
    assert distance == pytest.approx(max(gaps))
    # Against a sample without an end it is the test of one sample: the same distance has the same p-value there.
    even = [(i + 0.5) / 100_000 for i in range(100_000)]
    values = [0.1 + 0.9 * (i + 0.5) / 80 for i in range(80)]
    assert kolmogorov_two_samples(values, even)[0] == pytest.approx(kolmogorov_uniform(values)[0], abs=1e-4)
    assert kolmogorov_two_samples(values, even)[1] == pytest.approx(kolmogorov_uniform(values)[1], abs=1e-2)
    assert 0 < p < 1
