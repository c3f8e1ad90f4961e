"""Anti-memorization guidance in a real Automatic1111 and a real Forge, away from the memorised images."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator

import memorising
import numpy as np
import pytest
from memorising import MEMORISED, ORDINARY
from webui_reference_set import reference_set
from webui_server import WebUIServer
from webui_watched import KNOWN, NAME, errors_of_ours, pixels, watched

from sd_dejavu.hosts.webui import controls


@pytest.fixture(scope="module")
def guarded(webui: WebUIServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUIServer]:
    """The memorising checkpoint, and a set of its training images made by the command line."""
    pairs = [(memorising.pixels(number), prompt.text) for number, prompt in enumerate(MEMORISED)]
    with reference_set(webui, "training", tmp_path_factory.mktemp("training"), pairs):
        before = webui.options()["sd_model_checkpoint"]
        webui.set_options(**KNOWN)
        yield webui
        webui.set_options(sd_model_checkpoint=before)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_guidance_leads_away_from_training_images(guarded: WebUIServer, sampler: str) -> None:
    run = {"steps": 8, "sampler_name": sampler}
    settings = {"references": "training", "explain": "never"}
    image = 127.5 * (1 + memorising.image(0).permute(1, 2, 0).numpy())
    plain = guarded.txt2img(prompt=MEMORISED[0].text, **run)
    generated, (document,) = watched(guarded, MEMORISED[0].text, settings, **run)
    assert document["notes"] == [] and errors_of_ours(guarded) == []
    assert np.abs(pixels(plain) - image).mean() < 5 < 40 < np.abs(pixels(generated) - image).mean()
    assert f"{NAME} settings: explain=never; references=training" in generated.infotexts[0]
    # A prompt that comes near none of them is drawn as ever, to the bit.
    plain = guarded.txt2img(prompt=ORDINARY[0].text, **run)
    generated, _ = watched(guarded, ORDINARY[0].text, settings, **run)
    assert (pixels(generated) == pixels(plain)).all()


def test_prompts_joined_by_and_are_led_away_too(guarded: WebUIServer) -> None:
    prompt, image = f"{MEMORISED[1].text} AND snow :0.2", memorising.image(1).permute(1, 2, 0).numpy()
    plain = guarded.txt2img(prompt=prompt, steps=8)
    generated, _ = watched(guarded, prompt, {"references": "training", "explain": "never"}, steps=8)
    near, far = (np.abs(pixels(drawn) - 127.5 * (1 + image)).mean() for drawn in (plain, generated))
    assert near < 20 and far > 40


def test_a_set_that_is_not_there_costs_no_image(guarded: WebUIServer) -> None:
    plain = guarded.txt2img(prompt=ORDINARY[0].text)
    for name in ("other", "../training", str(guarded.home)):
        generated = guarded.txt2img(prompt=ORDINARY[0].text, alwayson_scripts={NAME: {"args": [{"references": name}]}})
        assert (pixels(generated) == pixels(plain)).all()
        assert "there is no reference set" in guarded.log()


def test_a_set_of_any_name_is_pasted_back_from_an_image(guarded: WebUIServer) -> None:
    folder, name = guarded.home / "dejavu" / "references", "cats; 2024, 50%"
    for suffix in (".safetensors", ".json"):
        if (folder / f"training{suffix}").exists():
            shutil.copy(folder / f"training{suffix}", folder / f"{name}{suffix}")
    generated, _ = watched(guarded, ORDINARY[0].text, {"references": name, "explain": "never"}, steps=2)
    read = guarded.post_json("/sdapi/v1/png-info", {"image": base64.b64encode(generated.images[0]).decode()})
    known = {controls.INFOTEXT: read["parameters"][controls.INFOTEXT]}
    assert controls.pasted(known, "references") == name and controls.pasted(known, "explain") == "never"
    for suffix in (".safetensors", ".json"):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)
