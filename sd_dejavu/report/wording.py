"""A verdict in words: the same sentence, label and facts wherever it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING

from ..calibration.profile import ALPHA_DEFAULT, Ordinary, Profile
from ..core.verdict import Explanation, Verdict, WordSignificance
from ..detectors import scores
from ..reference.left_out import in_short
from ..run.judge import NOTHING_TO_COMPARE, needed_nulls

if TYPE_CHECKING:
    from ..mitigations import Outcome
    from ..reference.parts import PartMatch

_ORDINARY: dict[Ordinary | None, str] = {
    "recombined": "ordinary prompts, recombined from yours,",
    "own list": "ordinary prompts of your own",
}
UNUSUAL = 0.05  # below this p, no image that is not flagged is called ordinary


def label(verdict: Verdict) -> str:
    """'Flagged', 'Not flagged' or 'No verdict', so that no badge speaks by colour alone."""
    return {True: "Flagged", False: "Not flagged", None: "No verdict"}[verdict.flagged]


def sentence(verdict: Verdict) -> str:
    """What was found and how sure that is, without a full stop at the end.

    >>> sentence(Verdict("a boat", score=9.1, p_value=0.001, flagged=True, alpha=0.01, nulls=999))
    'Likely a replay of training images: none of 999 ordinary prompts scores as high (p ≤ 0.001)'
    """
    if verdict.flagged is None or verdict.p_value is None:
        return f"No verdict: {_reason(verdict)}"
    ordinary = "Nothing unusual" if verdict.p_value >= UNUSUAL else "Unusual, but not enough to flag"
    opening = "Likely a replay of training images" if verdict.flagged else ordinary
    batch = "" if verdict.batch == 1 else f" for {verdict.batch} images"
    return f"{opening}: {_frequency(verdict)} ({p_text(verdict)}{batch})"


def beside_label(verdict: Verdict) -> str:
    """The sentence where :func:`label` stands before it: 'No verdict' is not said twice."""
    told = sentence(verdict).removeprefix(f"{label(verdict)}: ")
    return told[:1].upper() + told[1:]


def place(box: Sequence[float]) -> str:
    """Where in an image a box (left, top, right, bottom), in shares of its sides, lies.

    >>> place((0.25, 0, 0.75, 0.5)), place((0, 0, 1, 1))
    ('25-75% across, 0-50% down', 'the whole')
    """
    if tuple(box) == (0, 0, 1, 1):
        return "the whole"
    left, top, right, bottom = (round(100 * share) for share in box)
    return f"{left}-{right}% across, {top}-{bottom}% down"


def part_text(match: PartMatch) -> str:
    """What part of an image is like what part of its training image, and how much."""
    return (
        f"{place(match.box)} is like {place(match.of_box)} of {match.name}{', mirrored' if match.mirrored else ''} "
        f"(similarity {match.similarity:.2f})"
    )


def part_heading(match: PartMatch) -> str:
    return {True: "A copy of a part", False: "No part is a copy", None: "Parts not judged"}[match.copy]


def part_sentence(match: PartMatch) -> str:
    """Whether a part of an image is a copy, which, and how often that is said by chance."""
    chance = f"; by chance in {match.chance:.1%} of images like the set's own, or more of others" if match.copy else ""
    return f"{part_heading(match)}: {part_text(match)}{chance}"


def p_text(verdict: Verdict) -> str:
    """'p = 0.41', or 'p ≤ 0.001' where no ordinary prompt scored as high; 'p unknown' without one."""
    if verdict.p_value is None:
        return "p unknown"
    return f"p {'≤' if is_smallest_p(verdict) else '='} {_shown_p(verdict):f}"


def is_smallest_p(verdict: Verdict) -> bool:
    """Whether no ordinary prompt scored as high: the profile cannot give less, so p is only an upper bound."""
    return verdict.p_value is not None and verdict.nulls > 0 and _as_high(verdict) == 0


def number(value: float) -> str:
    """Three significant digits; whole numbers from 100 up.

    >>> number(0.01234), number(1234.6)
    ('0.0123', '1,235')
    """
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def facts(verdict: Verdict) -> list[tuple[str, str]]:
    """(name, value) of what stands behind the sentence, for a table or a list."""
    found = []
    if verdict.score is not None:
        images = "1 image" if verdict.images == 1 else f"mean of {verdict.images} images"
        images = images if verdict.batch == 1 else f"1 of {verdict.batch} images"
        known = scores().get(verdict.score_kind)
        unit = f"{known.unit}, " if known is not None and known.unit else ""
        found.append(("Score", f"{number(verdict.score)} ({unit}{verdict.score_kind}, {images})"))
    if verdict.p_value is not None:
        relation, value = p_text(verdict).removeprefix("p ").split()
        found.append(("p", f"{value if relation == '=' else f'≤ {value}'} (flagged if p ≤ {verdict.alpha:g})"))
    if verdict.nulls:
        style = f" of style '{verdict.null_style}'" if verdict.null_style else ""
        images = "" if verdict.null_images == 1 else f", {verdict.null_images} images each"
        found.append(("Calibration", f"{verdict.nulls:,} ordinary prompts{style}{images}"))
    found.append(("Measured against", f"the {verdict.baseline}"))
    return found


def calibrated(profile: Profile, images: int = 1, alpha: float = ALPHA_DEFAULT) -> str:
    """What a calibration found, and what it can flag: told when it is made. ``images`` are those of each prompt."""
    scores = profile.null_scores("first step", images)
    found = (
        f"{len(scores):,} {_ORDINARY.get(profile.ordinary, 'ordinary prompts')} at sigma {profile.setting.sigma:.4g}: median "
        f"{number(profile.quantile(0.5, 'first step', images))}, 99th percentile "
        f"{number(profile.quantile(0.99, 'first step', images))}."
    )
    if len(scores) < needed_nulls(alpha):
        return f"{found} Too few to flag anything at alpha = {alpha:g}: that takes at least {needed_nulls(alpha):,}."
    batch = images * int((len(scores) + 1) * alpha + 1e-9)
    return f"{found} Enough to flag at alpha = {alpha:g} {'one image at a time' if batch == 1 else f'in batches of up to {batch:,}'}."


def misfit(prompts: str = "prompts", advice: str = "calibrate with prompts like yours") -> str:
    """What to say where :func:`sd_dejavu.calibration.misfit.stranger_nulls` finds that the nulls do not fit."""
    return (
        f"The ordinary prompts are stranger to this model than your {prompts}, so p-values are too large and too little is "
        f"flagged: {advice}."
    )


def skipped(images: Sequence[Mapping[str, str]], listed_in: object, most: int = 10) -> list[str]:
    """Lines on images that were left out (name and reason of each); none where all were read."""
    if not images:
        return []
    more = [f"  and {len(images) - most} more, all listed in {listed_in}"] if len(images) > most else []
    return [f"{in_short(images)}:", *(f"  {one['name']}: {one['reason']}" for one in images[:most]), *more]


def changed(outcome: Outcome) -> str:
    """What a mitigation went on with, and the first-step score before and after it."""
    scores = f"first-step score {number(outcome.score_before)} before, {number(outcome.score_after)} after"
    if outcome.x is not None:
        return f"Sampled from other noise{', with guidance from a later step on' if outcome.rule else ''}: {scores}."
    if outcome.rule is not None:
        return f"Sampled under another guidance, which leaves the first step's score at {number(outcome.score_before)}."
    what = "other attention to the prompt's tokens" if outcome.attention is not None else "another conditioning"
    return f"Sampled with {what}: {scores}."


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
    if not verdict.lacks_calibration:
        return why
    return f"the score is {number(verdict.score)}, but {why or NOTHING_TO_COMPARE}"


def _shown_p(verdict: Verdict) -> Decimal:
    """p to two significant digits, or as many as keep it on its own side of alpha; bounds are rounded up."""
    assert verdict.p_value is not None
    if is_smallest_p(verdict):
        exact, rounding = min(Decimal(1), verdict.times / Decimal(verdict.nulls + 1)), ROUND_CEILING
    else:
        exact, rounding = Decimal(repr(float(verdict.p_value))), ROUND_HALF_EVEN
    alpha = Decimal(repr(float(verdict.alpha)))
    shown = exact
    for digits in range(2, 17):
        shown = Context(prec=digits, rounding=rounding).create_decimal(exact).normalize()
        if (shown <= alpha) == (exact <= alpha):
            break
    return shown


def _as_high(verdict: Verdict) -> int | None:
    """How many of the ordinary prompts score as high; None where p is 1, as it is for any number from some on."""
    p = verdict.p_value
    return None if p is None or p >= 1 else round(p / verdict.times * (verdict.nulls + 1)) - 1


def _frequency(verdict: Verdict) -> str:
    """'3 of 1,000 ordinary prompts score as high': the count behind p = (1 + 3) / (1,000 + 1)."""
    count = _as_high(verdict)
    if count is None:
        return "practically every ordinary prompt scores as high"
    once = "" if verdict.null_images == 1 else f" in one of {verdict.null_images} images"
    shown, scores = f"{count:,}" if count else "none", "scores" if count < 2 else "score"
    return f"{shown} of {verdict.nulls:,} ordinary prompts {scores} as high{once}"
