"""Runs of Automatic1111 and Forge with the extension on, and what it reports."""

from __future__ import annotations

import io
from typing import Any

import memorising
import numpy as np
from PIL import Image
from webui_server import Generated, WebUIServer

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
