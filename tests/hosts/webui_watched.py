"""Runs of Automatic1111 and Forge with the extension on, and what it reports."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import memorising
import numpy as np
from PIL import Image
from webui_server import Generated, WebUIServer

from sd_dejavu.calibration.profile import Null, Profile, Setting
from sd_dejavu.calibration.store import path_for

NAME = "Déjà Vu"
KNOWN = {"sd_model_checkpoint": memorising.FILE}


def watched(server: WebUIServer, prompt: str, settings: dict[str, Any] | None = None, **payload: Any):
    """(what was generated, the reports) of a run with the extension on."""
    script = {"alwayson_scripts": {NAME: {"args": [settings or {}]}}}
    generated = server.txt2img(prompt=prompt, **script, **payload)
    return generated, server.get_json("/dejavu/reports")


def pixels(generated: Generated, number: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(generated.images[number])).convert("RGB")).astype(int)


def errors_of_ours(server: WebUIServer) -> list[str]:
    """The host's own words on our script; that a folder without a remote is no clone is not ours."""
    return [line for line in server.reported_errors() if "dejavu" in line and "Git repository" not in line]


@contextmanager
def flagging(server: WebUIServer, prompt: str, **payload: Any) -> Iterator[None]:
    """While open, the score of this run is above that of 399 made-up ordinary prompts."""
    _, (document,) = watched(server, prompt, {"explain": "never"}, **payload)
    with ordinary(server, document, 0.99 * document["verdicts"][0]["score"]):
        yield


@contextmanager
def ordinary(server: WebUIServer, document: dict[str, Any], score: float) -> Iterator[None]:
    """While open, this is what 399 made-up ordinary prompts score in the setting of that report."""
    known = document["setting"]
    setting = Setting(**{**known, "latent_shape": tuple(known["latent_shape"])})
    profile = Profile(setting, tuple(Null("plain", {"first step": (score,)}) for _ in range(399)))
    path = path_for(setting, server.home / "dejavu" / "calibration")
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)
    try:
        yield
    finally:
        path.unlink()
