"""Calibrating, auditing, repairing and building reference sets as jobs of the host's, for a page or a client of our routes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...calibration.profile import Profile
from ...core.progress import Stopwatch
from ...core.settings import named, options_of
from ...detectors import scores
from ...report import panel, wording
from ...run.judge import needed_nulls
from . import audit, references, repair
from .calibration import Calibrating, Calibration, networks_of, processing_of, read, watching
from .door import Turn
from .here import Here
from .hosted import Options
from .run import drawn, read_forge

log = logging.getLogger("dejavu")

NOT_KNOWN = "this image's run is not known any more: generate it again"


class Telling:
    """Tells the host's page how far some work is, how fast it goes, and about how long the rest will take."""

    def __init__(self) -> None:
        self._watch = Stopwatch()

    def __call__(self, what: str, done: int, total: int) -> None:
        from modules import shared

        state = shared.state
        state.textinfo = self._watch(what, done, total).sentence
        state.job_count, state.job_no, state.sampling_step, state.sampling_steps = 1, 0, done, total


def read_calibrating(values: Mapping[str, object]) -> Calibrating:
    """From values by their names; what is missing has its default. Raises ValueError naming what is wrong."""
    from modules import sd_samplers, sd_schedulers

    asked = Calibrating(**named(values, options_of(Calibrating), "calibrating"))
    for name, known in (("sampler_name", sd_samplers.all_samplers_map), ("scheduler", sd_schedulers.schedulers_map)):
        if getattr(asked, name) not in known:
            raise ValueError(f"this host has no {name.replace('_', ' ')} {getattr(asked, name)!r}")
    return asked


def calibrate(here: Here, asked: Calibrating, turn: Turn, overrides: Options | None = None) -> tuple[Profile, Path]:
    """Measure ordinary prompts for the loaded checkpoint; (profile, where it is kept). Raises ValueError.

    ``overrides`` are settings of the host's that hold meanwhile.
    """
    from modules import shared

    tell = Telling()
    measuring = Calibration(
        here.host, asked, here.calibrations, lambda done: tell("ordinary prompts", done, asked.count)
    )
    p = processing_of(asked, [""], overrides)
    with turn.job("dejavu-calibrate"):
        tell("ordinary prompts", 0, asked.count)
        with here.session.own(p, measuring):
            drawn(p)
        measuring.made()
        if asked.whole_runs:
            if turn.left:
                raise ValueError("the client hung up, so no whole runs were sampled and nothing is kept")
            shared.state.interrupted = False  # by which the first steps ended their run
            _add_whole_runs(here, measuring, tell, overrides)
    return measuring.kept()


def _add_whole_runs(here: Here, measuring: Calibration, tell: Telling, overrides: Options | None) -> None:
    from modules import shared

    asked, state = measuring.asked, shared.state
    prompts = measuring.prompts()[0][: asked.whole_runs]
    p, run = processing_of(asked, prompts, overrides), watching(here.host, asked, here.calibrations)

    def begun() -> None:
        if here.host.name == "Forge":
            read_forge(p, here.session.after_forge)

    def over(done: int) -> None:
        tell("whole runs of ordinary prompts", done, asked.whole_runs)

    over(0)
    traces = read(p, run, begun, over)
    with here.session.own(p, run):
        drawn(p)
    if state.interrupted or state.skipped or state.stopping_generation or len(traces) < asked.whole_runs:
        raise ValueError("it was stopped before all whole runs were sampled, so nothing is kept")
    measuring.add_whole_runs(traces)


def calibrated(profile: Profile, asked: Calibrating, alpha: float) -> tuple[str, str]:
    """What is told of a calibration: (whether runs get a verdict from now on, the figures)."""
    needed = needed_nulls(alpha)
    if len(profile.nulls) < needed:
        opening = f"No verdict yet: at alpha = {alpha:g} that takes at least {needed:,} ordinary prompts."
    else:
        opening = f"Ready: from now on images of this checkpoint at {asked.size} get a verdict."
    return opening, wording.calibrated(profile, alpha=alpha)


def run_audit(here: Here, asked: audit.Asked, turn: Turn) -> audit.Finding:
    """Audit a training set. Raises ValueError."""
    with turn.job("dejavu-audit"):
        return audit.run_audit(here.host, asked, here.references, here.audits, here.session.own, Telling())


def run_repair(here: Here, asked: repair.Asked, turn: Turn) -> repair.Finding:
    """Repair a LoRA. Raises ValueError."""
    with turn.job("dejavu-repair"):
        return repair.run_repair(here.host, asked, here.references, here.repairs, here.session.own, Telling())


