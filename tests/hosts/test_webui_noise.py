"""Remedies that change the noise, in a real Automatic1111 and a real Forge: the run begins again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import webui_onlooker
from webui_server import WebUIServer
from webui_watched import NAME, errors_of_ours, ordinary, pixels, watched

PROMPT = "a red fox in the snow"
LATE = {"batch-wise-noise": 0.64}  # of the first sigma: from where on it guides, by its paper


def settings(mitigation: str, **more: Any) -> dict[str, Any]:
    return {"when_flagged": "mitigate", "mitigation": mitigation, "explain": "never", **more}


@pytest.mark.parametrize(
    ("mitigation", "sampler"),
    [
        ("batch-wise-noise", "Euler"),
        ("batch-wise-noise", "DDIM"),
        ("per-sample-noise", "DPM++ 2M"),
        ("per-sample-noise", "Heun"),  # with churn: it draws noise of its own before the first evaluation
    ],
)
def test_the_image_is_that_of_the_other_noise(webui: WebUIServer, mitigation: str, sampler: str) -> None:
    run = {"sampler_name": sampler, "override_settings": {"s_churn": 2.0 if sampler == "Heun" else 0.0}}
    plain = pixels(webui.txt2img(prompt=PROMPT, **run))
    # A run that is not flagged is left alone, to the bit.
    unflagged, (document,) = watched(webui, PROMPT, settings(mitigation), **run)
    assert document["flagged"] is None and document["mitigation"] is None
    assert (pixels(unflagged) == plain).all()
    with ordinary(webui, document, 0.95 * document["verdicts"][0]["score"]):
        webui_onlooker.want(webui, record=True)
        generated, (document,) = watched(webui, PROMPT, settings(mitigation), **run)
    assert document["flagged"] is True and document["notes"] == []
    assert f"{NAME} settings: when_flagged=mitigate; mitigation={mitigation}" in generated.infotexts[0]
    # What was read of the run that was drawn is what the method has said of its noise.
    told = document["mitigation"]
    (after,) = told["verdicts"]
    assert told["score_before"] == pytest.approx(document["verdicts"][0]["score"], rel=1e-4)
    assert after["score"] == pytest.approx(told["score_after"], rel=2e-4)
    assert after["score"] != pytest.approx(told["score_before"], rel=1e-3)
    assert len(after["score_per_step"]) >= 3 and None not in after["score_per_step"]
    # The host's own run from that noise, without us, gives the same image, and nothing of ours has stayed.
    webui_onlooker.want(webui, again=True, late=LATE.get(mitigation, 1))
    expected = pixels(webui.txt2img(prompt=PROMPT, **run))
    webui_onlooker.want(webui)
    assert np.abs(pixels(generated) - expected).max() <= 1
    assert np.abs(pixels(generated) - plain).mean() > 0.5 and np.abs(pixels(generated) - plain).max() > 5
    assert errors_of_ours(webui) == []


def test_of_a_batch_only_the_flagged_images_begin_again(webui: WebUIServer) -> None:
    # Each image's seed puts another word into its prompt.
    run = {"batch_size": 2}
    put_in = {"perturb": "random-word", "insertions": 2}
    plain, documents = watched(webui, PROMPT, {"explain": "never", **put_in}, **run)
    before = [document["verdicts"][0]["score"] for document in documents]
    assert documents[0]["prompt"] != documents[1]["prompt"]
    flagged = int(before[1] > before[0])
    with ordinary(webui, documents[0], sum(before) / 2):
        generated, documents = watched(webui, PROMPT, settings("batch-wise-noise", **put_in), **run)
    assert [document["flagged"] for document in documents] == [number == flagged for number in (0, 1)]
    assert [document["mitigation"] is not None for document in documents] == [number == flagged for number in (0, 1)]
    other = 1 - flagged
    assert (pixels(generated, other) == pixels(plain, other)).all()
    assert np.abs(pixels(generated, flagged) - pixels(plain, flagged)).mean() > 1
    # Its first evaluation was made twice, and is told once.
    assert [document["verdicts"][0]["score"] for document in documents] == pytest.approx(before, rel=1e-4)
    assert len(documents[other]["verdicts"][0]["score_per_step"]) == 4


def test_a_run_from_an_image_keeps_its_noise_and_is_told_why(webui: WebUIServer) -> None:
    start, script = webui.txt2img().images[0], settings("per-sample-noise")
    run = {"prompt": PROMPT, "denoising_strength": 0.75, "steps": 4}
    plain = webui.img2img(start, **run, alwayson_scripts={NAME: {"args": [script]}})
    (document,) = webui.get_json("/dejavu/reports")
    with ordinary(webui, document, 0.95 * document["verdicts"][0]["score"]):
        generated = webui.img2img(start, **run, alwayson_scripts={NAME: {"args": [script]}})
    (document,) = webui.get_json("/dejavu/reports")
    assert document["flagged"] is True and document["mitigation"] is None
    assert any("per-sample-noise" in note and "begins with an image" in note for note in document["notes"])
    assert (pixels(generated) == pixels(plain)).all()
