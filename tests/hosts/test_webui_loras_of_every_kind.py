"""LoRAs of every kind, merged by the command line, score in a run of Automatic1111 and Forge as the hosts merge them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import memorising
import miniature
import numpy as np
import pytest
from host_process import RequestRefused
from lora_kinds import Places, kinds
from safetensors.torch import save_file
from webui_reference_set import reference_set
from webui_server import Kind, WebUIServer
from webui_watched import watched

from sd_dejavu.core.sampling import first_step
from sd_dejavu.hosts.diffusers.load import load

PROMPT, STEPS, SEED, STRENGTH = "a red boat beside the moon", 4, 5, 0.7
AT = Places(
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    320,
    768,
    "down_blocks.0.resnets.0.conv1",
    320,
    "text_model.encoder.layers.1.mlp.fc1",
    3072,
    768,
)
PASSED_OVER = {"forge": ("oft", "boft"), "a1111": ("diffusers",)}  # by the host, as its log says


@dataclass(frozen=True)
class Both:
    """The host with the files among its LoRAs, and the same model for the command line."""

    server: WebUIServer
    files: Path
    model: Path

    def in_the_host(self, tag: str = "") -> float:
        prompt = f"{PROMPT} {tag}".strip()
        chosen = {"steps": STEPS, "seed": SEED, "sampler_name": "DDIM"}
        _, (document,) = watched(self.server, prompt, {"explain": "never"}, **chosen)
        return float(document["verdicts"][0]["score"])

    def on_the_command_line(self, lora: Path | None = None, strength: float = 1.0) -> float:
        model = load(str(self.model), lora=None if lora is None else str(lora), lora_strength=strength)
        noise, sigma = model.noise(SEED, 1), model.sigmas(STEPS)[0]
        return float(first_step(model, [model.encode(PROMPT)], model.encode(""), noise, sigma))


@pytest.fixture(scope="module")
def both(webui: WebUIServer, webui_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    files = webui_models / "Lora" / "kinds"
    files.mkdir()
    for name, tensors in kinds(AT).items():
        save_file(tensors, files / f"kind-{name}.safetensors")
    webui.post_json("/sdapi/v1/refresh-loras", {})
    checkpoint = webui_models / "Stable-diffusion" / miniature.SD15_EVERYWHERE
    yield Both(webui, files, memorising.as_diffusers(checkpoint, tmp_path_factory.mktemp("diffusers")))
    for file in files.iterdir():
        file.unlink()
    files.rmdir()
    webui.post_json("/sdapi/v1/refresh-loras", {})


@pytest.mark.everywhere  # each host merges them by code of its own
@pytest.mark.parametrize("kind", kinds(AT))
def test_a_run_scores_as_the_command_line_does(both: Both, webui_kind: Kind, kind: str) -> None:
    plain = both.in_the_host()
    found = both.in_the_host(f"<lora:kind-{kind}:{STRENGTH}>")
    if kind in PASSED_OVER[webui_kind.folder]:
        assert found == plain
        return
    wanted = both.on_the_command_line(both.files / f"kind-{kind}.safetensors", STRENGTH)
    assert abs(wanted - plain) > 5e-3 * plain and found == pytest.approx(wanted, rel=5e-5)


def test_the_checkpoint_alone_scores_as_on_the_command_line(both: Both) -> None:
    assert both.in_the_host() == pytest.approx(both.on_the_command_line(), rel=5e-5)


def test_a_lora_that_the_host_passes_over_is_no_clean_one(both: Both, webui_kind: Kind, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pairs = [(generator.integers(0, 255, (64, 64, 3)).astype(np.uint8), caption) for caption in ("a red fox", "a boat")]
    asked = {"references": "passed-over", "lora": f"kind-{PASSED_OVER[webui_kind.folder][0]}", "worst": 0}
    asked |= {"width": 64, "height": 64, "nulls": 20, "steps": 4}
    with reference_set(both.server, "passed-over", tmp_path, pairs), pytest.raises(RequestRefused) as refused:
        both.server.post_json("/dejavu/audit", asked, 300)
    assert refused.value.status == 400 and "of a kind that this host passes over" in refused.value.body
