"""Which words bring the magnitude about: one view a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.conditioning import Word
from ..core.verdict import Explanation, View, WordSignificance


def explanation(
    view: View, words: Sequence[Word], raw: Tensor, raw_unit: str, scores_without: Tensor | None = None
) -> Explanation:
    """Raw values [number of words] with their significance: the share of the largest one, 0 for negative values.

    Raises ValueError when there is no word to explain or a value is not finite.

    >>> found = explanation("leave one out", [Word("red", 0, 3), Word("boat", 4, 8)], Tensor([2.0, 0.5]), "L2")
    >>> [word.significance for word in found.words]
    [1.0, 0.25]
    """
    if not words:
        raise ValueError("the prompt has no words, so there is nothing to explain")
    if not raw.isfinite().all():
        raise ValueError(
            "the significance of a word is not finite (NaN or infinity): the model's weights may be broken"
        )
    largest = max(float(raw.max()), 0.0)
    without = [None] * len(words) if scores_without is None else scores_without.tolist()
    shown = [
        WordSignificance(w.text, w.start, w.end, float(v), max(float(v), 0.0) / largest if largest else 0.0, score)
        for w, v, score in zip(words, raw, without, strict=True)
    ]
    return Explanation(view, tuple(shown), raw_unit)
