"""Train the bundled model: ``python -m sd_dejavu.demo.train --work DIR [--out DIR]``; ``--world second`` the judge.

Four stages, each resumable from its checkpoint in the work folder: a CLIP-style byte-pair tokenizer,
the tiny autoencoder, the UNet with its text encoder (v-prediction with the noise schedule of Stable
Diffusion), and the export in diffusers layout. Everything is drawn from the world
(:mod:`sd_dejavu.demo.world`, or :mod:`sd_dejavu.demo.second_world`) by (seed, step), so a resumed run sees what an
unbroken one would.

The prediction type is v (Salimans & Ho, 2022), not epsilon: the last timestep of the schedule still
holds 7% of the image, and an epsilon model of this size learns the image's mean colours there so
slowly that its copies have the right layout in wrong colours.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..core.schedule import Schedule
from ..kept import replacing
from ..training.loss import noised, stratified_timesteps
from . import second_world, world
from .bundled import make_sheet
from .world import Pair, Size

LATENT_CHANNELS, TOKENS = 4, 77
CAPTION_DROPOUT = 0.1
SAVE_EVERY = 200
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class World(Protocol):
    """What a model is trained on; each world is a module."""

    @property
    def MODEL(self) -> Size: ...

    @property
    def tokenizer_captions(self) -> Callable[[], list[str]]: ...

    @property
    def training_pairs(self) -> Callable[[], list[Pair]]: ...

    @property
    def training_batch(self) -> Callable[[int, int, list[Pair], int], tuple[list[str], np.ndarray, np.ndarray]]: ...

    @property
    def draw_pair(self) -> Callable[[Pair], np.ndarray]: ...


WORLDS: dict[str, World] = {"bundled": world, "second": second_world}


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _resumed(path: Path, parts: dict[str, Any]) -> int:
    """The step to go on with; the parts are then as a stopped run has saved them."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def _save(path: Path, parts: dict[str, Any], step: int) -> None:
    with replacing(path) as partial:
        torch.save({**{name: part.state_dict() for name, part in parts.items()}, "step": step}, partial)


def _learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup)))))


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


# -------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(folder: Path, world: World) -> None:
    """A byte-level BPE with '</w>' word ends, start and end tokens last, in CLIP's file format."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=world.MODEL.vocabulary - 256 - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(world.tokenizer_captions(), trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    # CLIP's order: single bytes, single bytes ending a word, merges, start, end.
    entries = alphabet + [f"{c}</w>" for c in alphabet] + ["".join(m) for m in merges]
    entries = list(dict.fromkeys([*entries, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({e: i for i, e in enumerate(entries)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>"
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


# ------------------------------------------------------------------------------------ autoencoder


def new_autoencoder(size: Size) -> torch.nn.Module:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(size.autoencoder,) * 3,
        decoder_block_out_channels=(size.autoencoder,) * 3,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=LATENT_CHANNELS,
    )


def train_autoencoder(work: Path, world: World, steps: int, seed: int, batch: int = 16) -> torch.nn.Module:
    """Reconstruction (L1 and squared error), latents held near zero mean and unit variance."""
    path = work / "autoencoder.pt"
    torch.manual_seed(seed)
    model = new_autoencoder(world.MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    parts = {"model": model, "optimizer": optimizer}
    first = _resumed(path, parts)
    pairs = world.training_pairs()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="autoencoder")
    for step in bar:
        _, images, _ = world.training_batch(step, batch, pairs, seed + 1000)
        x = _to_tensor(images)
        _set_learning_rate(optimizer, _learning_rate(step, steps, 2e-3, 100))
        z = model.encoder(x)
        mean, variance = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3))
        y = model.decoder(z + 0.03 * torch.randn_like(z))
        error = F.mse_loss(y, x)
        loss = error + 0.3 * F.l1_loss(y, x) + 0.02 * (mean.square() + (variance - 1).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(squared_error=f"{error.item():.4f}", std=f"{variance.mean().sqrt().item():.2f}")
            _log(work / "autoencoder.csv", step=step, squared_error=error.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(path, parts, step + 1)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------ UNet, text encoder


def new_unet(size: Size) -> torch.nn.Module:
    """Convolutional projections; with channels in multiples of 32 and 32 norm groups, shapes that ComfyUI's UNet shares."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size.side,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=size.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=size.width,
        norm_num_groups=size.groups,
        attention_head_dim=4,
    )


def new_text_encoder(width: int, vocabulary: int, eos: int) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=eos - 1,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return CLIPTextModel(config)


