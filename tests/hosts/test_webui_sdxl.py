"""A miniature of SDXL in a real Automatic1111 and a real Forge: two text encoders, and conditionings in dictionaries."""

from __future__ import annotations

from typing import Any

import miniature
import numpy as np
import pytest
from webui_server import WebUIServer
from webui_watched import errors_of_ours, flagging, pixels, watched

PROMPT = "a (red:1.2) fox in snow"


@pytest.fixture(scope="module")
def sdxl(webui: WebUIServer) -> Any:
    """The host with the miniature of SDXL loaded."""
    folder = webui.home / "models" / "Stable-diffusion"
    if not (folder / miniature.SDXL_EVERYWHERE).exists():
        miniature.write_sdxl_everywhere(folder / miniature.SDXL_EVERYWHERE)
        webui.post_json("/sdapi/v1/refresh-checkpoints", {})
    before = webui.options()["sd_model_checkpoint"]
    webui.set_options(sd_model_checkpoint=miniature.SDXL_EVERYWHERE)
    yield webui
    webui.set_options(sd_model_checkpoint=before)


def test_dictionaries_of_conditionings(sdxl: WebUIServer) -> None:
    plain = sdxl.txt2img(prompt=PROMPT, steps=3)
    generated, (document,) = watched(sdxl, PROMPT, {"explain": "always"}, steps=3)
    (verdict,) = document["verdicts"]
    assert (pixels(generated) == pixels(plain)).all()
    assert verdict["score"] > 0 and len(verdict["score_per_step"]) == 3
    assert verdict["view"] == "confirmed gradient", document["notes"]
    assert [word["text"] for word in verdict["words"]] == ["a", "red", "fox", "in", "snow"]
    assert errors_of_ours(sdxl) == []


def test_a_mitigation_swaps_rows_and_vector(sdxl: WebUIServer) -> None:
    settings = {"when_flagged": "mitigate", "mitigation": "remove-trigger", "explain": "never"}
    with flagging(sdxl, "red fox", steps=3):
        generated, (document,) = watched(sdxl, "red fox", settings, steps=3)
    assert document["flagged"] is True, document["notes"]
    shorter = document["mitigation"]["prompt"]
    assert shorter in ("red", "fox")
    # The image is the host's own of that prompt, from its first step on.
    assert np.abs(pixels(generated) - pixels(sdxl.txt2img(prompt="red fox", steps=3))).mean() > 1
    assert np.abs(pixels(generated) - pixels(sdxl.txt2img(prompt=shorter, steps=3))).mean() < 0.1