def build(here: Here, asked: references.Building, turn: Turn) -> str:
    """Build a reference set; what is told of it. Raises ValueError where there is nothing to build, or it is stopped."""
    from modules import shared

    telling = Telling()

    def tell(stage: str, done: int, total: int) -> None:
        if shared.state.interrupted:
            raise ValueError("it was stopped; started again, it goes on where it stood")
        telling(stage, done, total)

    with turn.job("dejavu-build"):
        return references.build_set(asked, here.references, tell)


# --------------------------------------------------------------------------------------- the page


def calibrate_from_page(here: Here, task: str, values: Mapping[str, Any]) -> str:
    """The accordion's answer, as HTML. ``values`` are by the names of calibrating, and alpha and score of the monitor;
    ``networks`` is the whole prompt."""
    from modules import shared

    try:
        wanted = dict(values)
        alpha, score = float(wanted.pop("alpha")), str(wanted.pop("score"))
        asked = read_calibrating({**wanted, "networks": networks_of(str(wanted["networks"]))})
        if not scores()[score].of_first_step:
            asked = replace(asked, whole_runs=asked.count)
        profile, _ = here.in_turn(lambda: calibrate(here, asked, Turn(shared.state)), task)
        text, figures = calibrated(profile, asked, alpha)
    except Exception as error:
        text, figures = _failed(here, "No calibration", error), ""
    return str(panel.paragraph(text, figures))


def calibrate_for_run(here: Here, task: str, count: int, info: str) -> str:
    """For the run that the host's own account of it is about: its panel, judged again, below what is told; as HTML."""
    from modules import shared

    shown = here.session.shown_of(info)
    try:
        if shown is None or shown.made is None:
            raise ValueError(NOT_KNOWN)
        made, asked = shown.made, shown.asked(count)
        if asked is None:
            raise ValueError("these images have their verdicts already, or begin with an image")
        profile, _ = here.in_turn(lambda: calibrate(here, asked, Turn(shared.state), made.overrides), task)
        alpha = shown.entries[0].report.verdicts[0].alpha
        shown.judged_again(here.calibrations)
        text, figures = calibrated(profile, asked, alpha)
        if shown.asked(count) is not None and not asked.whole_runs:
            text += (
                " But not this one, which was made with more than the calibration was: set 'Calibrate first' to "
                f"{asked.count} and generate it again."
            )
    except Exception as error:
        text, figures = _failed(here, "No calibration", error), ""
    return str(panel.paragraph(text, figures)) + ("" if shown is None else shown.panel)


def judge_again(here: Here, info: str) -> str:
    """The panel of that run by the calibrations that are kept now, as HTML."""
    shown = here.session.shown_of(info)
    if shown is None:
        return ""
    shown.judged_again(here.calibrations)
    return shown.panel


def audit_from_page(here: Here, task: str, values: Mapping[str, object]) -> str:
    """The page's answer, as HTML; of a list nothing is chosen where a value is None."""
    from modules import shared

    try:
        asked = audit.read({name: value for name, value in values.items() if value is not None})
        found = here.in_turn(lambda: run_audit(here, asked, Turn(shared.state)), task)
        return str(panel.framed(found.page(), "What the audit found"))
    except Exception as error:
        return str(panel.paragraph(_failed(here, "No audit", error)))


def repair_from_page(here: Here, task: str, values: Mapping[str, object]) -> str:
    """The page's answer, as HTML; of a list nothing is chosen where a value is None."""
    from modules import shared

    try:
        asked = repair.read({name: value for name, value in values.items() if value is not None})
        found = here.in_turn(lambda: run_repair(here, asked, Turn(shared.state)), task)
        return str(panel.course(found.repaired, f"{found.out.parent.name}/{found.out.name}"))
    except Exception as error:
        return str(panel.paragraph(_failed(here, "No repair", error)))


def build_from_page(here: Here, task: str, values: Mapping[str, object]) -> tuple[str, str | None]:
    """(the page's answer, as HTML, the set that was built)."""
    from modules import shared

    try:
        asked = references.Building(**named(values, options_of(references.Building), "building"))
        text = here.in_turn(lambda: build(here, asked, Turn(shared.state)), task)
        return str(panel.paragraph(text)), asked.name
    except Exception as error:
        said = _failed(here, "No reference set", error).replace("give --restart", "tick 'Begin anew'")
        return str(panel.paragraph(said)), None


def _failed(here: Here, opening: str, error: Exception) -> str:
    """What the page says of it: ours in their own words, and where the host's log has more."""
    if isinstance(error, ValueError):
        return f"{opening}: {here.sentence(error)}"
    log.exception("[Déjà Vu] what a page asked for failed")
    return f"{opening}: this failed ({type(error).__name__}); the host's log says why"
