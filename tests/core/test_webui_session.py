"""Which runs are watched, and which panel each page sees: no host, its processing objects are made up."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_monitor import SETTING, predictions

from sd_dejavu.calibration import store
from sd_dejavu.calibration.profile import Null, Profile
from sd_dejavu.hosts.webui.calibration import Calibrating
from sd_dejavu.hosts.webui.run import Automatic1111, Forge, Pass, Run
from sd_dejavu.hosts.webui.session import RUNS_SHOWN, Entry, Made, Session, Shown, Watched
from sd_dejavu.run.controller import Stop
from sd_dejavu.run.monitoring import Monitoring
from sd_dejavu.run.report import Report
from sd_dejavu.run.state import RunState


def info(job: str, *seeds: int) -> str:
    """What the host tells a page of its run."""
    return json.dumps({"job_timestamp": job, "all_seeds": seeds, "prompt": "a red fox"})


@pytest.fixture
def state() -> Any:
    return SimpleNamespace(job_timestamp="20300101000000", time_start=1.0)


@pytest.fixture
def session(state: Any) -> Session:
    return Session(state)


def drawing(*seeds: int, prompt: str = "a red fox") -> Any:
    """A processing object."""
    return SimpleNamespace(
        all_seeds=list(seeds), prompts=[prompt], negative_prompts=[""], cfg_scale=7.0, sampler_name="Euler", steps=4
    )


def drawn(session: Session, job: str, panel: str, *seeds: int) -> Watched:
    """A run of a job of its own, which is over."""
    session._state.job_timestamp, session._state.time_start = job, float(job)
    watched = session.begin(drawing(*seeds))
    watched.shown.faults = panel
    session.close(watched.p)
    return watched


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


# ------------------------------------------------------------------------------ runs within runs


@pytest.fixture(autouse=True)
def _no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pass, "interruptions", ())


def watched_run(session: Session, host: Any, folder: Path, *seeds: int) -> tuple[Watched, Run]:
    """A run that is being sampled."""
    watched = session.begin(drawing(*seeds))
    run = watched.watching = Run(host, Monitoring(explain="never"), folder)
    run.begin(watched.p, from_image=False)
    return watched, run


def evaluation(watched: Watched, inner_model: Any) -> Any:
    """What the host tells before an evaluation of that run."""
    rows = torch.zeros(1, 3, 8)
    denoiser = SimpleNamespace(p=watched.p, inner_model=inner_model)
    x, sigma = torch.zeros(2, 4, 2, 2), torch.ones(2)
    return SimpleNamespace(denoiser=denoiser, x=x, sigma=sigma, image_cond=None, text_cond=rows, text_uncond=rows)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The passes whose evaluations were read, in their order."""
    found: list[Any] = []

    def after(known: Any, given: Any) -> Any:
        found.append(known)
        return torch.ones(1)

    monkeypatch.setattr(Pass, "before", lambda known, params, step: setattr(known, "step", step))
    monkeypatch.setattr(Pass, "after_automatic1111", after)
    monkeypatch.setattr(Pass, "after_forge", after)
    return found


@pytest.mark.parametrize("host", [Automatic1111(), Forge()], ids=["Automatic1111", "Forge"])
def test_each_evaluation_is_read_by_the_run_that_it_is_of(
    session: Session, seen: list[Any], host: Any, tmp_path: Path
) -> None:
    def after(inner_model: object) -> None:
        if host.name == "Forge":
            session.after_forge({"denoised": torch.zeros(1)})
        else:
            session.after_automatic1111(SimpleNamespace(inner_model=inner_model))

    models = object(), object()
    outer, outer_run = watched_run(session, host, tmp_path, 5)
    session.before(evaluation(outer, models[0]))
    # Between the outer's evaluation and what it gives, another extension draws.
    inner, inner_run = watched_run(session, host, tmp_path, 5)
    assert (outer.within, inner.within) == (False, True)
    for _ in range(2):
        session.before(evaluation(inner, models[1]))
        after(models[1])
    session.close(inner.p)
    after(models[0])
    after(models[0])  # of no evaluation that was announced
    assert seen == [inner_run.passes[0]] * 2 + [outer_run.passes[0]]
    assert session.of(outer.p) is outer and session.of(inner.p) is None


def test_a_run_that_nobody_watches_is_read_by_none(session: Session, seen: list[Any], tmp_path: Path) -> None:
    open_run, _ = watched_run(session, Automatic1111(), tmp_path, 5)
    session.before(evaluation(Watched(drawing(7), 1.0, True), "theirs"))
    session.after_automatic1111(SimpleNamespace(inner_model="theirs"))
    assert seen == [] and session.of(open_run.p) is open_run
    denoised = torch.zeros(1)
    assert session.after_forge({"denoised": denoised}) is denoised


