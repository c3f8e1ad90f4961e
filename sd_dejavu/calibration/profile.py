"""Calibration profiles: the scores of ordinary prompts for one setting, and p-values from them.

Split-conformal p-value (Vovk et al., 2005): p = (1 + #{null >= s}) / (n + 1). If the prompt at hand is
exchangeable with the nulls, P(p <= alpha) <= alpha at any n. The smallest possible p is 1 / (n + 1),
so a flag at alpha needs n >= 1 / alpha - 1 nulls.

A batch of B images of one prompt is flagged where any image is, so each of its images is compared with the highest of
g <= B images of each null (g: as many as they have), and p counts B / g times, rounded up (Bonferroni): at alpha one
ordinary prompt in 1 / alpha is flagged, whatever the number of images.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..core.conditioning import Unconditional
from ..core.denoiser import PredictionType
from ..core.verdict import BandStep
from ..detectors import scores
from ..kept import write_text
from ..kept.foreign import Unreadable, json_of
from ..weights import Identity

SCHEMA_VERSION = 1
ALPHA_DEFAULT = 0.01
# Ordinary prompts of one style: they alone are compared with where there are as many. The share that a calibration of n
# flags at alpha strays from alpha by sqrt(alpha / n): at 0.01 by a third with 999, by all of it with 99.
ENOUGH_OF_STYLE = 999
ORDINARY_QUANTILE = 0.95  # up to here a score is called ordinary when a mitigation asks how far to go

UNKNOWN_ENCODER = "text encoder unknown"
ENCODER_PARTS = ("text encoder", "clip skip")  # how parts of a setting's patches begin that are about the text encoder

Ordinary = Literal["generated", "recombined", "own list"]  # which ordinary prompts a profile was made with


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a score depends on besides the prompt. Two scores compare only when all of this agrees."""

    model: str
    prediction_type: PredictionType
    latent_shape: tuple[int, ...]
    steps: int
    sigma: float
    guidance_scale: float
    baseline: Unconditional
    negative_prompt: str = ""
    begins_with: Literal["noise", "an image"] = "noise"
    sampler: str = ""  # of a host; empty for this package's own DDIM
    patches: str = ""  # what a host adds to the checkpoint (clip skip, control nets, other packs' patches), in words
    text_encoder: str = ""  # digits of its weights; empty where it is not known

    def mismatch(self, other: Setting, kind: str) -> str | None:
        """A sentence naming the first difference that matters for this score, or None.

        ``other`` is that of the run: where its model says what release 0.1 called it, this may have that name.
        """
        first_step = scores()[kind].of_first_step
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "model":
                same = mine in names_of(theirs)
            elif name == "text_encoder":
                same = mine == theirs or not (mine and theirs)
            elif name == "sigma":
                same = math.isclose(mine, theirs, rel_tol=1e-3)
            elif name in ("steps", "guidance_scale", "sampler"):
                # The first step sees neither guidance nor the later noise levels, nor how they are walked through.
                same = first_step or mine == theirs
            elif name == "negative_prompt":
                # Blanks at the ends and in a row are nothing to the tokenizers.
                same = (first_step and self.baseline == "empty prompt") or mine.split() == theirs.split()
            elif name == "patches":
                same = _same_patches(mine, theirs)
            else:
                same = mine == theirs
            if not same:
                verb = "are" if name == "patches" else "is"
                return f"{name.replace('_', ' ')} {verb} {theirs!r} here but was {mine!r} when the profile was made"
        return None


def names_of(model: str) -> tuple[str, ...]:
    """What a model is called in profiles: its digits, and those that release 0.1 gave it, where they are known."""
    former = model.former if isinstance(model, Identity) else ""
    return (model, former) if former else (model,)


def _same_patches(mine: str, theirs: str) -> bool:
    """Where one side does not know its text encoder, what was done to it is left out of account."""
    parts = [set(filter(None, told.split(", "))) for told in (mine, theirs)]
    if any(UNKNOWN_ENCODER in told for told in parts):
        parts = [{part for part in told if not part.startswith(ENCODER_PARTS)} for told in parts]
    return parts[0] == parts[1]


@dataclass(frozen=True)
class Null:
    """One ordinary prompt: its style, and for each score (of any detector) one value an image."""

    style: str
    scores: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class PValue:
    """``p`` from ``nulls`` ordinary prompts; ``style`` is None where all styles were taken together.

    ``at_once`` images of each null were compared with one of the batch, and p was counted ``times`` times for that.
    """

    p: float
    nulls: int
    style: str | None
    at_once: int = 1
    times: int = 1


def conformal_p(score: float, nulls: Sequence[float]) -> float:
    """(1 + #{null >= score}) / (n + 1), from sorted nulls: found by bisection, however many there are.

    >>> conformal_p(3.0, [1.0, 2.0, 3.0, 4.0])  # two nulls are as high: (1 + 2) / (4 + 1)
    0.6
    """
    return (1 + len(nulls) - bisect_left(nulls, score)) / (len(nulls) + 1)


