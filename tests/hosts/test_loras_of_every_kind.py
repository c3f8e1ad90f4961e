"""LoRAs of every kind, merged by the command line, draw what ComfyUI draws with the same files.

One process of a real ComfyUI's Python loads the bundled model and each file, by the functions of its LoraLoader, and
leaves what it drew.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.core.sampling import Guidance, sample
from sd_dejavu.hosts.diffusers.load import load

ROOT = Path(__file__).resolve().parents[2]
PROMPT, STEPS, SCALE, STRENGTH = "a red boat beside the moon", 5, 5.0, 0.7
LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KERNEL = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.mlp.fc1"

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


def kinds() -> dict[str, dict[str, Tensor]]:
    """A file of each kind. ComfyUI lets an OFT turn by a strength twice, and divides a DoRA over outputs by the length of
    the weight before it, where the papers and LyCORIS do not: those are tried at full strength, and over inputs."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int, by: float = 0.25) -> Tensor:
        return torch.randn(*shape, generator=rng) * by

    def kohya(module: str, before: str = "lora_unet_", **parts: Tensor) -> dict[str, Tensor]:
        return {f"{before}{module.replace('.', '_')}.{part.replace('__', '.')}": t for part, t in parts.items()}

    def plain(module: str, out: int, into: int, before: str = "lora_unet_") -> dict[str, Tensor]:
        up, down = randn(out, 4), randn(4, into)
        return kohya(module, before, lora_up__weight=up, lora_down__weight=down, alpha=torch.tensor(3.0))

    text = plain(TEXT, 512, 128, "lora_te_")
    linear = plain(LINEAR, 128, 128)
    a = {f"hada_w{n}_a": randn(64, 4, by=0.3) for n in (1, 2)}
    b = {f"hada_w{n}_b": randn(4, 64 * 9, by=0.3) for n in (1, 2)}
    core = {f"hada_w{n}_{x}": randn(4, 64, by=0.4) for n in (1, 2) for x in "ab"}
    core |= {f"hada_t{n}": randn(4, 4, 3, 3, by=0.4) for n in (1, 2)}
    alpha = torch.tensor(2.0)
    narrow = {"lora_down__weight": randn(4, 64, 1, 1, by=0.5), "lora_up__weight": randn(64, 4, 1, 1, by=0.5)}
    none = torch.zeros(())
    attention = f"unet.{LINEAR.replace('.to_k', '.processor.to_k')}"  # the one form of diffusers' that ComfyUI knows
    return {
        "lora": linear | text,
        "convolution": kohya(KERNEL, lora_down__weight=randn(4, 64, 3, 3), lora_up__weight=randn(64, 4, 1, 1)),
        "middle": kohya(KERNEL, lora_mid__weight=randn(4, 4, 3, 3, by=0.5), alpha=alpha, **narrow),
        "diffusers": {f"{attention}_lora.down.weight": randn(4, 128), f"{attention}_lora.up.weight": randn(128, 4)},
        "dora": linear | text | kohya(LINEAR, dora_scale=randn(1, 128).abs() + 1),
        "loha": kohya(KERNEL, alpha=alpha, **a, **b),
        "loha-core": kohya(KERNEL, alpha=alpha, **core),
        "lokr": kohya(LINEAR, lokr_w1=randn(8, 4), lokr_w2=randn(16, 32)),
        "lokr-in-two": kohya(
            LINEAR, lokr_w1=randn(8, 4, by=1), lokr_w2_a=randn(16, 2), lokr_w2_b=randn(2, 32), alpha=alpha
        ),
        "lokr-convolution": kohya(KERNEL, lokr_w1=randn(4, 4), lokr_w2=randn(16, 16, 3, 3)),
        "oft": kohya(LINEAR, oft_blocks=randn(16, 8, 8), alpha=none),
        "boft": kohya(KERNEL, oft_blocks=randn(3, 16, 4, 4), alpha=none),
        "diff": kohya(KERNEL, diff=randn(64, 64, 3, 3, by=0.03), diff_b=randn(64)),
        "partly": linear | plain("not_there", 8, 8),
    }


def strengths() -> dict[str, float]:
    return {name: 1.0 if name in ("oft", "boft") else STRENGTH for name in kinds()}


@pytest.fixture(scope="module")
def folder(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, and what the host drew with them."""
    python = next(p for p in (comfyui / "venv/bin/python", comfyui / "venv/Scripts/python.exe") if p.is_file())
    made = tmp_path_factory.mktemp("lora-files")
    for name, tensors in kinds().items():
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


@pytest.mark.parametrize("kind", kinds())
def test_draws_what_comfyui_draws(kind: str, folder: Path) -> None:
    drawn = torch.load(folder / "drawn.pt")
    model = load(lora=str(folder / f"{kind}.safetensors"), lora_strength=strengths()[kind])
    sigmas = model.sigmas(STEPS)
    guidance = Guidance(model.encode(""), SCALE)
    noise = torch.load(folder / "given.pt")["noise"]
    wanted = sample(model, noise * sigmas[0], sigmas, model.encode(PROMPT), guidance)
    found, plain = (drawn[name] * model._vae.config.scaling_factor for name in (kind, None))
    assert (found - wanted).norm() <= min(2e-3 * wanted.norm(), 0.05 * (found - plain).norm())
