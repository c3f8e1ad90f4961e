"""The harness itself: a real Automatic1111 and a real Forge start, draw, report, keep to their folder and stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from host_process import RequestRefused, git
from test_harness import pixels
from webui_server import Generated, WebUIServer

EXTENSION = """
import gradio as gr
from modules import script_callbacks, scripts

class Script(scripts.Script):
    def title(self):
        return "Telling"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Textbox("nothing")]

    def process(self, p, text):
        p.extra_generation_params["Told"] = text

def routes(demo, app):
    app.add_api_route("/telling", lambda: {"page": demo is not None}, methods=["GET"])

script_callbacks.on_app_started(routes)
"""


def test_starts_and_knows_its_scripts(webui: WebUIServer) -> None:
    assert "x/y/z plot" in webui.scripts()["txt2img"]
    assert "Startup time:" in webui.log() and webui.log(50) == webui.log()[-50:]
    assert 100 < webui.rss_mb() <= webui.rss_mb(peak=True)
    assert b"<html" in webui.get("/")


def test_same_seed_gives_the_same_file(webui: WebUIServer) -> None:
    files = [webui.txt2img(seed=seed).images[0] for seed in (1, 2, 1)]
    assert files[0].startswith(b"\x89PNG")
    assert files[0] == files[2] != files[1]
    assert pixels(files[0]).shape == (64, 64, 3)


def test_image_depends_on_the_prompt(webui: WebUIServer) -> None:
    fox = webui.txt2img()
    river = webui.txt2img(prompt="an old oak under the river")
    assert np.abs(pixels(fox.images[0]) - pixels(river.images[0])).mean() > 1
    assert 20 < pixels(fox.images[0]).mean() < 235 and pixels(fox.images[0]).std() > 10  # nothing overflowed
    assert ((pixels(fox.images[0]) == 0) | (pixels(fox.images[0]) == 255)).mean() < 0.3
    assert "Steps: 4, Sampler: Euler" in fox.infotexts[0]


def test_batches_come_with_an_account_of_each_image(webui: WebUIServer) -> None:
    batch = webui.txt2img(batch_size=2, n_iter=2, seed=5)
    assert len(batch.images) == len(batch.infotexts) == 4
    assert batch.info["all_seeds"] == [5, 6, 7, 8]


def test_image_to_image_keeps_the_image(webui: WebUIServer) -> None:
    start = webui.txt2img(seed=3).images[0]
    near, far = (webui.img2img(start, denoising_strength=strength, steps=20) for strength in (0.05, 0.9))
    differences = [np.abs(pixels(run.images[0]) - pixels(start)).mean() for run in (near, far)]
    assert differences[0] < 10 < differences[1]


def test_settings_change_and_change_back(webui: WebUIServer) -> None:
    before = webui.options()["eta_ancestral"]
    webui.set_options(eta_ancestral=0.5)
    assert webui.options()["eta_ancestral"] == 0.5
    webui.set_options(eta_ancestral=before)


def test_interrupt(webui: WebUIServer) -> None:
    runs: list[Generated] = []
    run = threading.Thread(target=lambda: runs.append(webui.txt2img(steps=150, width=128, height=128)))
    run.start()
    end = time.monotonic() + 120
    while webui.progress()["state"]["sampling_step"] < 2 and time.monotonic() < end:
        time.sleep(0.02)
    webui.interrupt()
    run.join(120)
    assert not run.is_alive() and len(runs) == 1
    assert webui.progress()["state"]["sampling_step"] < 149
    assert pixels(webui.txt2img().images[0]).shape == (64, 64, 3)  # and the next run is not disturbed


def test_bad_request_is_refused(webui: WebUIServer) -> None:
    with pytest.raises(RequestRefused, match="steps") as caught:
        webui.txt2img(steps="many")
    assert caught.value.status == 422


def test_server_of_its_own(start_webui: Callable[..., WebUIServer], tmp_path: Path) -> None:
    sources = {"telling": EXTENSION, "unable": "raise RuntimeError('not on this machine')"}
    folders = [_extension(tmp_path / name, source) for name, source in sources.items()]
    server = start_webui(extensions=folders)
    assert any("unable" in line for line in server.reported_errors())
    assert server.get_json("/telling") == {"page": False}
    assert "sd-dejavu" not in {folder.name for folder in (server.home / "extensions").iterdir()}
    told = server.txt2img(alwayson_scripts={"Telling": {"args": ["all of it"]}})
    assert "Told: all of it" in told.infotexts[0]

    server.stop()
    assert not Path(f"/proc/{server.pid}").exists()
    with pytest.raises(URLError):
        server.options()
    assert git(server.install, "status", "--porcelain") == ""


def _extension(folder: Path, source: str) -> Path:
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / f"{folder.name}.py").write_text(source, encoding="utf-8")
    return folder
