"""Copies of parts, on images whose parts are known, and on images that hold none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_dejavu.demo import bundled, world
from sd_dejavu.demo.reference import bundled_reference
from sd_dejavu.reference.build import from_images
from sd_dejavu.reference.features import Grey, Pixels
from sd_dejavu.reference.images import open_image, to_tensor
from sd_dejavu.reference.parts import ANY_LEVEL, FEWEST, ONE_LEVEL, WHOLE, WINDOWS, Level, PartIndex, part_index

SIDE = 64


class Brightness:
    """Features by hand: the angle is the mean of the image in quarter turns, so s = cos of the difference."""

    name, metric = "by hand", "cosine"

    def __call__(self, images: Tensor) -> Tensor:
        angle = images.mean(dim=(1, 2, 3)) * math.pi / 2
        return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.fixture(scope="module")
def index() -> PartIndex:
    return part_index(bundled_reference(), Grey())


@pytest.fixture(scope="module")
def training() -> Tensor:
    return bundled.training_images()


def strangers(count: int, seed: int) -> Tensor:
    """Scenes of the bundled model's world that it was not trained on, [N, 3, 64, 64]."""
    rng = np.random.default_rng(seed)
    drawn = [world.draw_scene(world.random_scene(rng)) for _ in range(count)]
    return torch.tensor(np.array(drawn)).permute(0, 3, 1, 2).float() / 255


def inside(left: float, top: float, right: float, bottom: float, image: Tensor) -> Tensor:
    x0, y0, x1, y1 = (round(share * SIDE) for share in (left, top, right, bottom))
    return image[..., y0:y1, x0:x1]


