"""An image beside its nearest training images, with what is known of them below. For hosts that pass images."""

from __future__ import annotations

from PIL import Image

from ..reference.images import open_image
from ..reference.nearest import Answer
from ..reference.reference_set import ReferenceSet
from .image import Pixels
from .tiles import side_by_side


def neighbour_image(query: Pixels, reference: ReferenceSet, answer: Answer) -> Pixels:
    """uint8 [H, W, 3]: the query [H, W, 3] first, then its neighbours, nearest first; equal sizes for equal counts."""
    tiles = [Image.fromarray(query), *(open_image(reference.thumbnails[index]) for index in answer.indices)]
    texts = [_of_query(answer), *(_of_neighbour(answer, number) for number in range(len(answer.neighbours)))]
    return side_by_side(tiles, texts, marked=2 if answer.copy else 0)


def _of_query(answer: Answer) -> list[str]:
    heading = {True: "A copy", False: "No copy found", None: "This image"}[answer.copy]
    limit = "no threshold" if answer.threshold is None else f"a copy from {answer.threshold:g} on"
    return [heading, answer.features, limit]


def _of_neighbour(answer: Answer, number: int) -> list[str]:
    found = answer.neighbours[number]
    shown = f"shown {found.duplicates} time{'' if found.duplicates == 1 else 's'} an epoch"
    near = "near duplicates not counted" if found.near_duplicates < 0 else f"{found.near_duplicates} near duplicates"
    return [f"similarity {found.similarity:.3f}", shown, near, found.name, found.caption]
