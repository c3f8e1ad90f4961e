"""Calibrating and auditing as a job of the host's, whoever asks for it: a page or a client of our routes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...calibration.profile import Profile
from ...core.settings import named, options_of
from ...report import panel, wording
from . import audit
from .calibration import Calibrating, Calibration
from .controls import TITLE
from .door import Turn
from .here import Here
from .run import drawn


def read_calibrating(values: Mapping[str, object]) -> Calibrating:
    """From values by their names; what is missing has its default. Raises ValueError naming what is wrong."""
    from modules import sd_samplers, sd_schedulers

    asked = Calibrating(**named(values, options_of(Calibrating), "calibrating"))
    for name, known in (("sampler_name", sd_samplers.all_samplers_map), ("scheduler", sd_schedulers.schedulers_map)):
        if getattr(asked, name) not in known:
            raise ValueError(f"this host has no {name.replace('_', ' ')} {getattr(asked, name)!r}")
    return asked


def calibrate(here: Here, asked: Calibrating, turn: Turn) -> tuple[Profile, Path]:
    """Measure ordinary prompts for the loaded checkpoint; (profile, where it is kept). Raises ValueError."""
    from modules import processing, shared

    p = processing.StableDiffusionProcessingTxt2Img(
        prompt="",
        negative_prompt=asked.negative_prompt,
        seed=1,
        steps=asked.steps,
        width=asked.width,
        height=asked.height,
        sampler_name=asked.sampler_name,
        scheduler=asked.scheduler,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    p.sd_model = shared.sd_model

    def tell(done: int) -> None:
        shared.state.textinfo = f"{TITLE}: {done} of {asked.count} ordinary prompts"

    measuring = Calibration(here.host, asked, here.calibrations, tell)
    with turn.job("dejavu-calibrate"), here.session.own(p, measuring):
        drawn(p)
    return measuring.kept()


def calibrated(profile: Profile, path: Path) -> str:
    """What is told of a calibration."""
    return f"{wording.calibrated(profile)} Kept as {path.name}."


def run_audit(here: Here, asked: audit.Asked, turn: Turn) -> audit.Finding:
    """Audit a training set. Raises ValueError."""
    from modules import shared

    def tell(stage: str, done: int, total: int) -> None:
        shared.state.textinfo = f"{TITLE}: {stage}, {done} of {total} prompts"

    with turn.job("dejavu-audit"):
        return audit.run_audit(here.host, asked, here.references, here.audits, here.session.own, tell)


def calibrate_from_page(here: Here, values: Mapping[str, object]) -> str:
    """The page's answer, as HTML."""
    from modules import shared

    try:
        asked = read_calibrating(values)
        text = calibrated(*here.in_turn(lambda: calibrate(here, asked, Turn(shared.state))))
    except ValueError as error:
        text = f"No calibration: {here.sentence(error)}"
    return str(panel.paragraph(text))


def audit_from_page(here: Here, values: Mapping[str, object]) -> str:
    """The page's answer, as HTML; of a list nothing is chosen where a value is None."""
    from modules import shared

    try:
        asked = audit.read({name: value for name, value in values.items() if value is not None})
        found = here.in_turn(lambda: run_audit(here, asked, Turn(shared.state)))
        return str(panel.framed(found.page(), "What the audit found"))
    except ValueError as error:
        return str(panel.paragraph(f"No audit: {here.sentence(error)}"))
