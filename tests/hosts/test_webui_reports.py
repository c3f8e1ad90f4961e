"""What people have reported about other extensions that hook where ours does, tried with ours in both hosts.

Beside ours stands an extension that draws images of its own in the midst of a run, changes prompts, and takes from
the host what older ones and forks lack; on which of them, the test says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import pytest
import webui_server
from webui_server import WebUIServer
from webui_watched import NAME, errors_of_ours, flagging, pixels, watched

PACK = Path(__file__).parents[2]

NEIGHBOUR = """
from types import SimpleNamespace

import modules.ui_components
from modules import processing, script_callbacks, scripts

known = {}  # what the test wants
drawn = []  # parameters of the images of our own
taken = {}
for name in ("on_ui_tabs", "on_ui_settings", "on_before_ui"):
    delattr(script_callbacks, name)
others = {name: value for name, value in vars(modules.ui_components).items() if name != "InputAccordion"}
modules.ui_components = SimpleNamespace(**others)  # what scripts that are loaded from here on import


class Neighbour(scripts.Script):
    def title(self):
        return "A neighbour"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process(self, p, *args):
        if "process" in known:
            p.all_prompts = list(known["process"])

    def before_process_batch(self, p, *args, **kwargs):
        if "before_process_batch" in known:
            p.prompts = [known["before_process_batch"][p.iteration]]
            p.all_prompts[p.iteration] = p.prompts[0]

    def process_before_every_sampling(self, p, *args, **kwargs):
        self.draw(p, "process_before_every_sampling")

    def postprocess_batch(self, p, *args, **kwargs):
        self.draw(p, "postprocess_batch")

    def postprocess_image(self, p, pp, *args):
        found = self.draw(p, "postprocess_image")
        pp.image = found or pp.image

    def draw(self, p, where):
        wanted = known.pop("draw", None)
        if wanted is None or wanted["in"] != where:
            if wanted is not None:
                known["draw"] = wanted
            return None
        inner = processing.StableDiffusionProcessingTxt2Img(
            sd_model=p.sd_model, prompt="a blue boat", seed=7, steps=3, width=64, height=64, cfg_scale=5,
            sampler_name="Euler", do_not_save_samples=True, do_not_save_grid=True,
        )
        inner.extra_generation_params = p.extra_generation_params
        if wanted["with all scripts"]:
            inner.scripts, inner.script_args = p.scripts, p.script_args
        result = processing.process_images(inner)
        drawn.append(result.infotexts[0])
        known["draw"] = wanted
        return result.images[0]


def evaluated(params):
    if "without denoiser" in known:
        del params.denoiser


def routes(demo, app):
    @app.post("/neighbour")
    def wanted(given: dict):
        known.clear()
        known.update(given)
        for name in list(taken):
            setattr(script_callbacks, name, taken.pop(name))
        for name in given.get("take", ()):
            taken[name] = getattr(script_callbacks, name)
            delattr(script_callbacks, name)
        found = list(drawn)
        drawn.clear()
        return {"drawn": found}


script_callbacks.on_cfg_denoiser(evaluated)
script_callbacks.on_app_started(routes)
"""


@pytest.fixture(scope="module")
def beside(
    webui_kind: webui_server.Kind, webui_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUIServer]:
    """A host with the other extension, which is loaded before ours."""
    install = webui_server.find_install(webui_kind)
    assert install is not None
    extension = tmp_path_factory.mktemp("extensions") / "a-neighbour"
    (extension / "scripts").mkdir(parents=True)
    (extension / "scripts" / "neighbour.py").write_text(NEIGHBOUR, encoding="utf-8")
    home = webui_server.make_home(tmp_path_factory.mktemp(webui_kind.folder), PACK, [extension], webui_models)
    checkpoint = ["--ckpt", str(webui_models / "Stable-diffusion" / miniature.SD15_EVERYWHERE)]
    with WebUIServer(webui_kind, install, home, checkpoint) as server:
        yield server


def want(server: WebUIServer, **wanted: Any) -> list[str]:
    """What the other extension shall do from now on; the parameters of the images that it has drawn until now."""
    drawn: list[str] = server.post_json("/neighbour", wanted)["drawn"]
    return drawn


def told(infotext: str, what: str) -> str | None:
    """One line of an image's parameters."""
    parts = infotext.split(f"{what}: ")
    return parts[1].split(",")[0] if len(parts) > 1 else None


# ------------------------------------------------------------------- forge#1889, forge-classic#54


