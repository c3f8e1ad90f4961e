"""Whether ordinary prompts fit the prompts at hand, before a p-value is believed.

Prompts that a model does not understand score higher than those it knows, so that against them no score stands out. Of
prompts that are as ordinary as the nulls a share t at least has a p-value up to t, whatever t, and memorised ones among
them only make it more. Where it is less, the nulls are the stranger ones: a one-sided Smirnov test of two samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.01  # how often prompts that fit are said not to
SLIGHT = 0.15  # a distance between the distributions up to which p-values serve all the same


def stranger_nulls(scores: Sequence[float], nulls: Sequence[float]) -> bool:
    """Whether the nulls score higher than these prompts, beyond chance and by more than matters.

    Of single prompts nothing is known: with 1,000 nulls it takes at least three.

    >>> stranger_nulls([0.1 * n for n in range(20)], [1.0 + 0.1 * n for n in range(99)])
    True
    """
    if not scores or not nulls:
        return False
    distance = smirnov(scores, nulls)
    n, m = len(scores), len(nulls)
    return distance > SLIGHT and math.exp(-2 * distance**2 * n * m / (n + m)) <= LEVEL


def smirnov(lower: Sequence[float], higher: Sequence[float]) -> float:
    """The largest excess, over all values, of the share of ``lower`` that lies up to there over that of ``higher``.

    >>> smirnov([1, 2], [2, 3])  # half of the first lie up to 1, and none of the second
    0.5
    """
    a, b = np.sort(np.asarray(lower, dtype=float)), np.sort(np.asarray(higher, dtype=float))
    excess = np.arange(1, len(a) + 1) / len(a) - np.searchsorted(b, a, "right") / len(b)
    return max(0.0, float(excess.max()))
