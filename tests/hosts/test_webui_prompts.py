"""What else makes a prompt in Automatic1111 and Forge: inversions, LoRAs, styles, a refiner, the plot, pasted text."""

from __future__ import annotations

import io
import json
from typing import Any

import memorising
import miniature
import pytest
import torch
from memorising import MEMORISED
from PIL import Image
from safetensors.torch import save_file
from webui_server import WebUIServer
from webui_watched import KNOWN, NAME, errors_of_ours, pixels, watched


@pytest.fixture
def inversion(webui: WebUIServer) -> str:
    """The name of a textual inversion of two vectors."""
    folder = webui.home / "embeddings"
    folder.mkdir(exist_ok=True)
    vectors = 0.05 * torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, folder / "moxlore.safetensors")
    webui.post_json("/sdapi/v1/refresh-embeddings", {})
    return "moxlore"


def test_a_textual_inversion_is_a_word(webui: WebUIServer, inversion: str) -> None:
    prompt = f"a red fox by {inversion} in the snow"
    plain = webui.txt2img(prompt=prompt)
    uninverted = webui.txt2img(prompt="a red fox by in the snow")
    generated, (document,) = watched(webui, prompt, {"explain": "always"})
    (verdict,) = document["verdicts"]
    assert (pixels(plain) != pixels(uninverted)).any(), "the host did not read the inversion"
    assert (pixels(generated) == pixels(plain)).all()
    assert [word["text"] for word in verdict["words"]] == prompt.split()
    assert verdict["view"] == "confirmed gradient" and document["notes"] == []
    # Blanked in its place, each word changes the score by itself.
    scores = [word["score_without"] for word in verdict["words"]]
    assert len({verdict["score"], *scores}) == 1 + len(scores)
    assert errors_of_ours(webui) == []


def test_a_lora_is_part_of_the_model(webui: WebUIServer) -> None:
    folder = webui.home / "models" / "Lora"
    folder.mkdir(exist_ok=True)
    save_file(miniature.lora(3), folder / "moxstyle.safetensors")
    webui.post_json("/sdapi/v1/refresh-loras", {})
    prompt = "a red fox in the snow"
    _, (base,) = watched(webui, prompt, {"explain": "always"})
    plain = webui.txt2img(prompt=f"{prompt} <lora:moxstyle:1>")
    generated, (document,) = watched(webui, f"{prompt} <lora:moxstyle:1>", {"explain": "always"})
    assert (pixels(generated) == pixels(plain)).all()
    (own,), (bare,) = document["verdicts"], base["verdicts"]
    assert own["score"] != pytest.approx(bare["score"], rel=1e-3)
    assert [word["text"] for word in own["words"]] == prompt.split()
    # A calibration of the bare checkpoint does not speak for it.
    assert document["setting"]["model"] != base["setting"]["model"]
    # And afterwards the checkpoint is the bare one again.
    _, (again,) = watched(webui, prompt, {"explain": "never"})
    assert again["setting"] == base["setting"] and again["verdicts"][0]["score"] == bare["score"]
    assert errors_of_ours(webui) == []


def test_words_of_a_style_are_words_of_the_prompt(webui: WebUIServer) -> None:
    plain = webui.txt2img(prompt="a red fox", styles=["Woodcut"])
    generated, (document,) = watched(webui, "a red fox", {"explain": "always"}, styles=["Woodcut"])
    assert (pixels(generated) == pixels(plain)).all()
    assert document["prompt"] == "a red fox, woodcut by Moxgaen"
    (verdict,) = document["verdicts"]
    assert verdict["baseline"] == "empty prompt" and verdict["words"][-1]["text"] == "Moxgaen"


