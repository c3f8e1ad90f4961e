"""A verdict in words: the same sentence, label and facts wherever it is shown."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal

from ..verdict import Explanation, Verdict, WordSignificance


def label(verdict: Verdict) -> str:
    """'Flagged', 'Not flagged' or 'No verdict', so that no badge speaks by colour alone."""
    return {True: "Flagged", False: "Not flagged", None: "No verdict"}[verdict.flagged]


def sentence(verdict: Verdict) -> str:
    """What was found and how sure that is, without a full stop at the end."""
    if verdict.flagged is None or verdict.p_value is None:
        return f"No verdict: {_reason(verdict)}"
    opening = "Likely memorised" if verdict.flagged else "Nothing unusual"
    if is_smallest_p(verdict):
        return f"{opening}, {p_text(verdict)}: none of {verdict.nulls:,} ordinary prompts scores as high"
    return f"{opening}, {p_text(verdict)}: {_frequency(_shown_p(verdict))} as high"


def beside_label(verdict: Verdict) -> str:
    """The sentence where :func:`label` stands before it: 'No verdict' is not said twice."""
    told = sentence(verdict).removeprefix(f"{label(verdict)}: ")
    return told[:1].upper() + told[1:]


def p_text(verdict: Verdict) -> str:
    """'p = 0.41', or 'p <= 0.001' where no ordinary prompt scored as high; 'p unknown' without one."""
    if verdict.p_value is None:
        return "p unknown"
    return f"p {'<=' if is_smallest_p(verdict) else '='} {_shown_p(verdict):f}"


def is_smallest_p(verdict: Verdict) -> bool:
    """Whether p is 1 / (nulls + 1): the profile cannot give less, so p is only an upper bound."""
    p = verdict.p_value
    return p is not None and verdict.nulls > 0 and math.isclose(p * (verdict.nulls + 1), 1, rel_tol=1e-6)


def number(value: float) -> str:
    """Three significant digits; whole numbers from 100 up."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def facts(verdict: Verdict) -> list[tuple[str, str]]:
    """(name, value) of what stands behind the sentence, for a table or a list."""
    found = []
    if verdict.score is not None:
        images = "1 image" if verdict.images == 1 else f"mean of {verdict.images} images"
        unit = {"l2": "L2", "rms": "RMS"}[verdict.unit]
        found.append(("Score", f"{number(verdict.score)} ({unit}, {verdict.score_kind}, {images})"))
    if verdict.p_value is not None:
        relation, value = p_text(verdict).removeprefix("p ").split()
        found.append(("p", f"{value if relation == '=' else f'<= {value}'} (flagged from {verdict.alpha:g} down)"))
    if verdict.nulls:
        style = f" of style '{verdict.null_style}'" if verdict.null_style else ""
        found.append(("Calibration", f"{verdict.nulls:,} ordinary prompts{style}"))
    found.append(("Measured against", f"the {verdict.without}"))
    return found


def top_words(explanation: Explanation, count: int = 3) -> list[WordSignificance]:
    """The most significant words, highest first."""
    return sorted(explanation.words, key=lambda w: -w.raw)[:count]


def top_words_text(explanation: Explanation, count: int = 3) -> str:
    """'river 1.00, blue 0.40': the top words with their significance (0 to 1)."""
    return ", ".join(f"{w.text.strip(',.;:') or w.text} {w.significance:.2f}" for w in top_words(explanation, count))


def _reason(verdict: Verdict) -> str:
    why = (verdict.why or "").strip().rstrip(".")
    if verdict.score is None:
        return why or "nothing was measured"
    score = number(verdict.score)
    return f"{why}; the score is {score}" if why else f"the score is {score}, with no calibration to compare it with"


def _shown_p(verdict: Verdict) -> Decimal:
    """p to two significant digits, or as many as keep it on its own side of alpha; bounds are rounded up."""
    assert verdict.p_value is not None
    if is_smallest_p(verdict):
        exact, rounding = 1 / Decimal(verdict.nulls + 1), ROUND_CEILING
    else:
        exact, rounding = Decimal(repr(float(verdict.p_value))), ROUND_HALF_EVEN
    alpha = Decimal(repr(float(verdict.alpha)))
    shown = exact
    for digits in range(2, 17):
        shown = Context(prec=digits, rounding=rounding).create_decimal(exact).normalize()
        if (shown <= alpha) == (exact <= alpha):
            break
    return shown


def _frequency(p: Decimal) -> str:
    if p == 1:
        return "practically every ordinary prompt scores"
    exponent = p.as_tuple().exponent
    assert isinstance(exponent, int)
    out_of = max(100, 10**-exponent)
    count = int(p * out_of)
    return f"about {count:,} in {out_of:,} ordinary prompts {'scores' if count == 1 else 'score'}"
