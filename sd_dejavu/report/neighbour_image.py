"""An image beside its nearest training images, with what is known of them below. For hosts that pass images."""

from __future__ import annotations

from PIL import Image

from ..reference.images import open_image
from ..reference.nearest import Answer
from ..reference.parts import PartMatch
from ..reference.reference_set import ReferenceSet
from .image import Pixels
from .tiles import Frame, side_by_side
from .wording import part_heading


def neighbour_image(query: Pixels, reference: ReferenceSet, answer: Answer, part: PartMatch | None = None) -> Pixels:
    """uint8 [H, W, 3]: the query [H, W, 3] first, then its neighbours, nearest first; equal sizes for equal counts.

    Where parts were compared, the image with the likest part comes last, and both parts are framed.
    """
    tiles = [Image.fromarray(query), *(open_image(reference.thumbnails[index]) for index in answer.indices)]
    texts = [_of_query(answer), *(_of_neighbour(answer, number) for number in range(len(answer.neighbours)))]
    frames: list[Frame] = []
    if part is not None:
        frames = [(0, part.box), (len(tiles), part.of_box)]
        tiles.append(open_image(reference.thumbnails[part.row]))
        texts.append(_of_part(part, reference))
    return side_by_side(tiles, texts, 2 if answer.copy else 1 if part is not None and part.copy else 0, frames)


def _of_part(part: PartMatch, reference: ReferenceSet) -> list[str]:
    mirrored = "framed, mirrored" if part.mirrored else "framed"
    return [part_heading(part), f"similarity {part.similarity:.3f}", mirrored, part.name, reference.captions[part.row]]


def _of_query(answer: Answer) -> list[str]:
    heading = {True: "A copy", False: "No copy found", None: "This image"}[answer.copy]
    limit = "no threshold" if answer.threshold is None else f"a copy from {answer.threshold:g} on"
    return [heading, answer.features, limit]


def _of_neighbour(answer: Answer, number: int) -> list[str]:
    found = answer.neighbours[number]
    shown = f"shown {found.duplicates} time{'' if found.duplicates == 1 else 's'} an epoch"
    near = "near duplicates not counted" if found.near_duplicates < 0 else f"{found.near_duplicates} near duplicates"
    return [f"similarity {found.similarity:.3f}", shown, near, found.name, found.caption]