def test_the_panel_is_that_of_the_outer_run(session: Session, state: Any) -> None:
    outer = session.begin(drawing(5))
    outer.shown.faults = "the outer's"
    for seed in (5, 7):
        inner = session.begin(drawing(seed))
        inner.shown.faults = "the inner's"
        session.close(inner.p)
    for seed in (5, 7, 9):
        assert session.panel_of(info(state.job_timestamp, seed)) == "the outer's"
    assert session.shown is outer.shown


@pytest.mark.parametrize("within", [False, True])
def test_a_flagged_run_within_another_ends_itself_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, within: bool
) -> None:
    class Interrupted(BaseException):
        pass

    ended: list[bool] = []
    shared = SimpleNamespace(state=SimpleNamespace(interrupt=lambda: ended.append(True)))
    monkeypatch.setitem(sys.modules, "modules", SimpleNamespace(shared=shared))  # type: ignore[arg-type]
    monkeypatch.setattr(Pass, "interruptions", (Interrupted,))
    run = Run(Automatic1111(), Monitoring(), tmp_path, within=within)
    run.begin(drawing(5), from_image=False)
    with pytest.raises(Interrupted) if within else nullcontext():
        run.passes[0]._carried_out(Stop("it was flagged"), torch.zeros(1, 4, 8, 8))
    assert ended == ([] if within else [True])
    assert run.passes[0].states[0].notes == ["this run was ended at its first step, since it was flagged"]


def test_a_run_that_a_fault_has_cut_short_is_closed(session: Session, state: Any, tmp_path: Path) -> None:
    outer, run = watched_run(session, Automatic1111(), tmp_path, 5)
    watched_run(session, Automatic1111(), tmp_path, 6)
    session.close(outer.p)  # with what was left open within it
    assert session._open == []
    outer, run = watched_run(session, Automatic1111(), tmp_path, 5)
    again = session.begin(outer.p)  # a script draws the same once more
    assert not again.within and run._open is None
    state.time_start = 2.0
    assert not session.begin(drawing(6)).within and session.of(outer.p) is None


def test_a_run_of_our_own_is_for_whoever_made_it(session: Session) -> None:
    told: list[Any] = []
    measuring: Any = SimpleNamespace(before=told.append)
    p = drawing()
    params = evaluation(Watched(p, 1.0, False), "ours")
    with session.own(p, measuring):
        session.before(params)
        session.after_automatic1111(SimpleNamespace(inner_model="ours"))
    assert told == [params] and session.of(p) is None


def shown(monitoring: Monitoring, prompts: int = 0, **setting: Any) -> Shown:
    """A run of a batch of two images, with a calibration of so many ordinary prompts or none."""
    state = RunState(monitoring, "a red fox", replace(SETTING, **setting))
    state.trace.record(predictions(3.0))
    if prompts:
        nulls = tuple(Null("plain", {"first step": (0.1,)}) for _ in range(prompts))
        state.profile = Profile(SETTING, nulls, ordinary="generated")
    report = Report.of(state).of_images([0])
    made = Made(Calibrating(count=100, networks="<lora:x:1>"), {"sd_model_checkpoint": "a"}, 2.0)
    return Shown(entries=[Entry("Image 1", "first pass", 0, report)], made=made)


def test_what_to_calibrate_for_is_how_the_run_was_made() -> None:
    asked = shown(Monitoring()).asked(100)
    assert asked == Calibrating(count=100, networks="<lora:x:1>")
    asked = shown(Monitoring(score="all steps", alpha=0.001, baseline="negative prompt")).asked(100)
    assert asked is not None and (asked.count, asked.whole_runs, asked.baseline) == (1000, 1000, "negative prompt")
    assert shown(Monitoring(), begins_with="an image").asked(100) is None
    assert shown(Monitoring(), prompts=99).asked(100) is None  # it has its verdict
    too_few = shown(Monitoring(), prompts=20).asked(100)
    assert too_few is not None and too_few.count == 100
    assert "Calibrate with these settings" in shown(Monitoring()).panel
    assert "Calibrate with these settings" not in shown(Monitoring(), prompts=99).panel


def test_a_run_is_judged_again_by_what_was_calibrated_since(tmp_path: Path) -> None:
    found = shown(Monitoring())
    before = found.entries[0].report.verdicts[0]
    assert before.lacks_calibration and found.documents[0]["lacks_calibration"]
    nulls = tuple(Null("plain", {"first step": (0.1,)}) for _ in range(100))
    store.keep(Profile(SETTING, nulls, ordinary="generated"), store.path_for(SETTING, tmp_path))
    found.judged_again(tmp_path)
    (verdict,) = found.entries[0].report.verdicts
    assert verdict.flagged is True and verdict.score == before.score and verdict.nulls == 100
    assert found.asked(100) is None and not found.documents[0]["lacks_calibration"]