def enlarged(part: Tensor) -> Tensor:
    return F.interpolate(part[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]


def test_the_windows() -> None:
    assert WINDOWS[0] == WHOLE
    assert len(set(WINDOWS)) == 14
    assert [sum(right - left == side for left, _, right, _ in WINDOWS) for side in (1, 0.75, 0.5)] == [1, 4, 9]
    assert all(right - left == bottom - top and 0 <= left < right <= 1 for left, top, right, bottom in WINDOWS)


def test_a_level_is_a_split_conformal_threshold() -> None:
    """Of 99 nulls at level 0.02 the second highest: (1 + 1) / 100 is 0.02."""
    nulls = torch.arange(99.0)[torch.randperm(99, generator=torch.Generator().manual_seed(0))]
    level = Level.of(nulls, 0.02)
    assert (level.above, level.chance) == (97.0, pytest.approx(0.02))
    p = [(1 + int((nulls >= score).sum())) / 100 for score in (97.0, 97.5)]
    assert p == [0.03, 0.02]
    assert Level.of(torch.arange(19.0), 0.01) == Level(18.0, 1 / 20)


def test_the_score_is_the_ratio_of_distances_by_hand() -> None:
    """Even images: s is cos of the difference, t(r) that of the nearest other, for all windows alike."""
    steps = [number / 24 for number in range(25)]
    images = torch.stack([torch.full((3, 16, 16), grey) for grey in steps])
    features = Brightness()
    reference = from_images(images, [""] * 25, [str(n) for n in range(25)], features, near_threshold=0.99999)
    greys = [float(to_tensor(open_image(kept)).mean()) for kept in reference.thumbnails]  # as JPEG files hold them
    asked = round(255 * (greys[7] + 0.016)) / 255
    (found,) = part_index(reference, features).search([torch.full((1, 3, 16, 16), asked)])
    turn = math.pi / 2
    same = math.cos((asked - greys[7]) * turn)
    other = max(math.cos((greys[place] - greys[7]) * turn) for place in (6, 8))
    assert found.row == 7
    assert found.similarity == pytest.approx(same, abs=1e-6)
    assert found.score == pytest.approx(math.log((1 - other) / (1 - same)), abs=0.01)
    assert found.copy is None  # no similarity of a copy is established for these


@pytest.mark.parametrize(("left", "top"), [(0, 0), (0.5, 0.25), (0.25, 0.5)])
def test_a_crop_that_was_enlarged_is_found_with_its_place(
    index: PartIndex, training: Tensor, left: float, top: float
) -> None:
    number = 20
    crop = enlarged(inside(left, top, left + 0.5, top + 0.5, training[number]))
    (found,) = index.search([crop[None]])
    assert (found.row, found.copy, found.mirrored) == (number, True, False)
    (known,) = index.against([crop[None]], number)
    assert known.copy is True
    assert found.similarity > 0.95


def test_a_mirrored_image_is_found_and_said_to_be_mirrored(index: PartIndex, training: Tensor) -> None:
    found = index.search([image[None].flip(-1) for image in training])
    right = [one.row == row and bool(one.copy) and one.mirrored for row, one in enumerate(found)]
    assert sum(right) >= 0.9 * len(right)
    for one in (one for one, good in zip(found, right, strict=True) if good):
        left, top, wide, low = one.box
        assert one.of_box == (1 - wide, top, 1 - left, low)  # a part lies on the other side in a mirror


def test_a_quarter_that_was_pasted_is_found_where_it_lies(index: PartIndex, training: Tensor) -> None:
    canvas = strangers(len(training), 5)
    hits = 0
    for row, image in enumerate(training):
        to, of = (row % 3 / 4, row // 3 % 3 / 4), (row // 9 % 3 / 4, row // 2 % 3 / 4)
        inside(*to, to[0] + 0.5, to[1] + 0.5, canvas[row])[:] = inside(*of, of[0] + 0.5, of[1] + 0.5, image)
        (found,) = index.against([canvas[row][None]], row)
        boxes = (found.box, found.of_box)
        hits += bool(found.copy) and boxes == ((*to, to[0] + 0.5, to[1] + 0.5), (*of, of[0] + 0.5, of[1] + 0.5))
    assert hits >= 0.8 * len(training)


def test_images_without_such_parts_are_seldom_called_copies(index: PartIndex) -> None:
    """At a level of 1% more than 6 of 200 come by chance in one of 30 such tests; against one image, of 0.1%, fewer."""
    images = [image[None] for image in strangers(200, 77)]
    assert sum(bool(one.copy) for one in index.search(images)) <= 6
    against = [bool(index.against([image], number % 116)[0].copy) for number, image in enumerate(images)]
    assert sum(against) <= 2
    assert index.of_any.chance <= ANY_LEVEL and index.of_one.chance <= ONE_LEVEL


def test_both_conditions_are_needed(index: PartIndex, training: Tensor) -> None:
    image = [training[3][None].flip(-1)]
    assert index.against(image, 3)[0].copy is True
    assert replace(index, floor=1.01).against(image, 3)[0].copy is False
    assert replace(index, of_one=Level(99.0, 0.001)).against(image, 3)[0].copy is False


def test_an_index_of_some_images_judges_them_as_the_whole_set_does(index: PartIndex, training: Tensor) -> None:
    some = part_index(bundled_reference(), Grey(), rows=[3])  # its background is the whole set, of 116 images
    assert some.numbers == index.numbers
    image = [training[3][None].flip(-1)]
    assert some.against(image, 3) == index.against(image, 3)


def test_near_duplicates_of_the_copied_image_do_not_hide_the_copy(training: Tensor) -> None:
    """Each image twice in the set, once a little brighter: they are copies of each other, and no 'other' images."""
    twice = torch.cat([training[:40], (training[:40] * 0.97 + 0.02).clamp(0, 1)])
    reference = from_images(twice, [""] * 80, [str(n) for n in range(80)], Grey())
    found = part_index(reference, Grey()).search([image[None].flip(-1) for image in training[:40]])
    assert sum(bool(one.copy) and one.row % 40 == row for row, one in enumerate(found)) >= 32


def test_sets_that_parts_are_not_compared_with() -> None:
    images = strangers(FEWEST, 9)
    few = from_images(images[:5], [""] * 5, list("abcde"), Grey())
    with pytest.raises(ValueError, match="a set of 5 images is too small to compare parts with, which needs 20"):
        part_index(few, Grey())
    pixels = from_images(images, [""] * FEWEST, [str(n) for n in range(FEWEST)], Pixels())
    with pytest.raises(ValueError, match="parts are not compared by pixels 32"):
        part_index(pixels, Pixels())
    equal = from_images(images[:1].expand(30, -1, -1, -1), [""] * 30, [str(n) for n in range(30)], Grey())
    with pytest.raises(ValueError, match="0 images that are no copies of each other"):
        part_index(equal, Grey())
