"""LoRAs of every kind, merged by the command line, draw what ComfyUI draws with the same files.

One process of a real ComfyUI's Python loads the bundled model and each file, by the functions of its LoraLoader, and
leaves what it drew.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from lora_kinds import Places, kinds
from safetensors.torch import save_file

from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.core.sampling import Guidance, sample
from sd_dejavu.hosts.diffusers.load import load

ROOT = Path(__file__).resolve().parents[2]
PROMPT, STEPS, SCALE, STRENGTH = "a red boat beside the moon", 5, 5.0, 0.7
AT = Places(
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    128,
    128,
    "down_blocks.0.resnets.0.conv1",
    64,
    "text_model.encoder.layers.1.mlp.fc1",
    512,
    128,
)

IN_THE_HOST = """
import sys
from pathlib import Path
host, root, folder = sys.argv[1:4]
sys.path[:0] = [host]
sys.path.append(root)  # last: the repository's folder of nodes must not hide the host's module
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.sample
import comfy.sd
import comfy.utils
from sd_dejavu.hosts.comfyui.demo import load_demo_model

given = torch.load(Path(folder, "given.pt"))
drawn = {}
with torch.inference_mode():
    model, clip, vae = load_demo_model()
    for file in [None, *sorted(Path(folder).glob("*.safetensors"))]:
        own, text, strength = model, clip, given["strengths"].get(file and file.stem, 1.0)
        if file is not None:
            lora = comfy.utils.load_torch_file(str(file), safe_load=True)
            own, text = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)

        def encode(prompt):
            return text.encode_from_tokens_scheduled(text.tokenize(prompt))

        drawn[file and file.stem] = comfy.sample.sample(
            own, given["noise"].clone(), given["steps"], given["scale"], "euler", "ddim_uniform",
            encode(given["prompt"]), encode(""), torch.zeros_like(given["noise"]), seed=0)
torch.save(drawn, Path(folder, "drawn.pt"))
"""


def strengths() -> dict[str, float]:
    return {name: 1.0 if name in ("oft", "boft") else STRENGTH for name in kinds(AT)}


@pytest.fixture(scope="module")
def folder(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and what the host drew with them."""
    python = next(p for p in (comfyui / "venv/bin/python", comfyui / "venv/Scripts/python.exe") if p.is_file())
    made = tmp_path_factory.mktemp("lora-files")
    for name, tensors in kinds(AT).items():
        save_file(tensors, made / f"{name}.safetensors")
    noise = seeded_noise(load().latent_shape, 2, 1)
    given = {"noise": noise, "prompt": PROMPT, "steps": STEPS, "scale": SCALE, "strengths": strengths()}
    torch.save(given, made / "given.pt")
    (made / "script.py").write_text(IN_THE_HOST, encoding="utf-8")
    command = [python, made / "script.py", comfyui, ROOT, made]
    run = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "ERROR" not in run.stderr, run.stderr  # what the host says of a LoRA that it cannot merge
    assert run.stderr.count("not loaded") == 3, run.stderr  # of the file with a module that is not there
    return made


@pytest.mark.parametrize("kind", kinds(AT))
def test_draws_what_comfyui_draws(kind: str, folder: Path) -> None:
    drawn = torch.load(folder / "drawn.pt")
    model = load(lora=str(folder / f"{kind}.safetensors"), lora_strength=strengths()[kind])
    sigmas = model.sigmas(STEPS)
    guidance = Guidance(model.encode(""), SCALE)
    noise = torch.load(folder / "given.pt")["noise"]
    wanted = sample(model, noise * sigmas[0], sigmas, model.encode(PROMPT), guidance)
    found, plain = (drawn[name] * model._vae.config.scaling_factor for name in (kind, None))
    assert (found - wanted).norm() <= min(2e-3 * wanted.norm(), 0.05 * (found - plain).norm())
