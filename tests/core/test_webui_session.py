"""Which run is watched, and which panel each page sees: no host, its processing objects are made up."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from sd_dejavu.hosts.webui.run import Automatic1111, Run
from sd_dejavu.hosts.webui.session import RUNS_SHOWN, Session
from sd_dejavu.run.monitoring import Monitoring


def info(job: str, *seeds: int) -> str:
    """What the host tells a page of its run."""
    return json.dumps({"job_timestamp": job, "all_seeds": seeds, "prompt": "a red fox"})


@pytest.fixture
def state() -> Any:
    return SimpleNamespace(job_timestamp="20300101000000", time_start=1.0)


@pytest.fixture
def session(state: Any) -> Session:
    return Session(state)


def drawn(session: Session, job: str, panel: str, *seeds: int) -> Any:
    session._state.job_timestamp, session._state.time_start = job, float(job)
    p = SimpleNamespace(all_seeds=list(seeds))
    session.begin(p)
    session.shown.panel = panel
    return p


def test_each_page_sees_the_panel_of_its_own_run(session: Session) -> None:
    drawn(session, "1", "the first page's", 5, 6)
    drawn(session, "2", "the second page's", 5, 6)
    assert session.panel_of(info("1", 5, 6)) == "the first page's"
    assert session.panel_of(info("2", 5, 6)) == "the second page's"
    assert session.shown.panel == "the second page's"


def test_two_jobs_of_one_second_are_told_apart_by_their_seeds(session: Session) -> None:
    drawn(session, "1", "the first page's", 5)
    drawn(session, "1", "the second page's", 7)
    assert [session.panel_of(info("1", seed)) for seed in (5, 7)] == ["the first page's", "the second page's"]
    assert session.panel_of(info("1", 99)) == "the second page's"  # a plot of both


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"job_timestamp": "1", "all_seeds": []}', info("other", 5)])
def test_of_a_run_that_is_not_known_nothing_is_shown(session: Session, text: str) -> None:
    drawn(session, "1", "somebody's", 5)
    assert session.panel_of(text) == ""


def test_the_oldest_runs_are_let_go(session: Session) -> None:
    for number in range(RUNS_SHOWN + 1):
        drawn(session, str(number), f"run {number}", 5)
    assert session.panel_of(info("0", 5)) == "" and session.panel_of(info("1", 5)) == "run 1"


def test_what_is_sampled_within_a_run_leaves_it_watched(session: Session, tmp_path: Any) -> None:
    p = drawn(session, "1", "", 5)
    watching = session.watching = Run(Automatic1111(), Monitoring(), tmp_path)
    face = SimpleNamespace(all_seeds=[5])
    assert session.is_within(face) and session.run_of(face) is None
    assert not session.is_within(p) and session.run_of(p) is watching
    session._state.time_start = 2.0  # another job: the one before was cut short by a fault
    assert not session.is_within(face)
