"""Second implementations for tests, in plain Python."""

from __future__ import annotations

from math import comb


def binomial_upper(count: int, share: float, nulls: int, confidence: float = 0.999) -> int:
    """Smallest k with P(flags <= k) >= confidence, when the true rate of flags is itself Beta distributed.

    With n nulls and a flag at p <= share, the flag rate of fresh prompts is Beta(m, n + 1 - m), m = floor(share (n + 1)).
    """
    m = max(1, int(share * (nulls + 1)))
    a, b = m, nulls + 1 - m
    total = 0.0
    for k in range(count + 1):
        # Beta-binomial probability, with integer parameters: C(k+a-1, k) C(count-k+b-1, count-k) / C(count+a+b-1, count)
        total += comb(k + a - 1, k) * comb(count - k + b - 1, count - k) / comb(count + a + b - 1, count)
        if total >= confidence:
            return k
    return count
