"""The bundled model in ComfyUI computes what it computes in diffusers.

One process of a real ComfyUI's Python loads the model, uses it, and leaves what it made in a file.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_dejavu.core.denoiser import seeded_noise
from sd_dejavu.core.sampling import Guidance, sample
from sd_dejavu.hosts.diffusers.adapter import DiffusersModel
from sd_dejavu.hosts.diffusers.load import load

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "a red boat beside the moon",
    "",
    "A Photo of the CAT, Zor-Bel's 3rd!",
    "a  café\tübung\n日本 🙂 naïve — “quoted” <|endoftext|> x",
    "a red boat, " * 40 + "and the moon",
    " ".join(f"thing{n}" for n in range(75)),
]
WEIGHTED = [
    "a (red:1.3) boat beside the (moon:0.6)",
    "a (boat) of ((gold)) and \\(brackets\\)",
    "(a red boat:1.2) " * 30,
]
LEVELS = (0, 1, 10, 25, 40, 49)  # of 50 steps
GUIDED = {"seed": 3, "steps": 10, "cfg": 5.0}

IN_THE_HOST = """
import sys
host, root, given, made = sys.argv[1:5]
sys.path[:0] = [host]
sys.path.append(root)  # last: the repository's folder of nodes must not hide the host's module
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
import comfy.model_management
import comfy.sample
import comfy.sd
from sd_dejavu.hosts.comfyui.demo import load_demo_model

given = torch.load(given)
with torch.inference_mode():
    model, clip, vae = load_demo_model()
    weights = {part: [p.dtype for p in module.parameters()] for part, module in (
        ("model", model.model), ("clip", clip.cond_stage_model), ("vae", vae.first_stage_model))}

    def encode(prompt):
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

    made_here = {
        "tokens": [[token for chunk in clip.tokenize(p)["l"] for token, _ in chunk] for p in given["prompts"]],
        "rows": [encode(p)[0][0] for p in given["prompts"]],
        "pooled": [encode(p)[0][1]["pooled_output"] for p in given["prompts"]],
        "weighted": [encode(p)[0][0] for p in given["weighted"]],
        "sigmas": model.get_model_object("model_sampling").sigmas,
        "decoded": vae.decode(given["latents"]),
        "encoded": vae.encode(given["images"]),
        "encoded tiled": vae.encode_tiled(given["images"], tile_x=48, tile_y=48, overlap=16),
        "decoded tiled": vae.decode_tiled(given["latents"], tile_x=8, tile_y=8, overlap=2),
    }
    comfy.model_management.load_models_gpu([model])
    made_here["denoised"] = [
        model.model.apply_model(given["x"] * sigma, torch.full((2,), sigma), c_crossattn=rows.expand(2, -1, -1))
        for rows in made_here["rows"] for sigma in given["sigmas"]
    ]
    guided = given["guided"]

    def draw(model, clip):
        def encode(prompt):
            return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

        return comfy.sample.sample(
            model, given["noise"].clone(), guided["steps"], guided["cfg"], "euler", "ddim_uniform",
            encode(given["prompts"][0]), encode(""), torch.zeros_like(given["noise"]), seed=guided["seed"],
        )

    made_here["drawn"] = draw(model, clip)
    patched_model, patched_clip = comfy.sd.load_lora_for_models(model, clip, given["lora"], 1.0, 1.0)
    made_here["patched"] = [len(patched_model.patches), len(patched_clip.patcher.patches)]
    made_here["drawn with lora"] = draw(patched_model, patched_clip)
    made_here["drawn again"] = draw(model, clip)
    made_here["dtypes"] = [str(dtype) for part in ("model", "vae") for dtype in weights[part]]
torch.save(made_here, made)
"""


@pytest.fixture(scope="module")
def reference() -> DiffusersModel:
    return load()


@pytest.fixture(scope="module")
def weighing() -> DiffusersModel:
    return load(prompt_weights=True)


@pytest.fixture(scope="module")
def given(reference: DiffusersModel) -> dict[str, Any]:
    sigmas = reference.sigmas(50)
    return {
        "prompts": PROMPTS,
        "weighted": WEIGHTED,
        "sigmas": [sigmas[level] for level in LEVELS],
        "x": seeded_noise(reference.latent_shape, 1, 2),
        "noise": seeded_noise(reference.latent_shape, 2, 2),
        "latents": seeded_noise(reference.latent_shape, 4, 2) * 1.5,
        "images": torch.rand((2, 64, 64, 3), generator=torch.Generator().manual_seed(5)),
        "guided": GUIDED,
        "lora": _lora(),
    }


def _lora() -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 in the common file layout: one layer of the UNet and one of the text encoder."""
    layers = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (128, 128),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (512, 128),
    }
    lora = {}
    for number, (name, (rows, columns)) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(number)
        lora[f"{name}.lora_up.weight"] = torch.randn((rows, 2), generator=generator) * 0.5
        lora[f"{name}.lora_down.weight"] = torch.randn((2, columns), generator=generator) * 0.5
        lora[f"{name}.alpha"] = torch.tensor(2.0)
    return lora


