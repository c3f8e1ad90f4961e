"""Copies of parts of training images: how many are found, and how often one is by chance, in two worlds.

Of each training image of a reference set one copy of every kind is made: all of it mirrored; half or three quarters of
its sides enlarged to the whole; a quarter pasted into an image that the set does not hold; all of it, at half the size,
pasted into such an image; and a crop of about four fifths that is none of the windows. All go once through the
autoencoder of the model, which blurs them as it does drawn images. Strangers are images of the same world that the set does
not hold, treated likewise. Each is looked for in the whole set, and against its own training image (strangers: against one
of the set).

The windows and the score were chosen on the bundled model's world. Nothing was chosen on the second.

    python benchmarks/parts.py [--json benchmarks/results/parts.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_dejavu.core.similarity import COPY_THRESHOLD
from sd_dejavu.core.statistics import wilson
from sd_dejavu.demo import bundled, second_world, world
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.reference.build import from_images
from sd_dejavu.reference.features import Grey
from sd_dejavu.reference.parts import PartIndex, part_index

STRANGERS, STRANGERS_SEED = 400, 91_000


def as_images(rows: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] in 0..1."""
    return torch.from_numpy(rows.copy()).permute(0, 3, 1, 2).float() / 255


def first_world() -> tuple[Tensor, Tensor]:
    """The training images, and strangers."""
    rng = np.random.default_rng(STRANGERS_SEED)
    drawn = np.stack([world.draw_scene(world.random_scene(rng)) for _ in range(STRANGERS)])
    return bundled.training_images(), as_images(drawn)


def other_world() -> tuple[Tensor, Tensor]:
    """Its training pairs among as many other images as make up the same number."""
    pairs = as_images(np.stack([second_world.draw_pair(pair) for pair in second_world.training_pairs()]))
    more = len(bundled.pairs()) - len(pairs)
    others = as_images(second_world.held_out(more + STRANGERS)[1])
    return torch.cat([pairs, others[:more]]), others[more:]


def enlarged(image: Tensor, top: int, left: int, side: int) -> Tensor:
    part = image[None, :, top : top + side, left : left + side]
    return F.interpolate(part, image.shape[-2:], mode="bilinear", align_corners=False)[0]


def pasted(into: Tensor, what: Tensor, top: int, left: int) -> Tensor:
    made = into.clone()
    made[:, top : top + what.shape[1], left : left + what.shape[2]] = what
    return made


def copies(image: Tensor, stranger: Tensor, number: int) -> dict[str, Tensor]:
    """One of each kind, at the places that the number says."""
    side = image.shape[-1]  # of squares
    step, half = side // 4, side // 2
    of, to = (number % 3 * step, number // 3 % 3 * step), (number // 9 % 3 * step, number // 2 % 3 * step)
    quarter = image[:, of[0] : of[0] + half, of[1] : of[1] + half]
    small = F.interpolate(image[None], (half, half), mode="bilinear", antialias=True, align_corners=False)[0]
    return {
        "mirrored": image.flip(-1),
        "half of its sides, enlarged": enlarged(image, *of, half),
        "three quarters, enlarged": enlarged(image, number % 2 * step, number // 2 % 2 * step, side - step),
        "a quarter, pasted": pasted(stranger, quarter, *to),
        "small, pasted": pasted(stranger, small, *to),
        "four fifths, between the windows": enlarged(image, number % 5 + 3, number // 2 % 5 + 3, side * 4 // 5),
    }


@torch.no_grad()
def blurred(model: Any, images: Tensor) -> Tensor:
    return model.decode(model.latents_of(images)).clamp(0, 1)


def counted(hits: int, count: int) -> dict[str, Any]:
    return {"share": hits / count, "interval": wilson(hits / count, count), "count": count}


def row(index: PartIndex, kind: str, images: Tensor, rows: list[int]) -> dict[str, Any]:
    """A copy of a training image is found where the part is one of that very image."""
    found = index.search([image[None] for image in images])
    known = [index.against([image[None]], number)[0] for image, number in zip(images, rows, strict=True)]
    strangers = kind == "none"
    anywhere = sum(bool(one.copy) and (strangers or one.row == number) for one, number in zip(found, rows, strict=True))
    against = sum(bool(one.copy) for one in known)
    return {"kind": kind, "anywhere": counted(anywhere, len(images)), "against one": counted(against, len(images))}


def measured(name: str, training: Tensor, strangers: Tensor, model: Any) -> list[dict[str, Any]]:
    count = len(training)
    reference = from_images(training, [""] * count, [str(number) for number in range(count)], Grey())
    index = part_index(reference, Grey())
    made = [copies(image, strangers[number], number) for number, image in enumerate(training)]
    rows = []
    for kind in made[0]:
        images = blurred(model, torch.stack([one[kind] for one in made]))
        rows.append(row(index, kind, images, list(range(count))))
    drawn = blurred(model, strangers)
    apart = drawn[reference.search(Grey()(drawn), 1).similarity[:, 0] < COPY_THRESHOLD]  # others are copies as wholes
    rows.append(row(index, "none", apart, [number % count for number in range(len(apart))]))
    levels = {"anywhere": index.of_any.chance, "against one": index.of_one.chance}
    return [{"world": name, "levels": levels, **one} for one in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = {"the bundled model's": load(), "a second": load(str(second_world.FOLDER))}
    worlds = {"the bundled model's": first_world, "a second": other_world}
    found = [one for name, drawn in worlds.items() for one in measured(name, *drawn(), models[name])]
    for one in found:
        print(one["world"], one["kind"], one["anywhere"]["share"], one["against one"]["share"], one["levels"])
    if arguments.json:
        arguments.json.write_text(json.dumps({"features": "grey", "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
