"""What a front end shows of one run: a verdict for each image, the same after a mitigation, and what stands behind them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.profile import ALPHA_DEFAULT, ORDINARY_QUANTILE
from ..core.trace import NotMeasured
from ..core.verdict import BandStep, Verdict
from ..detectors import scores
from .monitoring import Monitoring
from .state import RunState

MAP_SIDE = 32  # of the where-map in a report


def flagged(verdicts: Sequence[Verdict]) -> bool | None:
    """Whether any image is flagged; None when there is no verdict on any of them."""
    known = [v.flagged for v in verdicts if v.flagged is not None]
    return any(known) if known else None


@dataclass(frozen=True)
class Report:
    """What a front end shows of one run: a verdict for each image, the same after a mitigation, and the rest."""

    state: RunState
    verdicts: tuple[Verdict, ...]
    after: tuple[Verdict, ...] = ()
    images: tuple[int, ...] | None = None  # which of the run these are; None for all of them

    @classmethod
    def of(cls, state: RunState) -> Report:
        return cls(state, tuple(state.verdicts()), tuple(state.verdicts_after()))

    @classmethod
    def missing(cls, why: str) -> Report:
        """No run to speak of."""
        return cls(RunState(Monitoring(), notes=[why]), (Verdict("", None, None, None, ALPHA_DEFAULT, why=why),))

    @property
    def highest(self) -> Verdict:
        """The verdict on the image with the highest score."""
        return max(self.verdicts, key=lambda verdict: verdict.score or 0.0)

    def of_images(self, places: Sequence[int]) -> Report:
        """The same of these images only, in this order; one may come twice. What is told of all stays."""

        def chosen(verdicts: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
            return verdicts if len(verdicts) <= max(places) else tuple(verdicts[place] for place in places)

        return replace(self, verdicts=chosen(self.verdicts), after=chosen(self.after), images=tuple(places))

    def maps(self) -> Tensor:
        """Squared-difference map [images, H, W] of the last evaluation that was measured. Raises NotMeasured."""
        found = self.state.trace.where()
        return found if self.images is None else found[list(self.images)]

    def where(self, height: int, width: int, images: int) -> Tensor:
        """Where in the image the prompt acts, [images, height, width] in 0..1; zeros where it was not measured."""
        try:
            found = self.maps()
        except NotMeasured:
            return torch.zeros(images, height, width)
        highest = found.flatten(1).amax(1).clamp_min(1e-12)[:, None, None]
        scaled = F.interpolate((found / highest)[:, None], size=(height, width), mode="bilinear")[:, 0]
        return scaled[:images] if len(scaled) >= images else torch.zeros(images, height, width)

    def _maps(self) -> list[dict[str, Any] | None]:
        """The where-map of each image in at most 32 x 32 bytes, row by row; None where it was not measured."""
        try:
            height, width = self.state.trace.where().shape[1:]
        except NotMeasured:
            return [None] * len(self.verdicts)
        size = (min(height, MAP_SIDE), min(width, MAP_SIDE))
        bytes_of = (255 * self.where(*size, len(self.verdicts))).round().to(torch.uint8).cpu().numpy()
        return [
            {"width": size[1], "height": size[0], "values": b64encode(values.tobytes()).decode("ascii")}
            for values in bytes_of
        ]

    def ordinary(self) -> tuple[list[BandStep], dict[str, float] | None]:
        """What ordinary prompts give in this setting: the band of each step, and the first-step score."""
        profile, setting = self.state.profile, self.state.setting
        if profile is None or setting is None:
            return [], None
        setting = replace(setting, baseline=self.state.trace.baseline or setting.baseline)
        band = [] if profile.setting.mismatch(setting, "all steps") else list(profile.band)
        if profile.setting.mismatch(setting, "first step") or not profile.null_scores("first step", 1):
            return band, None
        high = profile.quantile(ORDINARY_QUANTILE, "first step", 1)
        return band, {"median": profile.quantile(0.5, "first step", 1), "high": high}

    def _setting(self) -> dict[str, Any] | None:
        setting = self.state.setting
        return None if setting is None else {**asdict(setting), "model": str(setting.model)}

    def as_json(self) -> dict[str, Any]:
        """Plain values: verdicts with their words and maps, what is ordinary, mitigation, setting, notes."""
        from ..report.wording import facts, label, sentence

        def shown(verdict: Verdict) -> dict[str, Any]:
            told = {"label": label(verdict), "sentence": sentence(verdict), "facts": [list(f) for f in facts(verdict)]}
            return {**verdict.as_json(), **told}

        band, ordinary = self.ordinary()

        outcome = self.state.outcome
        mitigation = None
        if outcome is not None:
            mitigation = {
                "score_before": outcome.score_before,
                "score_after": outcome.score_after,
                "prompt": outcome.conditioning.prompt,
                "verdicts": [shown(v) for v in self.after],
                **{k: list(v) if isinstance(v, tuple) else v for k, v in outcome.details.items()},
            }
        return {
            "format": "dejavu-report",
            "schema_version": 1,
            "prompt": self.state.prompt,
            "prompt_node": self.state.prompt_node,
            "flagged": flagged(self.verdicts),
            "verdicts": [{**shown(v), "where": m} for v, m in zip(self.verdicts, self._maps(), strict=True)],
            "band": [asdict(step) for step in band],
            "ordinary": ordinary,
            "mitigation": mitigation,
            "lacks_calibration": any(
                verdict.lacks_calibration and scores()[verdict.score_kind].of_first_step for verdict in self.verdicts
            ),
            "calibrating": None if self.state.calibrating is None else asdict(self.state.calibrating),
            "setting": self._setting(),
            "notes": list(self.state.notes),
        }
