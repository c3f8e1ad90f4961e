"""Which run of Automatic1111 or Forge is being watched, and what there is to see of those before."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from .audit import Piece
from .calibration import Calibration
from .controls import Wanted
from .run import Run

RUNS_SHOWN = 32  # of all pages


@dataclass
class Shown:
    """What there is to see of a run: its panel, and the reports as JSON."""

    panel: str = ""
    documents: list[dict[str, Any]] = field(default_factory=list)


class Session:
    """The run that is being sampled, one at a time as the host does it, and what is shown of those before.

    Pages ask for the panel of their own run: they know the host's mark of its job and its first seed.
    """

    def __init__(self, state: Any) -> None:
        """``state`` is the host's, of the job that it is at."""
        self.watching: Run | Calibration | Piece | None = None
        self.wanted: Wanted | None = None
        self._state = state
        self.shown = Shown()
        self._runs: OrderedDict[tuple[str, str], Shown] = OrderedDict()
        self._p: Any = None  # the host's processing object of that run
        self._job: float | None = None  # when the host's job began that the run is part of

    def begin(self, p: Any) -> None:
        """A run of its own begins; what was known of the last one goes."""
        if isinstance(self.watching, Run):
            self.watching.end()  # a fault of the host's has cut it short
        self.watching = self.wanted = None
        self.shown = Shown()
        self._p, self._job = p, self._began()
        self._runs[str(self._state.job_timestamp), str(p.all_seeds[0])] = self.shown
        while len(self._runs) > RUNS_SHOWN:
            self._runs.popitem(last=False)

    def panel_of(self, info: str) -> str:
        """The panel of the run that the host's own account of it, as JSON, is about; empty where none is known.

        Where no run of its job has that first seed, as that of a plot need not, the last one of the job counts.
        """
        try:
            account = json.loads(info)
            job, seed = str(account["job_timestamp"]), str(account["all_seeds"][0])
        except (ValueError, TypeError, LookupError):
            return ""
        of_job = [shown for (known, _), shown in self._runs.items() if known == job]
        found = self._runs.get((job, seed)) or (of_job[-1] if of_job else Shown())
        return found.panel

    def is_within(self, p: Any) -> bool:
        """Whether ``p`` is drawn in the midst of the run that is watched: another extension repaints a face, say."""
        is_same_job = self._job is not None and self._job == self._began()
        return isinstance(self.watching, Run) and p is not self._p and is_same_job

    def run_of(self, p: Any) -> Run | None:
        """The watched run, where ``p`` is what it draws."""
        return self.watching if isinstance(self.watching, Run) and p is self._p else None

    def _began(self) -> float | None:
        """When the host's job began; a fault ends all of a job."""
        began: float | None = getattr(self._state, "time_start", None)
        return began
