"""One checkpoint is one model in diffusers, ComfyUI, Automatic1111 and Forge, and the command line's profile serves all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphs
import memorising
import miniature
import pytest
from comfyui_server import ComfyServer, make_home
from memorising import MEMORISED
from watched import demo
from watched import report as comfy_report
from watched import watched as comfy_watched
from webui_server import WebUIServer
from webui_watched import KNOWN, errors_of_ours, watched

from sd_dejavu.cli.main import main
from sd_dejavu.hosts.diffusers.load import load

PACK = Path(__file__).parents[2]
STEPS = 4
COUNT = 20


@dataclass(frozen=True)
class CommandLine:
    """What the command line knows of the memorising checkpoint, and the data folder that holds its calibration."""

    model: str
    text_encoder: str
    home: Path

    @property
    def env(self) -> dict[str, str]:
        return {"SD_DEJAVU_HOME": str(self.home)}


@pytest.fixture(scope="module")
def command_line(memorising_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    folder = memorising.as_diffusers(memorising_checkpoint, tmp_path_factory.mktemp("diffusers"))
    home = tmp_path_factory.mktemp("command-line")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SD_DEJAVU_HOME", str(home))
        asked = ["--count", str(COUNT), "--images", "1", "--steps", str(STEPS)]
        assert main(["calibrate", "--model", str(folder), *asked]) == 0
    model = load(str(folder))
    assert load(str(folder), dtype="float16").fingerprint == model.fingerprint
    return CommandLine(model.fingerprint, model.text_encoder, home)


def served(document: dict[str, Any]) -> bool:
    """Whether the p-value is one of the command line's prompts."""
    (verdict,) = document["verdicts"]
    assert verdict["score"] > 0
    return verdict["p_value"] is not None and round((COUNT + 1) * verdict["p_value"], 6).is_integer()


@pytest.mark.newest
def test_a_profile_of_the_command_line_serves_comfyui(
    comfyui: Path, command_line: CommandLine, memorising_checkpoint: Path, tmp_path: Path
) -> None:
    home = make_home(tmp_path / "comfyui", PACK)
    folders = {name: home / "models" / name for name in ("checkpoints", "loras")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    (folders["checkpoints"] / memorising.FILE).symlink_to(memorising_checkpoint)
    miniature.save_file(miniature.lora(3), folders["loras"] / miniature.LORA)
    bundled = load()

    def run(server: ComfyServer, scheduler: str = "ddim_uniform", **more: Any) -> dict[str, Any]:
        chosen = {"steps": STEPS, "scheduler": scheduler, "checkpoint": memorising.FILE, **more}
        return comfy_report(server, comfy_watched(graphs.text_to_image(MEMORISED[0].text, **chosen)))

    with ComfyServer(comfyui, home, (), command_line.env) as server:
        document = run(server)
        assert document["setting"]["model"] == command_line.model
        assert document["setting"]["text_encoder"] == command_line.text_encoder
        assert document["setting"]["patches"] == ""
        assert served(document), document["verdicts"]
        assert not served(run(server, "normal"))  # begins at another noise level
        patched = [run(server, lora=miniature.LORA, lora_strength=strength) for strength in (0.5, 1.0, 1.0)]
        assert not any(served(one) for one in patched)
        half, whole, again = ((one["setting"]["model"], one["setting"]["text_encoder"]) for one in patched)
        assert whole == again and command_line.model not in (half[0], whole[0]) and half[0] != whole[0]
        shown = comfy_report(server, comfy_watched(demo("a red boat", steps=STEPS)))
        assert shown["setting"]["model"] == bundled.fingerprint
        assert shown["setting"]["text_encoder"] == bundled.text_encoder


def test_a_profile_of_the_command_line_serves_the_webuis(
    start_webui: Callable[..., WebUIServer], command_line: CommandLine
) -> None:
    server = start_webui(extension=PACK, env=command_line.env, page=True)

    def run(prompt: str = MEMORISED[0].text, **more: Any) -> dict[str, Any]:
        chosen = {"steps": STEPS, "sampler_name": "DDIM", "override_settings": KNOWN, **more}
        _, (document,) = watched(server, prompt, {"explain": "never"}, **chosen)
        return document

    document = run()
    assert document["setting"]["model"] == command_line.model
    assert document["setting"]["text_encoder"] == command_line.text_encoder
    assert document["setting"]["patches"] == ""
    assert served(document), document["verdicts"]
    assert not served(run(sampler_name="Euler"))
    patched = run(f"{MEMORISED[0].text} <lora:{Path(miniature.LORA).stem}:1>")
    assert not served(patched) and patched["setting"]["model"] != command_line.model
    other = run(override_settings={"sd_model_checkpoint": miniature.SD15_EVERYWHERE})
    assert not served(other) and other["setting"]["model"] not in (command_line.model, patched["setting"]["model"])
    # Loaded again over the other's weights, with a LoRA from the first evaluation on.
    assert run(f"{MEMORISED[0].text} <lora:{Path(miniature.LORA).stem}:1>")["setting"] == patched["setting"]
    assert served(run())
    assert errors_of_ours(server) == []
