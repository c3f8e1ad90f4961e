"""Images side by side with lines of text below each, as one image. For hosts that pass images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .image import Pixels

Frame = tuple[int, tuple[float, float, float, float]]

SIDE, GAP, SIZE, LINE = 256, 16, 16, 22
_INK, _MARKED = (24, 24, 28), (170, 60, 0)


def side_by_side(
    tiles: Sequence[Image.Image], texts: Sequence[Sequence[str]], marked: int = 0, frames: Sequence[Frame] = ()
) -> Pixels:
    """uint8 [H, W, 3]; equal sizes for equal counts of tiles and lines. ``marked`` headings at the left stand out.

    ``frames`` are drawn round parts of tiles: which tile, and the box (left, top, right, bottom) in shares of its sides.
    """
    font = ImageFont.load_default(SIZE)
    lines = max(len(text) for text in texts)
    width = GAP + len(tiles) * (SIDE + GAP)
    image = Image.new("RGB", (width, 2 * GAP + SIDE + lines * LINE + GAP), "white")
    draw = ImageDraw.Draw(image)
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        left = GAP + number * (SIDE + GAP)
        fitted = _fitted(tile)
        corner = (left + (SIDE - fitted.width) // 2, GAP + (SIDE - fitted.height) // 2)
        image.paste(fitted, corner)
        for box in (box for tile_number, box in frames if tile_number == number):
            edges = [
                round(start + share * (side - 1))
                for start, share, side in zip(corner * 2, box, fitted.size * 2, strict=True)
            ]
            draw.rectangle(edges, outline="white", width=5)
            draw.rectangle([edges[0] + 1, edges[1] + 1, edges[2] - 1, edges[3] - 1], outline=_MARKED, width=3)
        for place, line in enumerate(text):
            top = 2 * GAP + SIDE + place * LINE
            heading = _MARKED if number < marked else _INK
            draw.text((left, top), _cut(line, font), fill=heading if place == 0 else _INK, font=font)
    return np.asarray(image).copy()


def _fitted(tile: Image.Image) -> Image.Image:
    """As large as SIDE allows; small images keep their hard edges."""
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