@pytest.fixture(scope="module")
def host(comfyui: Path, given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = next(p for p in (comfyui / "venv/bin/python", comfyui / "venv/Scripts/python.exe") if p.is_file())
    folder = tmp_path_factory.mktemp("demo-model")
    (folder / "script.py").write_text(IN_THE_HOST, encoding="utf-8")
    torch.save(given, folder / "given.pt")
    command = [python, folder / "script.py", comfyui, ROOT, folder / "given.pt", folder / "made.pt"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "NOT LOADED" not in run.stderr, run.stderr  # what the host says of a LoRA that fits nowhere
    return torch.load(folder / "made.pt")


def test_tokens(reference: DiffusersModel, host: dict[str, Any]) -> None:
    tokenizer, _ = reference._encoders[0]
    for prompt, found in zip(PROMPTS, host["tokens"], strict=True):
        plain = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        chunks = [plain[i : i + 75] for i in range(0, len(plain), 75)] or [[]]
        wanted = []
        for chunk in chunks:
            padding = [tokenizer.pad_token_id] * (75 - len(chunk))
            wanted += [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding]
        assert found == wanted


def test_text_embeddings(reference: DiffusersModel, host: dict[str, Any]) -> None:
    for prompt, found in zip(PROMPTS, host["rows"], strict=True):
        torch.testing.assert_close(found, reference.encode(prompt).rows, rtol=0, atol=1e-4)


def test_pooled_output(reference: DiffusersModel, host: dict[str, Any]) -> None:
    _, encoder = reference._encoders[0]
    for prompt, tokens, found in zip(PROMPTS, host["tokens"], host["pooled"], strict=True):
        with torch.no_grad():
            wanted = encoder(torch.tensor([tokens[:77]])).pooler_output
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4, msg=prompt)


def test_weighted_prompts(weighing: DiffusersModel, host: dict[str, Any]) -> None:
    for prompt, found in zip(WEIGHTED[:2], host["weighted"], strict=False):
        torch.testing.assert_close(found, weighing.encode(prompt).rows, rtol=0, atol=1e-4)
    assert host["weighted"][2].shape == (1, 154, 128) and host["weighted"][2].isfinite().all()


def test_noise_levels(reference: DiffusersModel, host: dict[str, Any]) -> None:
    abar = reference.schedule.alphas_cumprod
    torch.testing.assert_close(host["sigmas"], ((1 - abar) / abar).sqrt(), rtol=1e-4, atol=0)


def test_denoised_predictions(reference: DiffusersModel, given: dict[str, Any], host: dict[str, Any]) -> None:
    found = iter(host["denoised"])
    for prompt in PROMPTS:
        conditioning = reference.encode(prompt)
        for sigma in given["sigmas"]:
            with torch.no_grad():
                wanted = reference(given["x"] * sigma, torch.full((2,), sigma), conditioning)
            assert (next(found) - wanted).norm() <= 1e-4 * wanted.norm(), (prompt, sigma)


def test_autoencoder(reference: DiffusersModel, given: dict[str, Any], host: dict[str, Any]) -> None:
    scale = reference._vae.config.scaling_factor
    wanted = reference.decode(given["latents"] * scale).movedim(1, -1)
    torch.testing.assert_close(host["decoded"], wanted, rtol=0, atol=1e-3)
    with torch.no_grad():
        latents = reference._vae.encode(given["images"].movedim(-1, 1) * 2 - 1).latents
    torch.testing.assert_close(host["encoded"], latents, rtol=0, atol=1e-3)
    assert host["decoded tiled"].shape == wanted.shape and host["encoded tiled"].shape == latents.shape


def test_a_guided_run(reference: DiffusersModel, given: dict[str, Any], host: dict[str, Any]) -> None:
    sigmas = reference.sigmas(GUIDED["steps"])
    guidance = Guidance(reference.encode(""), GUIDED["cfg"])
    wanted = sample(reference, given["noise"] * sigmas[0], sigmas, reference.encode(PROMPTS[0]), guidance)
    found = host["drawn"] * reference._vae.config.scaling_factor  # the host's latents are the autoencoder's
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_a_lora_changes_the_image_and_leaves_the_model(host: dict[str, Any]) -> None:
    assert host["patched"] == [1, 1]
    assert (host["drawn with lora"] - host["drawn"]).norm() > 1e-3 * host["drawn"].norm()
    torch.testing.assert_close(host["drawn again"], host["drawn"])


def test_computes_in_fp32(host: dict[str, Any]) -> None:
    assert set(host["dtypes"]) == {"torch.float32"}
