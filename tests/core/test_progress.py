"""Rate and time left by a clock that is set by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sd_dejavu.cli.common import progress_bar, stages
from sd_dejavu.core.progress import Progress, Stopwatch, duration


def test_rate_and_time_left_worked_by_hand() -> None:
    now = iter((0.0, 10.0, 40.0, 100.0))
    watch = Stopwatch(lambda: next(now))
    assert watch("measuring", 200, 1000) == Progress("measuring", 200, 1000)  # of a run that was stopped
    found = watch("measuring", 225, 1000)
    assert found.rate == pytest.approx(25 / 10) and found.seconds_left == pytest.approx(775 / 2.5)
    assert found.sentence == "measuring: 225 of 1,000, 2.5 a second, about 6 min left"
    found = watch("measuring", 600, 1000)
    assert found.rate == pytest.approx(400 / 40) and found.seconds_left == pytest.approx(40)
    assert found.sentence == "measuring: 600 of 1,000, 10 a second, about 40 s left"
    found = watch("measuring", 1000, 1000)
    assert found.seconds_left is None and found.sentence == "measuring: 1,000 of 1,000, 8 a second"


def test_each_stage_is_timed_anew() -> None:
    now = iter((0.0, 1.0, 50.0, 52.0, 60.0, 61.0))
    watch = Stopwatch(lambda: next(now))
    watch("drawing", 0, 10)
    assert watch("drawing", 10, 10).rate == 10
    assert watch("measuring", 0, 4).rate is None
    assert watch("measuring", 1, 4).rate == pytest.approx(0.5)
    assert watch("drawing", 0, 20).rate is None
    assert watch("drawing", 3, 20).rate == 3
    assert watch.__class__(lambda: 5.0)("measuring", 3, 4).pace == ""  # a clock that stands still


@pytest.mark.parametrize(
    ("rate", "told"),
    [(0.0314, "0.031 a second"), (9.94, "9.9 a second"), (57.7, "58 a second"), (1234.5, "1,234 a second")],
)
def test_a_rate_has_two_figures_or_is_whole(rate: float, told: str) -> None:
    assert Progress("a", 4, 4, rate).pace == told


def test_durations_are_rounded_up() -> None:
    assert [duration(s) for s in (1, 88, 91, 5399, 5401, 4.2e6)] == [
        "about 5 s",
        "about 90 s",
        "about 2 min",
        "about 90 min",
        "about 2 h",
        "about 1,167 h",
    ]


def test_the_command_line_shows_stage_count_rate_and_time_left() -> None:
    now, shown = [0.0], io.StringIO()
    with progress_bar(Console(file=shown, force_terminal=True, width=120, color_system=None)) as bar:
        bar.get_time = lambda: now[0]
        show = stages(bar)
        show("measuring", 200, 1000)
        bar.refresh()
        now[0] = 10.0
        show("measuring", 225, 1000)
        bar.refresh()
    assert "225/1000 2.5 a second, about 6 min left" in shown.getvalue()
