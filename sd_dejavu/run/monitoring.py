"""What a user asks of a watched run, the same in every host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..calibration.profile import ALPHA_DEFAULT
from ..core.conditioning import Baseline, Conditioning
from ..core.settings import Checked, option
from ..detectors import scores
from ..mitigations import Mitigation, available

WhenFlagged = Literal["report", "stop", "mitigate"]
When = Literal["never", "flagged", "always"]
OPTIMISE = "optimise"  # through the text encoder where it is at hand, else by its output rows
OPTIMISING = ("optimise-tokens", "optimise-conditioning")
METHODS = (
    OPTIMISE,
    *(name for name, known in available().items() if name not in OPTIMISING and not known.needs_references),
)


def method_for(name: str, conditioning: Conditioning) -> Mitigation:
    """The mitigation of this name; for 'optimise' the one that this conditioning allows."""
    if name == OPTIMISE:
        name = OPTIMISING[0] if conditioning.reencoding else OPTIMISING[1]
    return available()[name]


@dataclass(frozen=True)
class Monitoring(Checked):
    """Settings of a monitor, the same in every host."""

    baseline: Baseline = option(
        "empty prompt",
        "what the prompt is measured against: the empty prompt, for which one calibration serves every negative prompt "
        "(one more model evaluation at each measured step, where guidance has another), or the negative prompt",
        choices=get_args(Baseline),
        former="without",
    )
    when_flagged: WhenFlagged = option(
        "report",
        "report: say so; stop: end the run at the first step; mitigate: go on with what the mitigation gives instead",
        choices=get_args(WhenFlagged),
    )
    mitigation: str = option(
        OPTIMISE,
        "how to mitigate: "
        + "; ".join(f"{name}: {available()[OPTIMISING[0] if name == OPTIMISE else name].help}" for name in METHODS),
        choices=METHODS,
        former="remedy",
    )
    explain: When = option("flagged", "when to find out which words bring the score about", choices=get_args(When))
    score: str = option("first step", "which evaluations the score averages", choices=tuple(scores()))
    alpha: float = option(
        ALPHA_DEFAULT, "flag an image when its p-value is at most this", minimum=0, maximum=1, exclusive=True
    )
    calibrate_first: int = option(
        0,
        "ordinary prompts to measure at the first step of a run that has no calibration yet; 100 take about as long as "
        "three images, and 0 measures none",
        minimum=0,
        maximum=100_000,
        later=True,
    )

    @property
    def deciding(self) -> str:
        """The score by which a run is stopped or mitigated, known after its first evaluation."""
        return self.score if scores()[self.score].of_first_step else "first step"

    @property
    def changes_noise(self) -> bool:
        """Whether a flagged run begins again from other noise."""
        known = available().get(self.mitigation)
        return self.when_flagged == "mitigate" and known is not None and known.touches == "noise"
