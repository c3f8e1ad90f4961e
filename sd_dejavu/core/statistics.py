"""Figures of merit of a detector, with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")
Z95 = 1.959963984540054
_RESAMPLES = 2000


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann-Whitney).

    >>> auc([3, 2], [1, 2])  # of four pairs three are won, and one is a tie
    0.875
    """
    p, n = np.asarray(positives, dtype=float), np.sort(np.asarray(negatives, dtype=float))
    below = np.searchsorted(n, p, "left")
    ties = np.searchsorted(n, p, "right") - below
    return float((below + ties / 2).mean() / len(n))


def auc_interval(positives: Sequence[float], negatives: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over prompts, each class resampled by itself. (1, 1) when nothing overlaps."""
    rng = np.random.default_rng(seed)
    p, n = np.asarray(positives, dtype=float), np.asarray(negatives, dtype=float)
    values = [auc(rng.choice(p, len(p)).tolist(), rng.choice(n, len(n)).tolist()) for _ in range(_RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap (Efron & Tibshirani, 1993) of a mean over units that are independent of each other.

    >>> mean_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    found = np.asarray(values, dtype=float)
    means = np.random.default_rng(seed).choice(found, (_RESAMPLES, len(found))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def tpr_at_fpr(positives: Sequence[float], negatives: Sequence[float], fpr: float = 0.01) -> float:
    """Share of positives at or above the lowest threshold that at most ``fpr`` of the negatives reach.

    >>> tpr_at_fpr([5, 3, 1, 0], [4, 2, 1, 0], fpr=0.25)  # one of the negatives may pass, the 4: so all above 2 do
    0.5
    """
    p, n = np.asarray(positives, dtype=float), np.sort(np.asarray(negatives, dtype=float))[::-1]
    allowed = int(fpr * len(n) + 1e-9)
    # Strictly above the first negative that may not pass.
    return float((p > n[allowed]).mean()) if allowed < len(n) else 1.0


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share observed over ``count`` trials.

    >>> [round(end, 2) for end in wilson(0.5, 4)]
    [0.15, 0.85]
    """
    z2 = Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * ((share * (1 - share) + z2 / (4 * count)) / count) ** 0.5 / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """q-values: the smallest false discovery rate at which each test would be among the discoveries.

    Benjamini & Hochberg, J. R. Stat. Soc. B 57 (1995): with p sorted, q_(i) = min over j >= i of p_(j) n / j. Holds for
    conformal p-values that share their nulls (Bates, Candes, Lei, Romano, Sesia, Ann. Statist. 51, 2023, theorem 2).

    >>> benjamini_hochberg([0.01, 0.04, 0.03])  # 0.03 * 3 / 2 is more than the 0.04 of the next one
    [0.03, 0.04, 0.04]
    """
    p = np.asarray(p_values, dtype=float)
    if not len(p):
        return []
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return [float(value) for value in q]


def kolmogorov_uniform(p_values: Sequence[float]) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of p-values from the uniform law, and its p-value (asymptotic series).

    >>> distance, p = kolmogorov_uniform([0.25, 0.5])  # all lie up to 0.5, where half should
    >>> distance
    0.5
    """
    x: NDArray[np.float64] = np.sort(np.asarray(p_values, dtype=float))
    count = len(x)
    steps = np.arange(1, count + 1) / count
    distance = float(max((steps - x).max(), (x - steps + 1 / count).max()))
    return distance, _kolmogorov_tail(distance, count)


def kolmogorov_two_samples(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of two samples, and its p-value (asymptotic series).

    For p-values whose nulls are a sample themselves: the scores against the nulls.
    """
    a, b = np.sort(np.asarray(first, dtype=float)), np.sort(np.asarray(second, dtype=float))
    both = np.concatenate([a, b])
    gaps = np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)
    distance = float(np.abs(gaps).max())
    return distance, _kolmogorov_tail(distance, len(a) * len(b) / (len(a) + len(b)))


def _kolmogorov_tail(distance: float, count: float) -> float:
    t = (count**0.5 + 0.12 + 0.11 / count**0.5) * distance
    if t < 0.2:  # the tail is 1 to 12 digits there, and the alternating series no longer converges
        return 1.0
    terms = np.arange(1, 101)
    tail = 2 * float(((-1.0) ** (terms - 1) * np.exp(-2 * terms**2 * t**2)).sum())
    return min(1.0, max(0.0, tail))


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """``count`` of the items at even distances, or all of them.

    >>> spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    if count is None or count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]
