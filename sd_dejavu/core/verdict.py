"""The verdict on one prompt: what was measured, what it means, and which words brought it about."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..detectors import scores
from .conditioning import Unconditional

View = Literal["confirmed gradient", "input gradient", "output gradient", "leave one out"]


@dataclass(frozen=True)
class WordSignificance:
    """One word ``prompt[start:end]``: its raw value, and ``significance`` = the same in 0..1 for display.

    ``score_without`` is the first-step score without this word, where the view has measured it.
    """

    text: str
    start: int
    end: int
    raw: float
    significance: float
    score_without: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Significance of every word, in the order typed. ``view`` says how it was found, ``raw_unit`` what raw is."""

    view: View
    words: tuple[WordSignificance, ...]
    raw_unit: str

    @property
    def top(self) -> WordSignificance:
        return max(self.words, key=lambda w: w.raw)


@dataclass(frozen=True)
class BandStep:
    """What ordinary prompts give at one noise level: quantiles of their magnitude."""

    sigma: float
    q05: float
    q50: float
    q95: float


@dataclass(frozen=True)
class Verdict:
    """``flagged`` is None when there is no verdict; ``why`` then says why in one sentence.

    ``score`` is the mean over ``images``, or that of one image of a ``batch`` of the same prompt; ``p_value`` comes
    from ``nulls`` ordinary prompts, of the style ``null_style`` where the profile held enough of it, with
    ``null_images`` of each compared at once. ``score_per_step`` holds (sigma, mean magnitude or None where not
    measured).
    """

    prompt: str
    score: float | None
    p_value: float | None
    flagged: bool | None
    alpha: float
    score_kind: str = "first step"
    images: int = 1
    baseline: Unconditional = "empty prompt"
    score_per_step: tuple[tuple[float, float | None], ...] = ()
    nulls: int = 0
    null_style: str | None = None
    why: str | None = None
    explanation: Explanation | None = None
    batch: int = 1
    null_images: int = 1

    @property
    def lacks_calibration(self) -> bool:
        """Whether there is a score, and only ordinary prompts of its setting are missing to judge it."""
        return self.flagged is None and self.score is not None and math.isfinite(self.score)

    @property
    def times(self) -> int:
        """How often p was counted, as the images of the batch outnumber those of an ordinary prompt."""
        return -(-self.batch // self.null_images)

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``; ``words`` is flat and empty where nothing was explained."""
        values = asdict(replace(self, score_per_step=()))  # every number of which it would copy on its own
        explanation = values.pop("explanation")
        values["words"] = explanation["words"] if explanation else []
        values["view"] = explanation["view"] if explanation else None
        known = scores().get(self.score_kind)
        values["unit"] = known.unit.lower() if known is not None else ""
        values["raw_unit"] = explanation["raw_unit"] if explanation else None
        values["score_per_step"] = [value for _, value in self.score_per_step]
        values["sigmas"] = [sigma for sigma, _ in self.score_per_step]
        return values
