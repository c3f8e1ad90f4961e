"""The worst captions of an audit as images: the training image beside those drawn again. For hosts that pass images."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from ..reference.images import open_image
from ..training.audit import Audit, Row
from .audit_rows import ranked, verdict_of
from .image import Pixels
from .tiles import SIDE, Frame, side_by_side
from .wording import number


def audit_images(audit: Audit, thumbnails: Mapping[str, bytes]) -> list[Pixels]:
    """uint8 [H, W, 3] for each row that was drawn, worst first, all of one size; a blank one where none was."""
    drawn = [row for row in ranked(audit) if row.images]
    if not drawn:
        return [side_by_side([Image.new("RGB", (SIDE, SIDE), "white")], [["No caption was drawn"]])]
    return [_of_row(row, audit.counts, thumbnails[row.image]) for row in drawn]


def _of_row(row: Row, counts: str, training: bytes) -> Pixels:
    tiles = [open_image(training), *(open_image(image) for image in row.images)]
    texts = [_told(row, counts), *([f"Drawn again {place}"] for place in range(1, len(tiles)))]
    frames: list[Frame] = []
    if row.part is not None and row.part_drawn is not None:
        frames = [(0, row.part.of_box), (row.part_drawn, row.part.box)]
    return side_by_side(tiles, texts, 1 if row.copies or row.parts or row.flagged else 0, frames)


def _told(row: Row, counts: str) -> list[str]:
    measured = "" if row.score is None else f"{counts} {number(row.score)}, q {row.q_value:.2g}"
    copies = "no threshold" if row.copies is None else f"copies {row.copies} of {row.drawn}"
    copies += f", of a part {row.parts}" if row.parts else ""
    alike = "" if row.similarity is None else f"similarity {row.similarity:.2f}, {copies}"
    return [verdict_of(row), measured, alike, row.image, row.caption]
