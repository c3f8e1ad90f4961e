"""How far long work is, how fast it goes and how long it takes still: worked out once, for every front end to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from time import monotonic


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` pieces of a stage; ``rate`` is pieces a second, None while nothing is known of it.

    >>> Progress("measuring", 50, 1000, 0.5).sentence
    'measuring: 50 of 1,000, 0.5 a second, about 32 min left'
    >>> Progress("measuring", 0, 1000).sentence, Progress("measuring", 1000, 1000, 12.3).sentence
    ('measuring: 0 of 1,000', 'measuring: 1,000 of 1,000, 12 a second')
    """

    stage: str
    done: float
    total: float
    rate: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Of this stage, if the rest goes as fast; None where that is not known, or nothing is left."""
        return (self.total - self.done) / self.rate if self.rate and self.done < self.total else None

    @property
    def pace(self) -> str:
        """The rate and the time left, as text; empty while nothing is known of them."""
        rate = f"{_figures(self.rate)} a second" if self.rate else ""
        left = "" if self.seconds_left is None else f"{duration(self.seconds_left)} left"
        return ", ".join(filter(None, (rate, left)))

    @property
    def sentence(self) -> str:
        return ", ".join(filter(None, (f"{self.stage}: {self.done:,.0f} of {self.total:,.0f}", self.pace)))


class Stopwatch:
    """Works out the :class:`Progress` of one stage after the other.

    What was done before a stage was first seen, by a run that was stopped, is not counted as fast work.
    """

    def __init__(self, now: Callable[[], float] = monotonic) -> None:
        self._now, self._stage, self._began, self._first = now, "", 0.0, 0.0

    def __call__(self, stage: str, done: float, total: float) -> Progress:
        now = self._now()
        if stage != self._stage or done < self._first:
            self._stage, self._began, self._first = stage, now, done
        fresh, seconds = done - self._first, now - self._began
        return Progress(stage, done, total, fresh / seconds if fresh > 0 and seconds > 0 else None)


def duration(seconds: float) -> str:
    """About how long something takes.

    >>> duration(18.2), duration(130), duration(7200)
    ('about 20 s', 'about 3 min', 'about 2 h')
    """
    if seconds > 90 * 60:
        return f"about {ceil(seconds / 3600 - 0.25):,} h"
    return f"about {ceil(seconds / 60)} min" if seconds > 90 else f"about {max(5, 5 * ceil(seconds / 5))} s"


def _figures(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
