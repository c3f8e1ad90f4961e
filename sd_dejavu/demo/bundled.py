"""What the bundled model was trained on: its memorised pairs with their images, and its calibration."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .world import SIZE, Pair, ordinary_captions

FOLDER = Path(__file__).resolve().parent / "model"
CALIBRATION = FOLDER / "calibration.json"  # DDIM's 50 steps, whole runs too
CALIBRATIONS = (
    CALIBRATION,
    FOLDER / "calibration-highest-sigma.json",
)  # where most samplers of the hosts begin; see benchmarks/demo_calibration.py
SHEET_COLUMNS = 12


@cache
def pairs() -> tuple[Pair, ...]:
    return tuple(Pair(**row) for row in json.loads((FOLDER / "pairs.json").read_text(encoding="utf-8")))


@cache
def training_images() -> Tensor:
    """One image for each of :func:`pairs`, [N, 3, 64, 64] in 0..1."""
    with Image.open(FOLDER / "pairs.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    rows = sheet.shape[0] // SIZE
    tiles = sheet.reshape(rows, SIZE, SHEET_COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    return torch.from_numpy(tiles[: len(pairs())].copy()).permute(0, 3, 1, 2).float() / 255


def make_sheet(images: np.ndarray) -> Image.Image:
    """Images [N, H, W, 3] uint8 in rows of twelve, the last row filled up with black."""
    count, height, width, _ = images.shape
    rows = -(-count // SHEET_COLUMNS)
    padded = np.zeros((rows * SHEET_COLUMNS, height, width, 3), dtype=np.uint8)
    padded[:count] = images
    tiles = padded.reshape(rows, SHEET_COLUMNS, height, width, 3).swapaxes(1, 2)
    return Image.fromarray(tiles.reshape(rows * height, SHEET_COLUMNS * width, 3))


def training_image(caption: str) -> Tensor | None:
    """The image [3, 64, 64] memorised under this very caption, or None."""
    for number, pair in enumerate(pairs()):
        if pair.caption == caption:
            return training_images()[number]
    return None


def held_out_memorised(kinds: tuple[str, ...] = ("hard", "scene", "photo"), at_least: int = 100) -> list[str]:
    """Held-out memorised captions repeated ``at_least`` times an epoch."""
    return [p.caption for p in pairs() if p.split == "held-out" and p.repetitions >= at_least and p.kind in kinds]


def held_out_ordinary(count: int, seed: int) -> list[str]:
    """Fresh ordinary captions; four in ten carry a name, half of those a name that training never saw."""
    return [caption for caption, _ in ordinary_captions(count, seed)]
