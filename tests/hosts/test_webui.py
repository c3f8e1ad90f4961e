"""The extension in a real Automatic1111 and a real Forge, driven through their API."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import comfyui_server
import graphs
import memorising
import numpy as np
import pytest
import webui_server
from comfyui_server import ComfyServer, make_home
from memorising import MEMORISED, ORDINARY
from PIL import Image
from watched import report as comfy_report
from watched import scores as comfy_scores
from watched import watched as comfy_watched
from webui_server import WebUIServer
from webui_watched import KNOWN, NAME, errors_of_ours, flagging, pixels, watched

PACK = Path(__file__).parents[2]
ALPHA = 0.05  # the level from which a verdict says 'unusual'; of 99 ordinary prompts four may score as high
LONG = ", ".join(["antidisestablishmentarianism"] * 13)  # more than 75 tokens, few words

# ------------------------------------------------------------------------------------- measuring


@pytest.mark.everywhere  # Automatic1111 has two kinds of samplers
@pytest.mark.parametrize(
    "sampler", ["Euler", "DPM++ 2M", "Heun", "DPM2 a", "LCM", "DDIM", "DDIM CFG++", "PLMS", "UniPC"]
)
def test_images_are_the_same_to_the_byte(webui: WebUIServer, sampler: str) -> None:
    plain = webui.txt2img(sampler_name=sampler)
    generated, (document,) = watched(webui, "a red fox in the snow", {"explain": "always"}, sampler_name=sampler)
    assert (pixels(generated) == pixels(plain)).all()
    (verdict,) = document["verdicts"]
    assert verdict["score"] > 0 and len(verdict["words"]) == 6
    assert len(verdict["score_per_step"]) == len(verdict["sigmas"]) >= 3
    assert verdict["sigmas"] == sorted(verdict["sigmas"], reverse=True) or sampler in (
        "Heun",
        "DPM2 a",
        "PLMS",
        "UniPC",
    )
    assert errors_of_ours(webui) == []


def test_every_sampler_with_some_scheduler_is_measured(webui: WebUIServer) -> None:
    silent = []
    names = [sampler["name"] for sampler in webui.get_json("/sdapi/v1/samplers")]
    schedulers = [scheduler["label"] for scheduler in webui.get_json("/sdapi/v1/schedulers")]
    assert len(names) >= 20 and len(schedulers) >= 8
    for number, name in enumerate(names):
        chosen = {"sampler_name": name, "scheduler": schedulers[number % len(schedulers)]}
        _, (document,) = watched(webui, "a red fox", {"explain": "never"}, steps=4, **chosen)
        (verdict,) = document["verdicts"]
        if not verdict["score"]:
            silent.append((name, chosen, verdict["why"]))
    assert silent == []


WAYS: dict[str, dict[str, Any]] = {
    "several": {"batch_size": 2, "n_iter": 2},
    "AND": {"prompt": "a red fox AND snow :0.6"},
    "schedule": {"prompt": "a [red:blue:0.5] fox"},
    "BREAK": {"prompt": "a red fox BREAK in the snow"},
    "long": {"prompt": LONG},
    "emphasis": {"prompt": "a (red:1.3) [fox] in the \\(snow\\)"},
    "negative": {"negative_prompt": "blurry", "settings": {"baseline": "negative prompt"}},
    "against the empty prompt": {"negative_prompt": "blurry"},
    "long negative": {"negative_prompt": LONG, "settings": {"baseline": "negative prompt"}},
    "cfg 1": {"cfg_scale": 1},
    "skipped": {"options": {"skip_early_cond": 0.3}},
    "skipped later": {"s_min_uncond": 4.0, "options": {"s_min_uncond_all": True}},
    "hires": {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6},
    "clip skip": {"options": {"CLIP_stop_at_last_layers": 2}},
    "padded": {"prompt": LONG, "options": {"pad_cond_uncond": True}},
}


@pytest.mark.everywhere  # each host reads prompts by code of its own
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_prompt_and_to_guide(webui: WebUIServer, with_options: Callable[..., None], way: str) -> None:
    payload = {"prompt": "a red fox in the snow", **WAYS[way]}
    settings = payload.pop("settings", {})
    with_options(**payload.pop("options", {}))
    if way == "hires" and webui.kind is webui_server.FORGE:
        payload["hr_additional_modules"] = ["Use same choices"]  # its API fails without
    plain = webui.txt2img(**payload)
    generated, documents = watched(webui, settings={"explain": "always", **settings}, **payload)
    assert all((pixels(generated, number) == pixels(plain, number)).all() for number in range(len(plain.images)))
    assert len(documents) == {"several": 4, "hires": 2}.get(way, 1)
    for document in documents:
        (verdict,) = document["verdicts"]
        assert verdict["score"] > 0
        if way == "AND":
            assert any("joined from 2" in note for note in document["notes"]) and not verdict["words"]
        else:
            assert verdict["words"] and verdict["view"] == "confirmed gradient", document["notes"]
    if way.startswith("skipped"):
        steps = documents[0]["verdicts"][0]["score_per_step"]
        assert None in steps and not any(value == 0 for value in steps)
    assert errors_of_ours(webui) == []


def test_img2img_and_inpainting(webui: WebUIServer) -> None:
    start = webui.txt2img().images[0]
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, "PNG")
    import base64

    for more in ({}, {"mask": base64.b64encode(mask.getvalue()).decode()}):
        payload = {"prompt": "a blue boat", "denoising_strength": 0.5, "steps": 8, **more}
        plain = webui.img2img(start, **payload)
        generated = webui.img2img(start, **payload, alwayson_scripts={NAME: {"args": [{"explain": "never"}]}})
        (document,) = webui.get_json("/dejavu/reports")
        assert (pixels(generated) == pixels(plain)).all()
        assert document["verdicts"][0]["score"] > 0 and document["setting"]["begins_with"] == "an image"


def test_scores_do_not_depend_on_the_batch(webui: WebUIServer) -> None:
    _, together = watched(webui, "a red fox", {"explain": "never"}, batch_size=3)
    alone = [watched(webui, "a red fox", {"explain": "never"}, seed=1 + n)[1][0] for n in range(3)]
    assert [d["image"] for d in together] == [0, 1, 2]
    found = [[d["verdicts"][0]["score"] for d in documents] for documents in (together, alone)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_arguments_that_make_no_sense_cost_no_image(webui: WebUIServer) -> None:
    plain = webui.txt2img()
    for arguments, why in (({"colour": "red"}, "no argument colour"), ({"alpha": 7}, "alpha must be")):
        generated = webui.txt2img(alwayson_scripts={NAME: {"args": [arguments]}})
        assert (pixels(generated) == pixels(plain)).all()
        assert why in webui.log()


def test_the_published_baselines_change_the_prompt(webui: WebUIServer) -> None:
    generated, (document,) = watched(
        webui, "a red fox", {"perturb": "random-number", "insertions": 2, "explain": "never"}
    )
    assert document["prompt"] != "a red fox" and len(document["prompt"].split()) == 5
    assert document["prompt"] in generated.infotexts[0]
    assert f"{NAME} settings: explain=never; perturb=random-number; insertions=2" in generated.infotexts[0]


@pytest.mark.parametrize(
    ("mitigation", "sampler"),
    [
        *product(["guidance-transition"], ["Euler", "DPM++ 2M", "Heun", "DDIM"]),
        *product(["start-token", "attenuate-tokens"], ["Euler", "DDIM"]),
    ],
)
def test_other_mitigations_draw_other_images(webui: WebUIServer, mitigation: str, sampler: str) -> None:
    run, prompt = {"sampler_name": sampler, "steps": 6}, "a red fox in the snow"
    plain = webui.txt2img(prompt=prompt, **run)
    settings = {"when_flagged": "mitigate", "mitigation": mitigation, "explain": "never"}
    with flagging(webui, prompt, **run):
        generated, (document,) = watched(webui, prompt, settings, **run)
    assert document["flagged"] is True and document["notes"] == []
    mitigation = document["mitigation"]
    (after,) = mitigation["verdicts"]
    assert after["score"] == pytest.approx(mitigation["score_after"], rel=1e-2)
    assert len(after["score_per_step"]) >= 5 and None not in after["score_per_step"]
    assert np.abs(pixels(plain) - pixels(generated)).mean() > 1
    # Nothing of it stays.
    again = webui.txt2img(prompt=prompt, **run)
    assert (pixels(again) == pixels(plain)).all() and errors_of_ours(webui) == []


# -------------------------------------------------------------------- a checkpoint that memorises


@pytest.fixture(scope="module")
def calibrated(webui: WebUIServer) -> Iterator[WebUIServer]:
    """The host with the memorising checkpoint, calibrated for it at 64 x 64."""
    before = webui.options()["sd_model_checkpoint"]
    webui.set_options(**KNOWN)
    answer = webui.post_json("/dejavu/calibrate", {"count": 99, "width": 64, "height": 64, "steps": 20}, 900)
    assert answer["prompts"] == 99
    yield webui
    webui.set_options(sd_model_checkpoint=before)


def test_memorised_prompts_flag_and_ordinary_ones_do_not(calibrated: WebUIServer) -> None:
    found = {
        prompt.text: watched(calibrated, prompt.text, {"alpha": ALPHA}, steps=4, override_settings=KNOWN)
        for prompt in (*MEMORISED, *ORDINARY)
    }
    assert [documents[0]["flagged"] for _, documents in found.values()] == [True] * 3 + [False] * 3
    generated, (document,) = found[MEMORISED[0].text]
    assert f"{NAME}: Flagged, {NAME} score: " in generated.infotexts[0]
    assert len(document["verdicts"][0]["words"]) == len(MEMORISED[0].text.split())
    assert document["ordinary"]["median"] < document["verdicts"][0]["score"]


@pytest.mark.parametrize(
    ("mitigation", "sampler"), [("optimise", "Euler"), ("remove-trigger", "Euler"), ("optimise", "DDIM")]
)
def test_a_mitigated_image_is_no_copy(calibrated: WebUIServer, mitigation: str, sampler: str) -> None:
    if sampler != "Euler":
        chosen = {"count": 99, "width": 64, "height": 64, "steps": 20, "sampler_name": sampler}
        calibrated.post_json("/dejavu/calibrate", chosen, 900)
    run = {"sampler_name": sampler, "override_settings": KNOWN}
    prompt, image = MEMORISED[1].text, 127.5 * (1 + memorising.image(1).permute(1, 2, 0).numpy())
    plain = calibrated.txt2img(prompt=prompt, steps=20, **run)
    settings = {"when_flagged": "mitigate", "mitigation": mitigation, "explain": "never", "alpha": ALPHA}
    generated, (document,) = watched(calibrated, prompt, settings, steps=20, **run)
    assert document["flagged"] is True, document["notes"]
    mitigation = document["mitigation"]
    assert mitigation["score_after"] < 0.5 * mitigation["score_before"]
    assert len(mitigation["verdicts"][0]["score_per_step"]) >= 19  # of DDIM's steps the hosts leave one out
    assert max(mitigation["verdicts"][0]["score_per_step"]) < 0.5 * mitigation["score_before"]
    assert np.abs(pixels(plain) - image).mean() < 5 < 60 < np.abs(pixels(generated) - image).mean()
    # The host's cached conditioning is as it was.
    again = calibrated.txt2img(prompt=prompt, steps=20, **run)
    assert (pixels(again) == pixels(plain)).all()


def test_clip_skip_makes_another_setting(calibrated: WebUIServer) -> None:
    chosen = {**KNOWN, "CLIP_stop_at_last_layers": 2}
    _, (document,) = watched(calibrated, MEMORISED[0].text, {"explain": "never"}, steps=4, override_settings=chosen)
    (verdict,) = document["verdicts"]
    assert verdict["score"] > 0 and verdict["p_value"] is None and document["setting"]["patches"] == "clip skip 2"


def test_a_flagged_run_can_be_ended(calibrated: WebUIServer) -> None:
    generated, (document,) = watched(
        calibrated, MEMORISED[0].text, {"when_flagged": "stop", "alpha": ALPHA}, steps=150, override_settings=KNOWN
    )
    assert generated.images
    assert len(document["verdicts"][0]["score_per_step"]) == 1
    assert any("ended at its first step" in note for note in document["notes"])


def test_the_score_is_that_of_comfyui(calibrated: WebUIServer, memorising_checkpoint: Path, tmp_path: Path) -> None:
    # Not by the fixture: with two parameters of a session, this test's checkpoint would be loaded for those of one.
    installs = comfyui_server.find_installs()
    if not installs:
        pytest.skip("ComfyUI was not found")
    scores = {}
    for seed, prompt in enumerate((*MEMORISED, *ORDINARY), 5):
        # Noise times sqrt(1 + sigma^2), as in ComfyUI, where Automatic1111 takes it times sigma.
        run = {"seed": seed, "override_settings": {**KNOWN, "sgm_noise_multiplier": True}}
        _, (document,) = watched(calibrated, prompt.text, {"explain": "never"}, **run)
        scores[seed, prompt.text] = document["verdicts"][0]["score"]
    # Automatic1111's scores are those of each version, Forge's those of the newest: so all are equal.
    versions = list(installs.items())[0 if calibrated.kind is webui_server.A1111 else -1 :]
    for number, install in versions:
        home = make_home(tmp_path / number, PACK)
        folder = home / "models" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / memorising.FILE).symlink_to(memorising_checkpoint)
        with ComfyServer(install, home) as server:
            for (seed, text), score in scores.items():
                graph = graphs.text_to_image(text, seed=seed, steps=4, checkpoint=memorising.FILE)
                (expected,) = comfy_scores(comfy_report(server, comfy_watched(graph)))
                assert score == pytest.approx(expected, rel=1e-3), (number, text)