@dataclass(frozen=True)
class Profile:
    """Null scores for one setting, and the null band of each step for charts.

    ``nulls`` are in the order of the prompts; the scores of each kind are sorted once, when they are first asked for.
    ``ordinary`` is None where it is not known which prompts they are, as in profiles of release 0.1.

    >>> run = Setting(model="sd", prediction_type="epsilon", latent_shape=(4, 64, 64), steps=50, sigma=14.6,
    ...               guidance_scale=7.5, baseline="empty prompt")
    >>> profile = Profile(run, tuple(Null("tags", {"first step": (score,)}) for score in (0.0, 1.0, 2.0, 3.0, 4.0)))
    >>> profile.p_value(3.0, run).p, profile.quantile(0.625)
    (0.5, 2.5)
    """

    setting: Setting
    nulls: tuple[Null, ...]
    band: tuple[BandStep, ...] = ()
    ordinary: Ordinary | None = None
    _sorted: dict[tuple[str, int, bool], dict[str | None, tuple[float, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def null_scores(self, kind: str, images: int, style: str | None = None, highest: bool = False) -> tuple[float, ...]:
        """Mean of the first ``images`` values of each null that has as many, or the highest of them; ascending.

        Of the nulls of one style, or of all.
        """
        if (kind, images, highest) not in self._sorted:
            found: dict[str | None, list[float]] = {None: []}
            for null in self.nulls:
                values = null.scores.get(kind, ())[:images]
                if len(values) == images:
                    value = max(values) if highest else sum(values) / images
                    found[None].append(value)
                    found.setdefault(null.style, []).append(value)
            self._sorted[kind, images, highest] = {name: tuple(sorted(values)) for name, values in found.items()}
        return self._sorted[kind, images, highest].get(style, ())

    def p_value(
        self,
        score: float,
        setting: Setting,
        kind: str = "first step",
        images: int = 1,
        style: str | None = None,
        batch: int = 1,
    ) -> PValue:
        """The p-value of one score: of the mean over ``images``, or of one image of a ``batch`` of one prompt.

        Raises ValueError with a sentence when the profile was made for another setting, has no null for this kind and
        number of images, or the score is not finite.
        """
        if not math.isfinite(score):
            # Compared with the nulls a NaN would pass for the highest score of all.
            raise ValueError(f"the score is {score}, so there is no p-value: the model's weights may be broken")
        if why := self.setting.mismatch(setting, kind):
            raise ValueError(f"this calibration profile is for another setting: {why}; calibrate for this setting")
        at_once = min([batch, *(len(values) for null in self.nulls if (values := null.scores.get(kind)))])
        times = math.ceil(batch / at_once)
        if batch > 1:
            images = at_once
        for chosen in (style, None):
            nulls = self.null_scores(kind, images, chosen, batch > 1)
            if chosen is None or len(nulls) >= ENOUGH_OF_STYLE * times:
                break
        if not nulls and kind in scores() and not scores()[kind].of_first_step:
            raise ValueError(
                f"the calibration has no whole runs, which the score '{kind}' needs: calibrate with whole runs"
            )
        if not nulls:
            raise ValueError(f"the profile has no ordinary prompts for the {kind} of {images} images: calibrate for it")
        return PValue(min(1.0, times * conformal_p(score, nulls)), len(nulls), chosen, at_once, times)

    def quantile(self, q: float, kind: str = "first step", images: int = 1) -> float:
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
            **({} if self.ordinary is None else {"ordinary": self.ordinary}),
            "setting": asdict(self.setting),
            "band": [asdict(step) for step in self.band],
            "nulls": [{"style": n.style, "scores": {k: _rounded(v) for k, v in n.scores.items()}} for n in self.nulls],
        }
        # One null a line: readable, and small differences show as small differences.
        rows = ",\n  ".join(json.dumps(row) for row in document.pop("nulls"))
        head = json.dumps(document, indent=1)[:-2]
        write_text(path, f'{head},\n "nulls": [\n  {rows}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises ValueError with a sentence for anything that is not a profile of this version."""
        try:
            document = json_of(path)
        except Unreadable as error:
            verb = "" if str(error).startswith("cannot") else "is "
            raise ValueError(f"the calibration profile {path} {verb}{error}") from error
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
                Null(_of_kind(n["style"], str), {k: _scores(k, v) for k, v in n["scores"].items()})
                for n in _of_kind(document["nulls"], list)
            )
            ordinary = document.get("ordinary")
            if ordinary not in (None, *get_args(Ordinary)):
                raise ValueError(f"{str(ordinary)[:40]!r} are no ordinary prompts")
            band = tuple(
                BandStep(**{name: _number(v) for name, v in step.items()}) for step in _of_kind(document["band"], list)
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"the calibration profile {path} is damaged ({error!r}): calibrate again") from error
        return cls(setting, nulls, band, ordinary)


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


def _scores(kind: str, values: Any) -> tuple[float, ...]:
    """The scores of one null: one image at least, and magnitudes are never negative.

    A score of a detector that is not there is kept as it is.
    """
    numbers = tuple(_number(value) for value in _of_kind(values, list))
    known = scores().get(kind)
    if (
        not numbers
        or math.isinf(sum(numbers))
        or (known is not None and known.detector == "magnitude" and min(numbers) < 0)
    ):
        raise ValueError(f"{str(values)[:40]} are no scores")
    return numbers


def _setting(raw: Any) -> Setting:
    """A setting from JSON: its numbers as floats, its shape and steps as whole numbers, and the rest as text.

    Release 0.1 called the baseline 'without'.
    """
    raw = {"baseline" if name == "without" else name: value for name, value in raw.items()}
    numbers: dict[str, Any] = {name: _number(raw[name]) for name in ("sigma", "guidance_scale")}
    shape = tuple(_of_kind(side, int) for side in _of_kind(raw["latent_shape"], list))
    rest = {
        name: _of_kind(value, int if name == "steps" else str)
        for name, value in raw.items()
        if name not in (*numbers, "latent_shape")
    }
    return Setting(**numbers, **rest, latent_shape=shape)
