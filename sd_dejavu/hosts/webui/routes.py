"""Our routes. As the host's own they want its password where it has one, and their page no other site's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fastapi import HTTPException, Request
from modules import shared

from ...calibration import store
from ...calibration.profile import ALPHA_DEFAULT, Profile
from . import audit, door, repair, work
from .calibration import Calibrating
from .here import Here
from .hosted import App, Options

Asked = TypeVar("Asked")
Found = TypeVar("Found")

log = logging.getLogger("dejavu")


def add_routes(here: Here, app: App) -> None:
    """``app`` is the host's, of FastAPI."""

    @app.get("/dejavu/reports")
    def reports(request: Request) -> list[Options]:
        """The reports on the last run that was watched: one for each image and pass."""
        with _at_the_door(here):
            door.check_user(request, app, shared.cmd_opts.api_auth)
            return here.session.shown.documents

    @app.post("/dejavu/calibrate")
    async def calibrate(request: Request) -> Options:
        """Calibrate for the loaded checkpoint; a JSON object of count, width, height, steps, and more by their names."""

        def do(here: Here, asked: Calibrating, turn: door.Turn) -> tuple[Profile, Path, str]:
            profile, path = work.calibrate(here, asked, turn)
            return profile, path, " ".join(work.calibrated(profile, asked, ALPHA_DEFAULT))

        profile, path, text = await _let_in(here, request, app, work.read_calibrating, do)
        held = store.Size.of(profile)
        return {"file": path.name, "prompts": held.prompts, "whole_runs": held.whole_runs, "text": text}

    @app.post("/dejavu/audit")
    async def audit_named(request: Request) -> Options:
        """Audit a training set; a JSON object of the tab's arguments by their names."""
        found = await _let_in(here, request, app, audit.read, work.run_audit)
        return found.as_json()

    @app.post("/dejavu/repair")
    async def repair_named(request: Request) -> Options:
        """Repair a LoRA; a JSON object of the tab's arguments by their names."""
        found = await _let_in(here, request, app, repair.read, work.run_repair)
        return found.as_json()


async def _let_in(
    here: Here,
    request: Request,
    app: App,
    read: Callable[[Options], Asked],
    do: Callable[[Here, Asked, door.Turn], Found],
) -> Found:
    """What is done with what is ``read`` from the body, in the host's queue and while the client is there."""
    with _at_the_door(here):
        options = shared.cmd_opts
        door.check_user(request, app, options.api_auth)
        door.check_site(request, options.cors_allow_origins, options.cors_allow_origins_regex)
        asked, turn = read(await door.body_of(request)), door.Turn(shared.state)
        return await door.while_there(request, turn, lambda: here.in_turn(lambda: do(here, asked, turn)))


@contextmanager
def _at_the_door(here: Here) -> Iterator[None]:
    """Our refusals and errors as HTTP answers of one sentence; what else goes wrong is told in the host's log only."""
    try:
        yield
    except door.Refused as refused:
        raise HTTPException(refused.status, str(refused), refused.headers) from None
    except ValueError as error:
        status = 409 if isinstance(error, store.HoldsMore) else 400
        raise HTTPException(status, here.sentence(error)) from error
    except Exception as error:
        log.exception("[Déjà Vu] a request failed")
        raise HTTPException(500, f"this failed ({type(error).__name__}); the host's log says why") from error
