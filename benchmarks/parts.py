"""Copies of parts of training images: how many are found, and how often one is by chance, in two worlds.

Of each training image of a reference set one copy of every kind is made: all of it mirrored; half or three quarters of
its sides enlarged to the whole; a quarter pasted into an image that the set does not hold; all of it, at half the size,
pasted into such an image; and a crop of about four fifths that is none of the windows. All go once through the
autoencoder of the model, which blurs them as it does drawn images. Each is looked for in the whole set, and against its own
training image.

How often an image that holds nothing of a set is said to is a promise over sets, made from each set's own images. So it is
measured over several sets of that size, drawn anew from other images of the world, with yet others of them as strangers;
those that are copies as wholes are left out.

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

FRESH, FRESH_SEED = 1000, 91_000  # images that no training saw
SETS, STRANGERS = 12, 200  # of them, for each set


def as_images(rows: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] in 0..1."""
    return torch.from_numpy(rows.copy()).permute(0, 3, 1, 2).float() / 255


def first_world() -> tuple[Tensor, Tensor]:
    """The training images, and fresh ones."""
    rng = np.random.default_rng(FRESH_SEED)
    drawn = np.stack([world.draw_scene(world.random_scene(rng)) for _ in range(FRESH)])
    return bundled.training_images(), as_images(drawn)


def other_world() -> tuple[Tensor, Tensor]:
    """Its training pairs among as many other images as make up the same number."""
    pairs = as_images(np.stack([second_world.draw_pair(pair) for pair in second_world.training_pairs()]))
    more = len(bundled.pairs()) - len(pairs)
    others = as_images(second_world.held_out(more + FRESH)[1])
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


def row(index: PartIndex, kind: str, images: Tensor) -> dict[str, Any]:
    """The images are copies of the set's, in its order; one is found where the part is one of that very image."""
    found = index.search([image[None] for image in images])
    known = [index.against([image[None]], number)[0] for number, image in enumerate(images)]
    anywhere = sum(bool(one.copy) and one.row == number for number, one in enumerate(found))
    against = sum(bool(one.copy) for one in known)
    return {"kind": kind, "anywhere": counted(anywhere, len(images)), "against one": counted(against, len(images))}


def of_strangers(fresh: Tensor, count: int, model: Any) -> dict[str, Any]:
    """Over sets of ``count`` images, and of each what it promises, on average."""
    drawn = blurred(model, fresh)
    shares, hits, asked, promised = [], [0, 0], 0, [0.0, 0.0]
    for seed in range(SETS):
        order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(seed))
        index = indexed(fresh[order[:count]])
        strangers = drawn[order[count : count + STRANGERS]]
        whole = index.reference.search(Grey()(strangers), 1).similarity[:, 0]
        images = [image[None] for image in strangers[whole < COPY_THRESHOLD]]
        found = index.search(images)
        known = [index.against([image], number % count)[0] for number, image in enumerate(images)]
        wrong = [sum(bool(one.copy) for one in matches) for matches in (found, known)]
        shares.append(wrong[0] / len(images))
        hits, asked = [a + b for a, b in zip(hits, wrong, strict=True)], asked + len(images)
        promised = [a + b.chance / SETS for a, b in zip(promised, (index.of_any, index.of_one), strict=True)]
    ways = dict(zip(("anywhere", "against one"), (counted(one, asked) for one in hits), strict=True))
    levels = dict(zip(ways, promised, strict=True))
    return {"kind": "none", **ways, "levels": levels, "sets": SETS, "highest": max(shares)}


def indexed(images: Tensor) -> PartIndex:
    names = [str(number) for number in range(len(images))]
    return part_index(from_images(images, [""] * len(images), names, Grey()), Grey())


def measured(name: str, training: Tensor, fresh: Tensor, model: Any) -> list[dict[str, Any]]:
    index = indexed(training)
    made = [copies(image, fresh[number], number) for number, image in enumerate(training)]
    rows = [row(index, kind, blurred(model, torch.stack([one[kind] for one in made]))) for kind in made[0]]
    return [{"world": name, **one} for one in (*rows, of_strangers(fresh, len(training), model))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = {"the bundled model's": load(), "a second": load(str(second_world.FOLDER))}
    worlds = {"the bundled model's": first_world, "a second": other_world}
    found = [one for name, drawn in worlds.items() for one in measured(name, *drawn(), models[name])]
    for one in found:
        print(one["world"], one["kind"], one["anywhere"]["share"], one["against one"]["share"], one.get("levels", ""))
    if arguments.json:
        arguments.json.write_text(json.dumps({"features": "grey", "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
