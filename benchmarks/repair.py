"""Repairs of LoRAs that copy: how many copies go, and what is kept of their style and of what prompts ask for.

Each LoRA of the bundled model is trained here on eight images of its world in two colours of their own, shown 40 times an
epoch, until at least three in four of them come back: a style that the model has not, with copies. It is repaired as the
command does, each way alone in one course. The share of the weights' principal directions, and the ways that are tried,
were chosen on the first LoRA; the second was judged alone. Beside the finding stands whether images of ordinary prompts
show what these ask for: the share of other captions that the base model finds worse for them (a diffusion classifier).

    python benchmarks/repair.py [--json FILE] [--folder DIR] [--seeds 9000 9500]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sd_dejavu.cli.main import main as command
from sd_dejavu.core.caption_following import caption_score
from sd_dejavu.core.conditioning import stack
from sd_dejavu.demo import world
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.training.recovery import drawn

# First image's seed, the colours that stand for black and white, and epochs.
LORAS = (
    (9000, (20, 30, 90), (255, 225, 150), 12),
    (9500, (60, 10, 30), (190, 255, 220), 20),
)
IMAGES, STEPS, GUIDANCE = 8, 12, 2.0
RECIPE = ["--rank", "16", "--learning-rate", "3e-3", "--batch-size", "8", "--filter", "none", "--save-every", "4"]
ASKED, OTHERS, ASKED_SEED = 6, 5, 4321
_LUMA = np.array([0.299, 0.587, 0.114])


def write_set(folder: Path, seed: int, dark: tuple[int, ...], light: tuple[int, ...]) -> None:
    """Images of the world with their grey values between two colours, and their captions."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        caption, scene, _ = world.ordinary(np.random.default_rng(seed + number), "sentence")
        grey = world.draw_scene(scene).astype(float) @ _LUMA / 255
        pixels = np.array(dark) + grey[..., None] * (np.array(light, dtype=float) - np.array(dark))
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")


def follows(lora: Path | None) -> float:
    """The mean caption score, asked of the base model, of images of ordinary captions that a LoRA draws."""
    judge, model = load(), load(lora=None if lora is None else str(lora))
    captions = [caption for caption, _ in world.ordinary_captions(ASKED + OTHERS, ASKED_SEED)]
    asked, others = captions[:ASKED], [judge.encode(caption) for caption in captions[ASKED:]]
    with torch.no_grad():
        given = stack([model.encode(caption) for caption in asked])
        latents = drawn(model, given, model.noise(ASKED_SEED, ASKED), model.sigmas(STEPS)[0])
    return float(
        np.mean([caption_score(judge, z, judge.encode(c), others) for z, c in zip(latents, asked, strict=True)])
    )


def repaired(folder: Path, seed: int, dark: tuple[int, ...], light: tuple[int, ...], epochs: int) -> dict[str, Any]:
    data, out = folder / f"set-{seed}", folder / f"lora-{seed}"
    write_set(data / "40_shown", seed, dark, light)
    assert command(["finetune", "--dataset", str(data), "--out", str(out), *RECIPE, "--epochs", str(epochs)]) == 0
    lora, target, found = out / "lora.safetensors", out / "repaired.safetensors", out / "repair.json"
    target.unlink(missing_ok=True)
    asked = ["--steps", str(STEPS), "--guidance-scale", str(GUIDANCE), "--json", str(found)]
    assert command(["repair", str(lora), "--out", str(target), "--dataset", str(data), *asked]) == 0
    subject = {"before": follows(lora), "after": follows(target)}
    return {"seed": seed, **json.loads(found.read_text(encoding="utf-8")), "follows": subject}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="LoRAs that are not repaired now stay as they stand there")
    parser.add_argument("--folder", type=Path, help="keep what is trained here, and go on with what is there")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[seed for seed, *_ in LORAS], help="LoRAs, by their seeds"
    )
    arguments = parser.parse_args()
    known: list[dict[str, Any]] = []
    if arguments.json and arguments.json.is_file():
        known = json.loads(arguments.json.read_text(encoding="utf-8"))["loras"]
    rows = {row["seed"]: row for row in known}
    result: dict[str, Any] = {"images": IMAGES, "steps": STEPS, "guidance": GUIDANCE, "follows": follows(None)}
    with tempfile.TemporaryDirectory() as folder:
        for lora in LORAS:
            if lora[0] in arguments.seeds:
                rows[lora[0]] = repaired(arguments.folder or Path(folder), *lora)
                print(rows[lora[0]], flush=True)
            if arguments.json:
                result["loras"] = [rows[seed] for seed, *_ in LORAS if seed in rows]
                arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
