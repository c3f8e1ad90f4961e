"""Which runs of Automatic1111 or Forge are being watched, and what there is to see of those before."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

from torch import Tensor

from ...calibration import store
from ...report import panel
from ...report.panel import Offer
from ...run.report import Report
from .calibration import QUICK, THOROUGH, Calibrating, Calibration, networks_of
from .controls import TITLE, Wanted, infotexts
from .hosted import After, Before, Guided, Options, Processing, State
from .pieces import Piece
from .run import Run

RUNS_SHOWN = 32  # of all pages


@dataclass(frozen=True)
class Made:
    """How a run was made: what to calibrate for so that its images get a verdict."""

    asked: Calibrating
    overrides: Options  # of the host's settings
    seconds: float  # that one of its images took

    @classmethod
    def of(cls, p: Processing, checkpoint: str, networks: str, seconds: float) -> Made | None:
        """Of a run that began with this checkpoint: at its end the host may have loaded its refiner.

        None where nothing can be calibrated for: a size or a number of steps out of range.
        """
        try:
            asked = Calibrating(
                count=QUICK,
                width=p.width,
                height=p.height,
                steps=p.steps,
                sampler_name=p.sampler_name,
                scheduler=getattr(p, "scheduler", None) or "Automatic",
                negative_prompt=p.negative_prompts[0],
                guidance_scale=p.cfg_scale,
                networks=networks,
            )
        except ValueError:
            return None
        return cls(asked, {**p.override_settings, "sd_model_checkpoint": checkpoint}, seconds)


@dataclass(frozen=True)
class Entry:
    """The report on one image of a run, of one of its passes."""

    title: str
    run_pass: str
    image: int
    report: Report

    @property
    def document(self) -> Options:
        return {"image": self.image, "pass": self.run_pass, **self.report.as_json()}

    def judged_again(self, folder: Path) -> Entry:
        """By the calibrations that are kept now."""
        state = self.report.state
        if state.setting is not None:
            own = state.profile
            state.profile = store.find_for_monitor(state.setting, state.monitoring.score, (), folder) or own
            if own is not None and any(verdict.lacks_calibration for verdict in state.verdicts()):
                state.profile = own  # a verdict that is there is not taken away
        places = self.report.images
        report = Report.of(state)
        return replace(self, report=report if places is None else report.of_images(places))


@dataclass
class Shown:
    """What there is to see of a run: the reports on its images, as a panel and as JSON, and what went wrong."""

    faults: str = ""
    entries: list[Entry] = field(default_factory=list)
    made: Made | None = None

    @property
    def panel(self) -> str:
        told = [(entry.title, entry.report) for entry in self.entries]
        return (str(panel.panel(told, self._offer())) if told else "") + self.faults

    @property
    def documents(self) -> list[Options]:
        return [entry.document for entry in self.entries]

    def judged_again(self, folder: Path) -> None:
        """By the calibrations that are kept now."""
        self.entries = [entry.judged_again(folder) for entry in self.entries]

    def asked(self, count: int) -> Calibrating | None:
        """What to calibrate for, with at least ``count`` ordinary prompts; None where that would help no image."""
        lacking = [entry.report for entry in self.entries if panel.can_be_calibrated(entry.report)]
        if self.made is None or not lacking:
            return None
        asked = replace(self.made.asked, count=count, baseline=lacking[0].state.monitoring.baseline)
        wanted, batch = lacking[0].state.monitoring, max(report.verdicts[0].batch for report in lacking)
        return asked.enough_for(wanted.score, wanted.alpha, batch)

    def _offer(self) -> Offer | None:
        asked, thorough = self.asked(QUICK), self.asked(THOROUGH)
        if asked is None or thorough is None or self.made is None:
            return None
        found = {one.count: one.images * self.made.seconds for one in (asked, thorough)}
        return Offer(tuple(found.items()), asked.whole_runs > 0)


@dataclass
class Watched:
    """A run of the host that is open, by its processing object; ``within`` another, where one draws in its midst."""

    p: Processing
    job: float | None  # when the host's job began that the run is part of
    within: bool
    watching: Run | Calibration | Piece | None = None
    wanted: Wanted | None = None
    shown: Shown = field(default_factory=Shown)
    begun: float = field(default_factory=monotonic)
    checkpoint: str = ""  # its title, with which the run began

    @property
    def run(self) -> Run | None:
        """What watches it, where that is what the user asked for."""
        return self.watching if isinstance(self.watching, Run) else None

    def tell(self, before: int, in_infotext: bool, in_comment: bool) -> None:
        """Shows what was found on the batch that is done, after ``before`` images: in their parameters too, and below
        them, where those are asked for."""
        assert self.run is not None
        p, reports = self.p, self.run.reports()
        passes = {title for title, _, _ in reports}
        found = []
        for title, image, report in reports:
            name = f"Image {before + image + 1}" + (f", {title}" if len(passes) > 1 else "")
            found.append(Entry(name, title, before + image, report))
        self.shown.entries += found
        if self.shown.made is None and found:
            seconds = (monotonic() - self.begun) / len({entry.image for entry in found})
            self.shown.made = Made.of(p, self.checkpoint, networks_of(p.all_prompts[before]), seconds)
        if in_comment:
            for line in panel.plain_text([(entry.title, entry.report) for entry in found]).splitlines():
                p.comment(f"{TITLE}: {line}")
        if in_infotext:
            p.extra_generation_params.update(infotexts([(image, report) for _, image, report in reports]))

    def end(self) -> None:
        if (run := self.run) is not None:
            run.end()


class Session:
    """The runs that are open, each with what watches it, and what is shown of those before.

    The host does one job at a time, but another extension may draw in the midst of a run: to repaint a face, say. Its
    run stands apart, and is told in its own infotext; pages see the panel of the run that it is part of. They ask
    by the host's mark of their job and their first seed.
    """

    def __init__(self, state: State) -> None:
        """``state`` is the host's, of the job that it is at."""
        self.shown = Shown()  # of the last run that was not within another
        self._state = state
        self._open: list[Watched] = []  # the innermost last
        self._runs: OrderedDict[tuple[str, str], Shown] = OrderedDict()

    def begin(self, p: Processing) -> Watched:
        """A run begins, perhaps within those of the same job that are open."""
        watched = self._opened(p)
        checkpoint = getattr(getattr(p, "sd_model", None), "sd_checkpoint_info", None)
        watched.checkpoint = getattr(checkpoint, "title", "")
        if not watched.within:
            self.shown = watched.shown
            self._runs[str(self._state.job_timestamp), str(p.all_seeds[0])] = self.shown
            while len(self._runs) > RUNS_SHOWN:
                self._runs.popitem(last=False)
        return watched

    def of(self, p: object) -> Watched | None:
        """The open run of this processing object."""
        return next((watched for watched in self._open if watched.p is p), None)

    def close(self, p: Processing) -> None:
        """The run is over, and those within it with it."""
        if (watched := self.of(p)) is not None:
            self._close_from(self._open.index(watched))

    @contextmanager
    def own(self, p: Processing, watching: Run | Calibration | Piece) -> Iterator[None]:
        """While open, the evaluations of ``p``, a run that we have made, are for ``watching``."""
        self._opened(p).watching = watching
        try:
            yield
        finally:
            self.close(p)

    def shown_of(self, info: str) -> Shown | None:
        """What there is to see of the run that the host's own account of it, as JSON, is about; None of one unknown.

        Where no run of its job has that first seed, as that of a plot need not, the last one of the job counts.
        """
        try:
            account = json.loads(info)
            job, seed = str(account["job_timestamp"]), str(account["all_seeds"][0])
        except (ValueError, TypeError, LookupError):
            return None
        of_job = [shown for (known, _), shown in self._runs.items() if known == job]
        return self._runs.get((job, seed)) or (of_job[-1] if of_job else None)

    def panel_of(self, info: str) -> str:
        """The panel of that run; empty of one unknown."""
        shown = self.shown_of(info)
        return "" if shown is None else shown.panel

    # ------------------------------------------------------------------------ the host's callbacks

    def before(self, params: Before) -> None:
        """Before an evaluation: to what watches the run that it is of.

        Where the host does not tell whose it is, the innermost run is told, which says that nothing can be measured.
        """
        denoiser = getattr(params, "denoiser", None)
        of_it = [watched for watched in self._open if denoiser is None or watched.p is denoiser.p]
        watched = of_it[-1] if of_it else None
        if watched is not None and watched.watching is not None:
            watched.watching.before(params)

    def after_automatic1111(self, params: After) -> None:
        """After an evaluation of Automatic1111, which tells by its model which one that was."""
        for watched in self._open:
            if (run := watched.run) is not None and run.evaluates(params.inner_model):
                run.after_automatic1111(params)

    def after_forge(self, arguments: Guided) -> Tensor:
        """After Forge's guidance, of the innermost run that waits for it; what the host shall go on with."""
        for watched in reversed(self._open):
            if (run := watched.run) is not None and run.evaluates():
                return run.after_forge(arguments)
        denoised: Tensor = arguments["denoised"]
        return denoised

    def _opened(self, p: Processing) -> Watched:
        """What is still open of another job, or of ``p`` itself, was cut short by a fault of the host's."""
        job: float | None = getattr(self._state, "time_start", None)
        left = (place for place, o in enumerate(self._open) if o.p is p or job is None or o.job != job)
        self._close_from(next(left, len(self._open)))
        self._open.append(Watched(p, job, within=bool(self._open)))
        return self._open[-1]

    def _close_from(self, place: int) -> None:
        closed = self._open[place:]
        del self._open[place:]
        for watched in reversed(closed):
            watched.end()