def test_a_refiner_draws_unmeasured(webui: WebUIServer) -> None:
    refiner = {"refiner_checkpoint": memorising.FILE, "refiner_switch_at": 0.5, "steps": 6}
    plain = webui.txt2img(prompt="a red fox", **refiner)
    alone = webui.txt2img(prompt="a red fox", steps=6)
    assert (pixels(plain) != pixels(alone)).any(), "the host did not swap the model"
    generated, (document,) = watched(webui, "a red fox", {"explain": "always"}, **refiner)
    assert (pixels(generated) == pixels(plain)).all()
    (verdict,) = document["verdicts"]
    steps = verdict["score_per_step"]
    assert len(steps) == 6 and None not in steps[:3] and set(steps[3:]) == {None}
    assert verdict["words"] and errors_of_ours(webui) == []
    _, (bare,) = watched(webui, "a red fox", {"explain": "never"}, steps=6)
    assert verdict["score"] == pytest.approx(bare["verdicts"][0]["score"], rel=1e-5)
    assert document["setting"]["model"] == bare["setting"]["model"]


def plot(webui: WebUIServer, axis: str, values: str) -> list[Any]:
    """The arguments of the X/Y/Z plot with one axis; kinds of axes go by their place in its list."""
    known = webui.get_json("/sdapi/v1/script-info")
    script = next(s for s in known if s["name"] == "x/y/z plot" and not s["is_img2img"])
    kinds = script["args"][0]["choices"]
    chosen = values.split(", ")
    return [
        kinds.index(axis),
        values,
        chosen,
        0,
        "",
        [],
        0,
        "",
        [],
        True,
        True,
        False,
        False,
        False,
        False,
        False,
        0,
        False,
    ]


def test_axes_of_the_plot_are_our_settings(webui: WebUIServer) -> None:
    axis = f"[{NAME}] perturb"
    drawn = webui.txt2img(
        prompt="a red fox", script_name="x/y/z plot", script_args=plot(webui, axis, "none, random-number")
    )
    texts = [text for text in drawn.infotexts if f"{NAME} score" in text]
    assert any("settings: default" in text for text in texts), drawn.infotexts
    assert any("perturb=random-number" in text for text in texts), drawn.infotexts
    # Nothing of the plot stays with later runs.
    assert NAME not in webui.txt2img(prompt="a red fox").infotexts[0]
    assert errors_of_ours(webui) == []


def test_the_settings_page_keeps_images_free_of_us(webui: WebUIServer) -> None:
    webui.set_options(dejavu_infotext=False)  # Forge's API does not list what extensions have added
    try:
        generated, (document,) = watched(webui, "a red fox", {"explain": "never"})
    finally:
        webui.set_options(dejavu_infotext=True)
    assert document["verdicts"][0]["score"] > 0
    assert f"{NAME} score" not in generated.infotexts[0]


def test_the_verdict_is_in_the_file(webui: WebUIServer) -> None:
    generated, (document,) = watched(webui, "a red fox", {"explain": "never", "alpha": 0.05})
    parameters = Image.open(io.BytesIO(generated.images[0])).info["parameters"]
    label = document["verdicts"][0]["label"]
    assert f"{NAME}: {label}, {NAME} score: " in parameters
    read = webui.post_json("/sdapi/v1/png-info", {"image": _base64(generated.images[0])})
    told = read["parameters"]
    assert float(told[f"{NAME} score"]) == pytest.approx(document["verdicts"][0]["score"], rel=0.01)
    assert told[f"{NAME} settings"] == "explain=never; alpha=0.05"
    json.dumps(document, allow_nan=False)


def test_a_prompt_of_the_refined_checkpoint_still_flags(webui: WebUIServer) -> None:
    """After a refiner was swapped in, the loaded checkpoint is told by its own hash again."""
    _, (document,) = watched(webui, MEMORISED[0].text, {"explain": "never"}, override_settings=KNOWN)
    _, (other,) = watched(webui, MEMORISED[0].text, {"explain": "never"})
    assert document["setting"]["model"] != other["setting"]["model"]
    assert document["verdicts"][0]["score"] > 2 * other["verdicts"][0]["score"]


def _base64(file: bytes) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(file).decode()
