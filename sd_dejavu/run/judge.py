"""From a score to a verdict: its p-value among ordinary prompts, and whether that is a flag.

Every front end judges here. At alpha one ordinary prompt in 1 / alpha is flagged, however many images are sampled
(see :mod:`sd_dejavu.calibration.profile`), and the p-value does not depend on alpha.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..calibration.ordinary_prompts import style_of
from ..calibration.profile import Profile, Setting
from ..core.verdict import Verdict
from ..detectors import scores

NOTHING_TO_COMPARE = "there is nothing to compare it with yet"  # of a score without a calibration


def judge(verdict: Verdict, setting: Setting, profile: Profile) -> Verdict:
    """A verdict that has a score, with its p-value.

    It has none, and says why, where the profile is for another setting; and it is no flag either way where the profile
    has too few ordinary prompts to flag anything at this alpha.
    """
    if verdict.score is None:
        return verdict
    if _levels_differ(verdict, profile):
        why = "the calibration was sampled at other noise levels, with another scheduler: calibrate for these settings"
        return replace(verdict, why=why)
    style = style_of(verdict.prompt) if verdict.prompt else None
    try:
        found = profile.p_value(verdict.score, setting, verdict.score_kind, verdict.images, style, verdict.batch)
    except ValueError as error:
        return replace(verdict, why=str(error))
    verdict = replace(verdict, p_value=found.p, nulls=found.nulls, null_style=found.style, null_images=found.at_once)
    needed = needed_nulls(verdict.alpha, found.times)
    if found.nulls >= needed:
        return replace(verdict, flagged=found.p <= verdict.alpha)
    images = max(verdict.images, verdict.batch)
    fewer = "" if images == 1 else ", or sample fewer images at once"
    return replace(
        verdict,
        why=f"the calibration has {found.nulls:,} ordinary prompts for this, and to flag "
        f"{'an image' if images == 1 else f'{images} images'} at alpha = {verdict.alpha:g} it needs at least "
        f"{needed:,}: raise alpha, or calibrate with more prompts or images{fewer}",
    )


def _levels_differ(verdict: Verdict, profile: Profile) -> bool:
    """Whether the evaluations that the score averages, as far as there are any yet, were made at other noise levels."""
    known = scores().get(verdict.score_kind)
    if known is None or known.of_first_step:
        return False
    levels = [sigma for sigma, _ in verdict.score_per_step][: known.evaluations]
    pairs = zip(levels, (step.sigma for step in profile.band), strict=False)
    return not all(math.isclose(mine, theirs, rel_tol=1e-3, abs_tol=1e-6) for mine, theirs in pairs)


def needed_nulls(alpha: float, times: int = 1) -> int:
    """The least number of ordinary prompts with which a p-value that counts ``times`` can reach alpha.

    >>> needed_nulls(0.01), needed_nulls(0.01, times=2)
    (99, 199)
    """
    return math.ceil(times / alpha - 1e-9) - 1