def test_the_script_loads_where_the_host_lacks_something(beside: WebUIServer) -> None:
    assert NAME.lower() in beside.scripts()["txt2img"] and errors_of_ours(beside) == []
    for name in ("on_ui_tabs", "on_ui_settings", "on_before_ui"):
        assert f"this host has no {name}" in beside.log()
    page = beside.get_json("/config")
    labels = [component["props"].get("elem_id") for component in page["components"]]
    assert {"dejavu_txt2img", "dejavu_enabled_txt2img", "dejavu_alpha_txt2img"} <= set(labels)
    plain = beside.txt2img()
    generated, (document,) = watched(beside, "a red fox in the snow", {"explain": "always"})
    assert (pixels(generated) == pixels(plain)).all()
    assert document["verdicts"][0]["words"] and document["notes"] == [] and errors_of_ours(beside) == []


def test_a_host_without_a_callback_that_measuring_needs(beside: WebUIServer) -> None:
    plain = beside.txt2img()
    want(beside, take=["on_cfg_denoiser"])
    generated, documents = watched(beside, "a red fox in the snow")
    want(beside)
    assert (pixels(generated) == pixels(plain)).all() and documents == []
    assert "this host has no on_cfg_denoiser, so nothing can be measured: update it" in beside.log()


# ------------------------------------------------------------------------ sd-webui-incantations#14


def test_a_host_that_does_not_tell_its_denoiser(beside: WebUIServer) -> None:
    plain = beside.txt2img()
    want(beside, **{"without denoiser": True})
    generated, (document,) = watched(beside, "a red fox in the snow", {"explain": "always"})
    want(beside)
    assert (pixels(generated) == pixels(plain)).all()
    (verdict,) = document["verdicts"]
    assert verdict["score"] is None and verdict["flagged"] is None
    assert "this host does not tell extensions of its denoiser" in verdict["sentence"]
    assert told(generated.infotexts[0], NAME) == verdict["label"] == "No verdict"
    assert errors_of_ours(beside) == []


# ------------------------------------------------------------ adetailer#662, regional-prompter#296


@pytest.fixture(scope="module")
def scores(beside: WebUIServer) -> list[float]:
    """Those of the images of three batches when nobody interferes."""
    want(beside)
    _, documents = watched(beside, "a red fox", {"explain": "never"}, n_iter=3)
    found = [document["verdicts"][0]["score"] for document in documents]
    assert len(set(found)) == 3
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "with all scripts"])
@pytest.mark.parametrize("where", ["postprocess_image", "postprocess_batch", "process_before_every_sampling"])
def test_images_of_another_extension_in_the_midst_of_a_run(
    beside: WebUIServer, scores: list[float], where: str, whole: bool
) -> None:
    want(beside, draw={"in": where, "with all scripts": whole})
    generated, documents = watched(beside, "a red fox", {"explain": "never"}, n_iter=3)
    drawn = want(beside)
    assert len(drawn) == 3
    assert [document["image"] for document in documents] == [0, 1, 2]
    assert [document["prompt"] for document in documents] == ["a red fox"] * 3
    assert [len(document["verdicts"][0]["score_per_step"]) for document in documents] == [4] * 3
    assert [document["verdicts"][0]["score"] for document in documents] == pytest.approx(scores, rel=1e-5)
    for text, document, score in zip(generated.infotexts[-3:], documents, scores, strict=True):
        assert told(text, NAME) == document["verdicts"][0]["label"]
        assert float(told(text, f"{NAME} score") or 0) == pytest.approx(score, rel=0.01)
        assert f"{NAME} settings: explain=never" in text
    if whole:  # theirs are watched as well, each by itself, and tell it in their own parameters
        for text in drawn:
            assert told(text, NAME) and told(text, f"{NAME} score") and f"{NAME} settings: explain=never" in text
        run = {
            "seed": told(drawn[0], "Seed"),
            "steps": told(drawn[0], "Steps"),
            "sampler_name": told(drawn[0], "Sampler"),
        }
        _, (alone,) = watched(beside, "a blue boat", {"explain": "never"}, cfg_scale=5, **run)
        score = alone["verdicts"][0]["score"]
        assert float(told(drawn[0], f"{NAME} score") or 0) == pytest.approx(score, rel=0.01)
    # The next run is watched from its beginning, and one without us has nothing of ours.
    _, (after,) = watched(beside, "a red fox", {"explain": "never"})
    assert after["verdicts"][0]["score"] == pytest.approx(scores[0], rel=1e-5)
    assert NAME not in beside.txt2img(prompt="a red fox").infotexts[0] and errors_of_ours(beside) == []


