"""Calibration profiles: the scores of ordinary prompts for one setting, and p-values from them.

Split-conformal p-value (Vovk et al., 2005): p = (1 + #{null >= s}) / (n + 1). If the prompt at hand is
exchangeable with the nulls, P(p <= alpha) <= alpha at any n. The smallest possible p is 1 / (n + 1),
so a flag at alpha needs n >= 1 / alpha - 1 nulls.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..conditioning import Unconditional
from ..denoiser import PredictionType
from ..verdict import BandStep

SCHEMA_VERSION = 1
ALPHA_DEFAULT = 0.01
ORDINARY_QUANTILE = 0.95  # up to here a score is called ordinary when a mitigation asks how far to go

ScoreKind = Literal["first step", "first 5 steps", "all steps"]
EVALUATIONS: dict[ScoreKind, int | None] = {"first step": 1, "first 5 steps": 5, "all steps": None}


@dataclass(frozen=True)
class Setting:
    """What a score depends on besides the prompt. Two scores compare only when all of this agrees."""

    model: str
    prediction_type: PredictionType
    latent_shape: tuple[int, ...]
    steps: int
    sigma: float
    guidance_scale: float
    without: Unconditional
    negative_prompt: str = ""
    begins_with: Literal["noise", "a picture"] = "noise"
    sampler: str = ""  # of a host; empty for this package's own DDIM

    def mismatch(self, other: Setting, kind: ScoreKind) -> str | None:
        """A sentence naming the first difference that matters for scores of this kind, or None."""
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "sigma":
                same = math.isclose(mine, theirs, rel_tol=1e-3)
            elif name in ("steps", "guidance_scale", "sampler"):
                # The first step sees neither guidance nor the later noise levels, nor how they are walked through.
                same = kind == "first step" or mine == theirs
            elif name == "negative_prompt":
                same = (kind == "first step" and self.without == "empty prompt") or mine == theirs
            else:
                same = mine == theirs
            if not same:
                return f"{name.replace('_', ' ')} is {theirs!r} here but was {mine!r} when the profile was made"
        return None


@dataclass(frozen=True)
class Null:
    """One ordinary prompt: its style, and for each kind of score one value an image."""

    style: str
    scores: dict[ScoreKind, tuple[float, ...]]


@dataclass(frozen=True)
class PValue:
    """``p`` from ``nulls`` ordinary prompts; ``style`` is None where all styles were taken together."""

    p: float
    nulls: int
    style: str | None


def conformal_p(score: float, nulls: Sequence[float]) -> float:
    """(1 + #{null >= score}) / (n + 1), from sorted nulls: found by bisection, however many there are."""
    return (1 + len(nulls) - bisect_left(nulls, score)) / (len(nulls) + 1)


@dataclass(frozen=True)
class Profile:
    """Null scores (L2) for one setting, and the null band of each step for charts.

    ``nulls`` are in the order of the prompts; the scores of each kind are sorted once, when they are first asked for.
    """

    setting: Setting
    nulls: tuple[Null, ...]
    band: tuple[BandStep, ...] = ()
    _sorted: dict[tuple[ScoreKind, int], dict[str | None, tuple[float, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def null_scores(self, kind: ScoreKind, images: int, style: str | None = None) -> tuple[float, ...]:
        """Mean over the first ``images`` values of each null that has as many, of one style or of all; ascending."""
        if (kind, images) not in self._sorted:
            found: dict[str | None, list[float]] = {None: []}
            for null in self.nulls:
                values = null.scores.get(kind, ())
                if len(values) >= images:
                    mean = sum(values[:images]) / images
                    found[None].append(mean)
                    found.setdefault(null.style, []).append(mean)
            self._sorted[kind, images] = {name: tuple(sorted(means)) for name, means in found.items()}
        return self._sorted[kind, images].get(style, ())

    def p_value(
        self,
        score: float,
        setting: Setting,
        kind: ScoreKind = "first step",
        images: int = 1,
        style: str | None = None,
        alpha: float = ALPHA_DEFAULT,
    ) -> PValue:
        """The p-value of one score, among nulls of the same style if there are enough of them for ``alpha``.

        Raises ValueError with a sentence when the profile was made for another setting, the score is not
        finite, or the profile holds too few nulls for this number of images to ever reach ``alpha``.
        """
        if not math.isfinite(score):
            # Compared with the nulls a NaN would pass for the highest score of all.
            raise ValueError(f"the score is {score}, so there is no p-value: the model's weights may be broken")
        if why := self.setting.mismatch(setting, kind):
            raise ValueError(f"this calibration profile is for another setting: {why}; calibrate for this setting")
        needed = math.ceil(1 / alpha - 1e-9) - 1
        for chosen in (style, None) if style else (None,):
            nulls = self.null_scores(kind, images, chosen)
            if len(nulls) >= needed:
                return PValue(conformal_p(score, nulls), len(nulls), chosen)
        raise ValueError(
            f"the profile has {len(nulls)} ordinary prompts for the {kind} with {images} images, and alpha = {alpha:g} "
            f"needs at least {needed}: raise alpha, or calibrate with more prompts or images"
        )

    def quantile(self, q: float, kind: ScoreKind = "first step", images: int = 1) -> float:
        """The q-quantile (0..1, linear interpolation) of the null scores."""
        nulls = self.null_scores(kind, images)
        if not nulls:
            raise ValueError(f"the profile has no ordinary prompts for the {kind} with {images} images")
        place = q * (len(nulls) - 1)
        low, high = math.floor(place), math.ceil(place)
        return nulls[low] + (nulls[high] - nulls[low]) * (place - low)

    # ------------------------------------------------------------------------------------ file

    def save(self, path: Path) -> None:
        document: dict[str, Any] = {
            "format": "dejavu-calibration",
            "schema_version": SCHEMA_VERSION,
            "setting": asdict(self.setting),
            "band": [asdict(step) for step in self.band],
            "nulls": [{"style": n.style, "scores": {k: _rounded(v) for k, v in n.scores.items()}} for n in self.nulls],
        }
        # One null a line: readable, and small differences show as small differences.
        rows = ",\n  ".join(json.dumps(row) for row in document.pop("nulls"))
        head = json.dumps(document, indent=1)[:-2]
        partial = path.with_name(path.name + ".partial")
        partial.write_text(f'{head},\n "nulls": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises ValueError with a sentence for anything that is not a profile of this version."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"the calibration profile {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the calibration profile {path} is not valid JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != "dejavu-calibration":
            raise ValueError(f"{path} is not a Déjà Vu calibration profile")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"the calibration profile {path} has schema version {version!r}, this program reads {SCHEMA_VERSION}: "
                "calibrate again"
            )
        try:
            setting = _setting(document["setting"])
            nulls = tuple(
                Null(_of_kind(n["style"], str), {k: _scores(v) for k, v in n["scores"].items()})
                for n in _of_kind(document["nulls"], list)
            )
            band = tuple(
                BandStep(**{name: _number(v) for name, v in step.items()}) for step in _of_kind(document["band"], list)
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"the calibration profile {path} is damaged ({error!r}): calibrate again") from error
        unknown = {k for n in nulls for k in n.scores} - set(get_args(ScoreKind))
        if unknown:
            raise ValueError(f"the calibration profile {path} has unknown kinds of score: {', '.join(sorted(unknown))}")
        return cls(setting, nulls, band)


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.9g}") for v in values]


def _of_kind(value: Any, *kinds: type) -> Any:
    """The value, if JSON gave it as one of these; True and False are no numbers."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{str(value)[:40]!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _number(value: Any) -> float:
    number = float(_of_kind(value, int, float))
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _scores(values: Any) -> tuple[float, ...]:
    """The scores of one null: one image at least, and magnitudes are never negative."""
    numbers = tuple(_number(value) for value in _of_kind(values, list))
    if not numbers or min(numbers) < 0:
        raise ValueError(f"{str(values)[:40]} are no scores")
    return numbers


def _setting(raw: Any) -> Setting:
    """A setting from JSON: its numbers as floats, its shape as whole numbers, and the rest as it was written."""
    numbers: dict[str, Any] = {name: _number(raw[name]) for name in ("sigma", "guidance_scale")}
    shape = tuple(_of_kind(side, int) for side in _of_kind(raw["latent_shape"], list))
    rest = {
        name: _of_kind(value, str, int, bool) for name, value in raw.items() if name not in (*numbers, "latent_shape")
    }
    return Setting(**numbers, **rest, latent_shape=shape)
