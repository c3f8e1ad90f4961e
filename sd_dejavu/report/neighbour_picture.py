"""A picture beside its nearest training pictures, with what is known of them below. For hosts that pass images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..reference.nearest import Answer
from ..reference.reference_set import ReferenceSet
from .picture import Pixels

SIDE, GAP, SIZE, LINE = 256, 16, 16, 22
_INK, _COPY = (24, 24, 28), (170, 60, 0)


def neighbour_picture(query: Pixels, reference: ReferenceSet, answer: Answer) -> Pixels:
    """uint8 [H, W, 3]: the query [H, W, 3] first, then its neighbours, nearest first; equal sizes for equal counts."""
    tiles = [Image.fromarray(query), *(_thumbnail(reference, index) for index in answer.indices)]
    texts = [_of_query(answer), *(_of_neighbour(answer, number) for number in range(len(answer.neighbours)))]
    font = ImageFont.load_default(SIZE)
    lines = max(len(text) for text in texts)
    width = GAP + len(tiles) * (SIDE + GAP)
    picture = Image.new("RGB", (width, 2 * GAP + SIDE + lines * LINE + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        left = GAP + number * (SIDE + GAP)
        fitted = _fitted(tile)
        picture.paste(fitted, (left + (SIDE - fitted.width) // 2, GAP + (SIDE - fitted.height) // 2))
        colour = _COPY if answer.copy and number <= 1 else _INK
        for place, line in enumerate(text):
            top = 2 * GAP + SIDE + place * LINE
            draw.text((left, top), _cut(line, font), fill=colour if place == 0 else _INK, font=font)
    return np.asarray(picture).copy()


def _of_query(answer: Answer) -> list[str]:
    heading = {True: "A copy", False: "No copy found", None: "This picture"}[answer.copy]
    limit = "no threshold" if answer.threshold is None else f"a copy from {answer.threshold:g} on"
    return [heading, answer.features, limit]


def _of_neighbour(answer: Answer, number: int) -> list[str]:
    found = answer.neighbours[number]
    shown = f"shown {found.duplicates} time{'' if found.duplicates == 1 else 's'} an epoch"
    near = "near duplicates not counted" if found.near_duplicates < 0 else f"{found.near_duplicates} near duplicates"
    return [f"similarity {found.similarity:.3f}", shown, near, found.name, found.caption]


def _thumbnail(reference: ReferenceSet, index: int) -> Image.Image:
    with Image.open(io.BytesIO(reference.thumbnails[index]), formats=["JPEG"]) as image:
        return image.convert("RGB")


def _fitted(tile: Image.Image) -> Image.Image:
    """As large as SIDE allows; small pictures keep their hard edges."""
    scale = SIDE / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """With an ellipsis where it is wider than a tile."""
    if font.getlength(line) <= SIDE:
        return line
    while line and font.getlength(line + "…") > SIDE:
        line = line[:-1]
    return line + "…"