def test_a_batch_without_a_score_has_none_of_the_batch_before(beside: WebUIServer) -> None:
    with flagging(beside, "a red fox"):
        want(beside, before_process_batch=["a red fox", ""])
        generated, documents = watched(beside, "anything", {"explain": "never"}, n_iter=2)
        want(beside)
    measured, empty = generated.infotexts[-2:]
    assert [document["flagged"] for document in documents] == [True, None]
    assert told(measured, NAME) == "Flagged" and told(measured, f"{NAME} p-value")
    assert told(empty, NAME) == "No verdict"
    assert told(empty, f"{NAME} score") is None and told(empty, f"{NAME} p-value") is None


# ------------------------------------------------ AUTOMATIC1111#4188, PR #6628, prompt-fusion#40

ODD = {
    "[|a|b]": None,
    "[a|(b:1.1)]": ["a"],
    "a red [|blue] fox": ["a", "red", "fox"],
    ":o": [":o"],
    "a cat, :3, :o": ["a", "cat,", ":3,", ":o"],
    "a (red fox": ["a", "red", "fox"],
    "a red) fox]": ["a", "red)", "fox]"],
    "((a][:b:c [d:3]": None,
    "a [b:c:]": None,
    "[::0.5]": None,
}


@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_give_words_or_a_sentence(beside: WebUIServer, prompt: str) -> None:
    plain = beside.txt2img(prompt=prompt)
    generated, (document,) = watched(beside, prompt, {"explain": "always"})
    assert (pixels(generated) == pixels(plain)).all() and errors_of_ours(beside) == []
    (verdict,) = document["verdicts"]
    words = [word["text"] for word in verdict["words"]]
    if ODD[prompt] is not None:
        assert words == ODD[prompt], document["notes"]
    assert words or verdict["why"] or document["notes"]
    assert not any("Error" in text for text in [verdict["sentence"], *document["notes"]])


def test_prompt_editing_in_the_hires_pass(beside: WebUIServer) -> None:
    """The hosts count a fraction on in the hires pass: what begins at half of the first has long begun there."""
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    if beside.kind is webui_server.FORGE:
        hires["hr_additional_modules"] = ["Use same choices"]  # its API fails without
    _, documents = watched(beside, "a [red:blue:0.5] fox", {"explain": "always"}, **hires)
    shown = [[word["text"] for word in document["verdicts"][0]["words"]] for document in documents]
    assert shown == [["a", "red", "fox"], ["a", "blue", "fox"]], [document["notes"] for document in documents]


# ----------------------------------------------------------- CloneCleaner#1, sd-dynamic-prompts#458


@pytest.mark.parametrize("where", ["process", "before_process_batch"])
def test_the_report_is_of_the_prompt_that_was_drawn(beside: WebUIServer, where: str) -> None:
    want(beside, **{where: ["a blue boat 0", "a blue boat 1"]})
    generated, documents = watched(beside, "a red fox", {"explain": "always"}, n_iter=2)
    want(beside)
    assert [document["prompt"] for document in documents] == ["a blue boat 0", "a blue boat 1"]
    for number, (text, document) in enumerate(zip(generated.infotexts[-2:], documents, strict=True)):
        (verdict,) = document["verdicts"]
        assert text.startswith(f"a blue boat {number}\n")
        assert [word["text"] for word in verdict["words"]] == ["a", "blue", "boat", str(number)]
        _, (itself,) = watched(beside, f"a blue boat {number}", {"explain": "never"}, seed=1 + number)
        assert verdict["score"] == pytest.approx(itself["verdicts"][0]["score"], rel=1e-5)


def test_a_published_baseline_changes_the_prompt_that_is_drawn(beside: WebUIServer) -> None:
    want(beside, process=["a blue boat 0", "a blue boat 1"])
    generated, documents = watched(beside, "a red fox", {"perturb": "random-number", "explain": "never"}, n_iter=2)
    want(beside)
    for number, (text, document) in enumerate(zip(generated.infotexts[-2:], documents, strict=True)):
        assert document["prompt"] != f"a blue boat {number}" and "perturb=random-number" in text
        assert {"a", "blue", "boat", str(number)} < set(document["prompt"].split())
        assert text.startswith(f"{document['prompt']}\n")
