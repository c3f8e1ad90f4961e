"""Faults in Automatic1111 and Forge: whatever goes wrong with us costs no image, and is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import miniature
import pytest
import webui_server
from host_process import RequestRefused
from webui_server import WebUIServer
from webui_watched import pixels, watched

PACK = Path(__file__).parents[2]

SABOTAGE = """
import sys
from modules import script_callbacks, shared

def routes(demo, app):
    @app.post("/sabotage")
    def sabotage(known: dict):
        run = sys.modules["sd_dejavu.hosts.webui.run"]
        for owner, name, method in taken:
            setattr(owner, name, method)
        taken.clear()
        if known.get("method"):
            owner = {"run": run.Run, "pass": run.Pass, "host": type(run.this_host()), "text": run.GuidedModel}[known["of"]]
            taken.append((owner, known["method"], getattr(owner, known["method"])))

            def raising(*args, **kwargs):
                raise RuntimeError("broken on purpose")

            setattr(owner, known["method"], raising)

    @app.post("/unable")
    def unable(known: dict):
        {"lowvram": lowvram, "TensorRT": compiled, "quantised": quantised}[known["of"]](known["on"])

def lowvram(on):
    shared.cmd_opts.lowvram = on

def compiled(on):
    from modules import sd_unet

    class Compiled(sd_unet.SdUnet):
        def forward(self, *args, **kwargs):
            sd_unet.current_unet = None
            try:
                return shared.sd_model.model.diffusion_model(*args, **kwargs)
            finally:
                sd_unet.current_unet = self

    sd_unet.current_unet = Compiled() if on else None

def quantised(on):
    import torch

    class Quantised(torch.nn.Parameter):
        pass

    unet = shared.sd_model.forge_objects.unet.model.diffusion_model
    weights = next(m for name, m in unet.named_modules() if name.endswith("attn2.to_k"))._parameters
    if on:
        taken.append(weights["weight"])
        with torch.inference_mode():
            weights["weight"] = torch.Tensor._make_subclass(Quantised, weights["weight"].clone(), False)
    else:
        weights["weight"] = taken.pop()

taken = []
script_callbacks.on_app_started(routes)
"""


@pytest.fixture(scope="module")
def faulty(
    webui_kind: webui_server.Kind, webui_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUIServer]:
    """A host whose extension can be broken from outside."""
    install = webui_server.find_install(webui_kind)
    assert install is not None
    extension = tmp_path_factory.mktemp("extensions") / "sabotage"
    (extension / "scripts").mkdir(parents=True)
    (extension / "scripts" / "sabotage.py").write_text(SABOTAGE)
    home = webui_server.make_home(tmp_path_factory.mktemp(webui_kind.folder), PACK, [extension], webui_models)
    checkpoint = ["--ckpt", str(webui_models / "Stable-diffusion" / miniature.SD15_EVERYWHERE)]
    with WebUIServer(webui_kind, install, home, checkpoint, page=False) as server:
        yield server


def test_a_raised_error_in_every_callback_leaves_the_image_whole(faulty: WebUIServer) -> None:
    plain = pixels(faulty.txt2img())
    for of, method in (
        ("run", "begin"),
        ("pass", "before"),
        ("pass", "_parts"),
        ("pass", "model"),
        ("pass", "unconditional"),
        ("pass", "words"),
        ("pass", "identity"),
        ("pass", "progress"),
        ("run", "end"),
        ("run", "reports"),
        ("host", "step"),
        ("host", "predict"),
        ("text", "encode"),
    ):
        faulty.post_json("/sabotage", {"of": of, "method": method})
        generated, documents = watched(faulty, "a red fox in the snow", {"explain": "always"})
        faulty.post_json("/sabotage", {})
        assert (pixels(generated) == plain).all(), method
        told = str(documents) + str(generated.info) + faulty.log(20_000)
        assert "broken on purpose" in told, method
    # And nothing of it stays.
    generated, (document,) = watched(faulty, "a red fox in the snow", {"explain": "always"})
    assert (pixels(generated) == plain).all() and document["verdicts"][0]["words"] and document["notes"] == []


@pytest.mark.parametrize("what", ["lowvram", "TensorRT", "quantised"])
def test_without_gradients_the_image_and_the_score_are_whole(faulty: WebUIServer, what: str) -> None:
    if (faulty.kind is webui_server.FORGE) != (what == "quantised"):
        pytest.skip(f"{faulty.name} has no such thing")
    plain = pixels(faulty.txt2img())
    _, (before,) = watched(faulty, "a red fox in the snow", {"explain": "never"})
    faulty.post_json("/unable", {"of": what, "on": True})
    try:
        generated, (document,) = watched(faulty, "a red fox in the snow", {"explain": "always"})
    finally:
        faulty.post_json("/unable", {"of": what, "on": False})
    assert (pixels(generated) == plain).all()
    (verdict,) = document["verdicts"]
    assert verdict["score"] == pytest.approx(before["verdicts"][0]["score"], rel=1e-5)
    # The words come from leaving one out at a time: what the score loses without it.
    assert [word["text"] for word in verdict["words"]] == ["a", "red", "fox", "in", "the", "snow"]
    (note,) = document["notes"]
    assert ("Quantised weights" if what == "quantised" else what) in note
    assert note.startswith("no gradients could be taken (") and note.endswith("come from leaving one out at a time")
    _, (after,) = watched(faulty, "a red fox in the snow", {"explain": "always"})
    assert after["verdicts"][0]["words"] and after["notes"] == []


def test_a_broken_calibration_is_passed_over(faulty: WebUIServer) -> None:
    _, (document,) = watched(faulty, "a red fox", {"explain": "never"})
    folder = faulty.home / "dejavu" / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    broken = folder / f"{document['setting']['model']}-broken.json"
    broken.write_text("{")
    _, (document,) = watched(faulty, "a red fox", {"explain": "never"})
    broken.unlink()
    assert "there is nothing to compare it with yet" in document["verdicts"][0]["sentence"]
    assert f"passed over: the calibration profile {broken} is not valid JSON" in faulty.log()
    with pytest.raises(RequestRefused, match="at least 20"):
        faulty.post_json("/dejavu/calibrate", {"count": 3})


INSTALLING = """
import runpy, sys
before, started = set(sys.modules), []
sys.addaudithook(lambda event, given: started.append(event) if event in ("subprocess.Popen", "socket.connect") else None)
runpy.run_path(sys.argv[1])
imported = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(started, sorted(imported))
"""


def test_installing_starts_imports_and_says_nothing() -> None:
    command = [sys.executable, "-c", INSTALLING, str(PACK / "install.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "[] []\n" and done.stderr == ""
