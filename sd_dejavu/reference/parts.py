"""Copies of parts: tiles, crops and mirror images of training images inside another image, and chance's share of them.

Each image is cut into 14 windows: the whole, 4 of three quarters of its sides and 9 of half of them, in steps of a
quarter. All windows p of an image, plain and mirrored, meet all windows r of a training image n; with s the cosine of
their features,

    score(n) = max over p, r of  log (1 - t(r)) / (1 - s(p, r)),     t(r) = max(0, s over windows of other images)

where t is how alike the windows of other training images are to r: an even sky is like every other, and says nothing.
This is the ratio test of Lowe (IJCV 2004), and a form of the score normalisation that Pizzi et al. (CVPR 2022) advise
for SSCD. Whole against whole, not mirrored, is left out: that is the similarity of whole images.

A maximum over 28 x 14 pairs, and over a whole set, is high by chance. So the score has nulls of its own: training
images take the part of the image asked about, against all that are not their copies. A part is called a copy where its
similarity is that of a copy (of whole images, as the features' papers have it) AND its score is above those nulls:

* against any image of the set: above what 99% of training images reach anywhere among the others;
* against one image that is known beforehand, as in an audit: above what 99.9% of pairs of different images reach.

With too few images for that, above all of them; the chance of that is said (split-conformal: 1 / (nulls + 1)). Parts
that training images share with each other raise the nulls, and are no evidence of copying any one of them.

Windows are taken from the thumbnails that a set keeps, and images are reduced to their size before they are cut, so
small parts are seen coarsely. A copy between the windows is seen as far as the features forgive a shift, which
``grey`` hardly does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..core.statistics import spread
from .build import embed, near_threshold_of
from .features import Features
from .images import open_image, to_tensor
from .nearest import copy_threshold
from .reference_set import ReferenceSet

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
BACKGROUND = 256  # images, at even distances, that others are compared with for t and for the nulls
FEWEST, MOST = 20, 10_000  # images of an index
ANY_LEVEL, ONE_LEVEL = 0.01, 0.001
_LEAST_GAP = 1e-4  # of 1 - s: more alike is the same
_AT_ONCE = 1 << 25  # similarities held at a time


def windows() -> tuple[Box, ...]:
    """(left, top, right, bottom) of each window, in shares of the sides; the whole comes first.

    >>> len(windows()), windows()[1]
    (14, (0.0, 0.0, 0.75, 0.75))
    """
    found = [WHOLE]
    for side, steps in ((0.75, 2), (0.5, 3)):
        for row, column in product(range(steps), repeat=2):
            left, top = column / 4, row / 4
            found.append((left, top, left + side, top + side))
    return tuple(found)


WINDOWS = windows()


@dataclass(frozen=True)
class Level:
    """A score must be above ``above`` to be no chance; ``chance`` is the share of unrelated images that are."""

    above: float
    chance: float

    @classmethod
    def of(cls, nulls: Tensor, wanted: float) -> Level:
        """Split-conformal: the score whose p-value (1 + nulls as high) / (nulls + 1) is at most ``wanted``.

        >>> Level.of(torch.arange(199.0), 0.01)
        Level(above=197.0, chance=0.01)
        """
        count = len(nulls)
        rank = max(1, int(wanted * (count + 1) + 1e-9))
        return cls(float(nulls.topk(rank).values[-1]), rank / (count + 1))


@dataclass(frozen=True)
class PartMatch:
    """The part of an image that stands out most, and the part of the training image that it is like.

    ``row`` is that image's place in the reference set. Boxes are (left, top, right, bottom) in shares of the sides, in
    the image as it is; ``mirrored`` says that its part is like the other in a mirror. ``copy`` is None where no
    similarity of a copy is established for the features. ``chance`` is the share of unrelated images called copies.
    """

    row: int
    name: str
    similarity: float
    score: float
    copy: bool | None
    box: Box
    of_box: Box
    mirrored: bool
    chance: float

    def as_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, eq=False)
class PartIndex:
    """Windows of training images. ``rows`` [N, 14, D] are of the images at ``numbers`` in the set, ``others`` [N, 14] is t.

    ``floor`` is the similarity of a copy, None where none is established; ``side`` is that of the thumbnails.
    """

    reference: ReferenceSet
    features: Features
    numbers: tuple[int, ...]
    rows: Tensor
    others: Tensor
    of_any: Level
    of_one: Level
    floor: float | None
    side: int
    batch_size: int = 32
    device: str = "cpu"

    def search(self, images: Sequence[Tensor]) -> list[PartMatch]:
        """For each image [1, 3, H, W] in 0..1 its best match in the whole index."""
        return self._matches(images, range(len(self.numbers)), self.of_any)

    def against(self, images: Sequence[Tensor], row: int) -> list[PartMatch]:
        """The same against the one image at ``row`` of the reference set. Raises ValueError where the index lacks it."""
        return self._matches(images, [self.numbers.index(row)], self.of_one)

    @torch.no_grad()
    def _matches(self, images: Sequence[Tensor], places: Sequence[int], level: Level) -> list[PartMatch]:
        from PIL import Image

        found = []
        for image in images:
            small = Image.fromarray((image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
            small.thumbnail((self.side, self.side))
            both = [to_tensor(small), to_tensor(small).flip(-1)]
            query = _windows_of(self.features, both, self.batch_size, self.device).flatten(0, 1)
            alike = _alike(query[None], self.rows[list(places)])[0]
            scores = _score(alike, self.others[list(places)])
            part, place, of = (int(one) for one in torch.unravel_index(scores.argmax(), scores.shape))
            found.append(self._match(alike, scores, part, place, of, places[place], level))
        return found

    def _match(
        self, alike: Tensor, scores: Tensor, part: int, place: int, of: int, index: int, level: Level
    ) -> PartMatch:
        similarity, score = float(alike[part, place, of]), float(scores[part, place, of])
        number, mirrored = self.numbers[index], part >= len(WINDOWS)
        copy = None if self.floor is None else similarity >= self.floor and score > level.above
        left, top, right, bottom = WINDOWS[part % len(WINDOWS)]
        box = (1 - right, top, 1 - left, bottom) if mirrored else (left, top, right, bottom)
        name = self.reference.names[number]
        return PartMatch(number, name, similarity, score, copy, box, WINDOWS[of], mirrored, level.chance)


@torch.no_grad()
def part_index(
    reference: ReferenceSet,
    features: Features,
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    threshold: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PartIndex:
    """The windows of all images of a set, or of those at ``rows`` and a background; ``features`` made the set.

    ``threshold`` is the similarity of a copy; that of the features' kind, if none is given.
    Raises ValueError with a sentence where the features have no cosine, or the images are too few or too many.
    """
    reference.check(features)
    if why := unfit(reference):
        raise ValueError(why)
    background = spread(range(len(reference)), BACKGROUND)
    numbers = list(range(len(reference))) if rows is None else sorted({*background, *rows})
    if len(numbers) > MOST:
        raise ValueError(
            f"parts are compared with sets of at most {MOST:,} images, and this one has {len(numbers):,}: make a set of "
            "those in question"
        )
    images = [to_tensor(open_image(bytes(reference.thumbnails[number]))) for number in numbers]
    found = []
    for start in range(0, len(images), batch_size):
        found.append(_windows_of(features, images[start : start + batch_size], batch_size, device))
        on_progress(min(start + batch_size, len(images)), len(images))
    plain = torch.cat(found)
    place = {number: at for at, number in enumerate(numbers)}
    asked = [place[number] for number in background]
    mirrors = _windows_of(features, [images[at].flip(-1) for at in asked], batch_size, device)
    floor = copy_threshold(reference.features) if threshold is None else threshold
    near = near_threshold_of(features, reference.near_threshold)
    same = near if floor is None else floor
    others, nulls = _others_and_nulls(torch.cat([plain[asked], mirrors], 1), asked, plain, same, near)
    if len(nulls) < FEWEST:
        raise ValueError(
            f"the set holds {len(nulls)} images that are no copies of each other, and comparing parts needs {FEWEST}"
        )
    return PartIndex(
        reference,
        features,
        tuple(numbers),
        plain,
        others,
        Level.of(torch.stack([one.max() for one in nulls]), ANY_LEVEL),
        Level.of(torch.cat(nulls), ONE_LEVEL),
        floor,
        max(max(image.shape[-2:]) for image in images),
        batch_size,
        device,
    )


def unfit(reference: ReferenceSet) -> str:
    """Why parts cannot be compared with this set; '' where they can."""
    if reference.metric != "cosine":
        return (
            f"parts are not compared by {reference.features}, whose distances are for whole images: build the set with "
            "grey, sscd, clip or dinov2"
        )
    if len(reference) < FEWEST:
        return f"a set of {len(reference)} images is too small to compare parts with, which needs {FEWEST}"
    return ""


def _windows_of(features: Features, images: Sequence[Tensor], batch_size: int, device: str) -> Tensor:
    """[N, 14, D] of images [1, 3, H, W]."""
    cut = (_cut(image, box) for image in images for box in WINDOWS)
    rows = embed(features, cut, batch_size, device)
    return rows.view(len(images), len(WINDOWS), -1)


def _cut(image: Tensor, box: Box) -> Tensor:
    height, width = image.shape[-2:]
    left, top, right, bottom = (round(share * side) for share, side in zip(box, (width, height) * 2, strict=True))
    return image[..., top : max(bottom, top + 1), left : max(right, left + 1)]


def _alike(queries: Tensor, rows: Tensor) -> Tensor:
    """Cosines [B, 28, N, 14]; those of whole with whole, not mirrored, are none."""
    found = torch.einsum("bqd,nwd->bqnw", queries, rows)
    found[:, 0, :, 0] = 0
    return found


def _score(alike: Tensor, others: Tensor) -> Tensor:
    gap: Tensor = torch.log((1 - others).clamp_min(_LEAST_GAP)) - torch.log((1 - alike).clamp_min(_LEAST_GAP))
    return gap


def _others_and_nulls(
    queries: Tensor, asked: Sequence[int], rows: Tensor, same: float, near: float
) -> tuple[Tensor, list[Tensor]]:
    """t [N, 14] over the background ``queries`` [B, 28, D], which lie at ``asked``, and the nulls of each of these.

    Pairs whose wholes are as alike as ``same``, plainly or in a mirror, are copies of each other, and not 'others' for t.
    No nulls are those that would be told as copies of the whole, and near duplicates in a mirror. For the nulls of an image
    t is taken without it, as it would be for an image that is not of the set.
    """
    count = len(rows)
    step = max(1, _AT_ONCE // (queries.shape[1] * count * len(WINDOWS)))
    best, copies, left_out = [], [], []
    for part in queries.split(step):
        found = torch.einsum("bqd,nwd->bqnw", part, rows)
        straight, turned = found[:, 0, :, 0].clone(), found[:, len(WINDOWS), :, 0].clone()
        found[:, 0, :, 0] = 0
        best.append(found.amax(1))
        copies.append(straight.maximum(turned) >= same)
        left_out.append((straight >= same) | (turned >= near))
    alike, copy, no_null = torch.cat(best), torch.cat(copies), torch.cat(left_out)
    itself = (torch.arange(len(asked)), torch.tensor(asked))
    copy[itself] = no_null[itself] = True
    top = alike.masked_fill(copy[..., None], 0).clamp_min(0).topk(2, dim=0)
    nulls = []
    for number in range(len(asked)):
        without = torch.where(top.indices[0] == number, top.values[1], top.values[0])
        scores = _score(alike[number], without)[~no_null[number]]
        if len(scores):
            nulls.append(scores.amax(1))
    return top.values[0], nulls