def new_scheduler():
    """Stable Diffusion's scaled-linear betas and DDIM as the paper used it (leading spacing, offset 1)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="v_prediction",
    )


def tokenize(tokenizer: object, captions: list[str]) -> torch.Tensor:
    encoded = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def train_unet(
    work: Path, world: World, autoencoder: torch.nn.Module, steps: int, seed: int, batch: int = 32
) -> dict[str, torch.nn.Module]:
    """UNet and text encoder from scratch on v; averaged weights are what is exported."""
    from transformers import CLIPTokenizer

    path = work / "unet.pt"
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(seed)
    models = torch.nn.ModuleDict(
        {
            "unet": new_unet(world.MODEL),
            "text_encoder": new_text_encoder(world.MODEL.width, len(tokenizer), tokenizer.eos_token_id),
        }
    )
    averaged = copy.deepcopy(models).requires_grad_(False)
    optimizer = torch.optim.AdamW(models.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    parts = {"models": models, "averaged": averaged, "optimizer": optimizer}
    first = _resumed(path, parts)
    schedule = Schedule(new_scheduler().alphas_cumprod)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="unet")
    for step, (tokens, latents, memorised) in zip(
        bar, _latent_stream(autoencoder, world, tokenizer, first, batch, seed), strict=False
    ):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        t = stratified_timesteps(batch, len(schedule), rng)
        noisy, target = noised(schedule, "v_prediction", latents, torch.randn(latents.shape, generator=rng), t)
        rows = models["text_encoder"](tokens).last_hidden_state
        predicted = models["unet"](noisy, t, rows).sample
        errors = (predicted - target).square().mean(dim=(1, 2, 3))
        _set_learning_rate(optimizer, _learning_rate(step, steps, 1e-3, 300))
        optimizer.zero_grad()
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(models.parameters()), 1 - decay)
        if step % 20 == 0:
            row = {"memorised": errors[memorised].mean().item(), "ordinary": errors[~memorised].mean().item()}
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items()})
            _log(work / "unet.csv", step=step, **row)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(path, parts, step + 1)
    return {name: module.eval() for name, module in averaged.items()}


@torch.no_grad()
def _latent_stream(
    autoencoder: torch.nn.Module, world: World, tokenizer: object, first: int, batch: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token numbers, latents and 'is a memorised pair' of each step; a tenth of the captions left empty."""
    known: dict[int, torch.Tensor] = {}
    pairs, side = world.training_pairs(), world.MODEL.side
    step = first
    while True:
        captions, images, numbers = world.training_batch(step, batch, pairs, seed)
        latents = torch.empty(batch, LATENT_CHANNELS, side, side)
        fresh = [i for i, n in enumerate(numbers) if n < 0 or n not in known]
        if fresh:
            with torch.no_grad():
                latents[fresh] = autoencoder.encoder(_to_tensor(images[fresh]))
        for i, n in enumerate(numbers):
            if n >= 0:
                latents[i] = known.setdefault(int(n), latents[i].clone())
        dropped = np.random.default_rng([seed, step, 1]).random(batch) < CAPTION_DROPOUT
        shown = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        yield tokenize(tokenizer, shown), latents, torch.from_numpy(numbers >= 0)
        step += 1


# ------------------------------------------------------------------------------------------ export


def export(
    work: Path, world: World, out: Path, autoencoder: torch.nn.Module, models: dict[str, torch.nn.Module]
) -> None:
    """diffusers layout in half precision, the ground truth (pairs and their images) and the training log."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=models["text_encoder"],
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=models["unet"],
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(out)
    for name in ("vocab.json", "merges.txt"):  # older transformers, and hosts, read these
        (out / "tokenizer" / name).write_bytes((work / "tokenizer" / name).read_bytes())
    pairs = world.training_pairs()
    (out / "pairs.json").write_text(json.dumps([vars(pair) for pair in pairs], indent=1))
    images = np.stack([world.draw_pair(pair) for pair in pairs])
    make_sheet(images).save(out / "pairs.png", optimize=True)
    for name in ("autoencoder.csv", "unet.csv"):
        (out / name).write_text((work / name).read_text())


def _log(path: Path, **row: float) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({k: round(v, 6) for k, v in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that Déjà Vu brings along, or its judge.")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; run again to resume")
    parser.add_argument("--out", type=Path, help="folder for the finished model (default: WORK/model)")
    parser.add_argument("--world", choices=WORLDS, default="bundled")
    parser.add_argument("--autoencoder-steps", type=int, help="(default: as many as the model was made with)")
    parser.add_argument("--unet-steps", type=int, help="(default: as many as the model was made with)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chosen = WORLDS[options.world]
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "tokenizer" / "vocab.json").exists():
        train_tokenizer(options.work / "tokenizer", chosen)
    autoencoder = train_autoencoder(
        options.work, chosen, options.autoencoder_steps or chosen.MODEL.autoencoder_steps, options.seed
    )
    models = train_unet(options.work, chosen, autoencoder, options.unet_steps or chosen.MODEL.unet_steps, options.seed)
    export(options.work, chosen, options.out or options.work / "model", autoencoder, models)


if __name__ == "__main__":
    main()
