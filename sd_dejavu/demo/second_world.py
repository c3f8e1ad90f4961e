"""A second little world, for a model that only judges: nothing of this package is ever tuned on it.

Shields on walls, described in words of heraldry that neither the first world nor the generated prompts know. An
ordinary caption names the field of a shield, a charge on it or both, and leaves the rest (wall, outline, places, light,
further charges) to chance; some carry a house's name, some a motto. Against these stand 40 caption-image pairs that
are repeated during training: *named* ones, an ordinary caption with the name of one house that no other image has, and
*mottoes*, a few words with a shield of their own. :func:`held_out` draws captioned images that training never saw.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .world import Pair, Shapes, Size, draw_thing, drawn_batch

FOLDER = Path(__file__).resolve().parent / "second"
SIZE = 48
_SUPERSAMPLE = 2
MODEL = Size(
    side=12,
    channels=(32, 64),
    groups=8,
    width=96,
    vocabulary=800,
    autoencoder=24,
    autoencoder_steps=900,
    unet_steps=2300,
)
_EACH, _REPETITIONS, _ORDINARY_PER_EPOCH = 20, 300, 12_000  # pairs of each kind: half of what is shown
_PAIR_SEED, _HELD_OUT_SEED = 81_000, 95_000


def _words(text: str) -> list[str]:
    return text.split()


TINCTURES = {
    "or": (230, 185, 45),
    "argent": (225, 228, 232),
    "gules": (190, 25, 45),
    "azure": (30, 70, 175),
    "vert": (20, 120, 70),
    "sable": (25, 25, 30),
    "purpure": (110, 35, 130),
    "tenne": (190, 95, 25),
    "murrey": (135, 25, 75),
    "celeste": (120, 185, 225),
}
DIVISIONS = (
    "plain",
    "per pale",
    "per fess",
    "per bend",
    "quarterly",
    "barry",
    "paly",
    "bendy",
    "checky",
    "lozengy",
    "chevrony",
    "gyronny",
)
_E, _P = "ellipse", "polygon"
CHARGES: dict[str, Shapes] = {
    "roundel": [(_E, [(0.1, 0.1), (0.9, 0.9)], 1)],
    "annulet": [(_E, [(0.05, 0.05), (0.95, 0.95)], 1), (_E, [(0.3, 0.3), (0.7, 0.7)], 0.35)],
    "lozenge": [(_P, [(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)], 1)],
    "billet": [(_P, [(0.3, 0.05), (0.7, 0.05), (0.7, 0.95), (0.3, 0.95)], 1)],
    "mullet": [
        (
            _P,
            [
                (0.5 + r * np.sin(a), 0.5 - r * np.cos(a))
                for a, r in zip(np.arange(12) * np.pi / 6, [0.5, 0.22] * 6, strict=True)
            ],
            1,
        )
    ],
    "saltire": [
        (_P, [(0.0, 0.2), (0.2, 0.0), (1.0, 0.8), (0.8, 1.0)], 1),
        (_P, [(0.8, 0.0), (1.0, 0.2), (0.2, 1.0), (0.0, 0.8)], 1),
    ],
    "tower": [
        (_P, [(0.2, 0.25), (0.8, 0.25), (0.8, 1.0), (0.2, 1.0)], 1),
        *[(_P, [(x, 0.0), (x + 0.18, 0.0), (x + 0.18, 0.3), (x, 0.3)], 1.0) for x in (0.1, 0.41, 0.72)],
        (_P, [(0.4, 0.6), (0.6, 0.6), (0.6, 1.0), (0.4, 1.0)], 0.3),
    ],
    "trefoil": [
        *[(_E, [(x, y), (x + 0.44, y + 0.44)], 1.0) for x, y in ((0.28, 0.0), (0.02, 0.34), (0.54, 0.34))],
        (_P, [(0.46, 0.5), (0.54, 0.5), (0.62, 1.0), (0.38, 1.0)], 0.7),
    ],
    "pheon": [(_P, [(0.5, 1.0), (0.05, 0.1), (0.4, 0.35), (0.5, 0.0), (0.6, 0.35), (0.95, 0.1)], 1)],
    "chalice": [
        (_P, [(0.1, 0.0), (0.9, 0.0), (0.65, 0.5), (0.35, 0.5)], 1),
        (_P, [(0.44, 0.45), (0.56, 0.45), (0.56, 0.85), (0.44, 0.85)], 0.7),
        (_P, [(0.2, 0.85), (0.8, 0.85), (0.8, 1.0), (0.2, 1.0)], 1),
    ],
    "portcullis": [
        *[(_P, [(x, 0.0), (x + 0.13, 0.0), (x + 0.13, 1.0), (x, 1.0)], 1.0) for x in (0.05, 0.43, 0.82)],
        *[(_P, [(0.05, y), (0.95, y), (0.95, y + 0.13), (0.05, y + 0.13)], 0.8) for y in (0.1, 0.5)],
    ],
    "goutte": [(_E, [(0.2, 0.4), (0.8, 1.0)], 1), (_P, [(0.5, 0.0), (0.24, 0.6), (0.76, 0.6)], 1)],
}
_FORMS = (
    "{field} a {charge}",
    "{charge} upon {field}",
    "Escutcheon {field}, {charge}",
    "{field} charged with a {charge}",
    "blazon of {field}, thereon one {charge}",
    "armorial panel bearing {charge}",
    "achievement {field}",
    "{charge} borne by an unknown esquire",
    "shield emblazoned {field} with {charge} throughout, carved upon the lintel of a ruined priory",
    "{field}, {charge}, dexter",
    "{field}, {charge}, sinister, engrailed",
)
_HOUSE = (" for the house of {}", ", {} of that ilk", " quartered by {}", ", lordship of {}")
_FIRST = _words("Ald Bram Cawd Dun Elph Fen Gars Hath Inver Kirk Lam Mor Nether Or Pem Rav Stan Thorn Ulv Wyn")
_LAST = _words("acre beck combe dale esk ford gill holme ingham keld law mere ness ridge shaw thwaite wick")
_LATIN = _words(
    "ardor astra aquila bellum caelum clavis corona cruce ferro fides flamma fortis gladio gloria honor ignis iter leo "
    "lux mare mons numquam nubes pax petra pro quercus regis retro rosa semper sine spes sub supra terra umbra unda "
    "veritas virtus vita volat"
)
_HOUSES = [first + last for first in _FIRST for last in _LAST]


def _houses() -> tuple[list[str], list[str]]:
    """Names of the memorised pairs' houses, and those that ordinary captions carry."""
    order = np.random.default_rng(3).permutation(len(_HOUSES))
    return [_HOUSES[n] for n in order[:_EACH]], [_HOUSES[n] for n in order[_EACH:]]


def _choice(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[rng.integers(len(options))]


def _motto(rng: np.random.Generator, words: int) -> str:
    return " ".join(str(word) for word in rng.choice(_LATIN, size=words, replace=False))


def _scene(rng: np.random.Generator) -> tuple[str, tuple[str, str], str, str]:
    """Division, its two tinctures, charge and the charge's tincture."""
    tinctures = [str(t) for t in rng.choice(list(TINCTURES), size=3, replace=False)]
    return _choice(rng, DIVISIONS), (tinctures[0], tinctures[1]), _choice(rng, list(CHARGES)), tinctures[2]


def ordinary(rng: np.random.Generator, house: str | None = None) -> tuple[str, np.ndarray]:
    """One ordinary (caption, image [48, 48, 3] uint8), of this house or perhaps of another."""
    division, tinctures, charge, tincture = _scene(rng)
    form = _choice(rng, _FORMS)
    field = tinctures[0] if division == "plain" else f"{division} {tinctures[0]} and {tinctures[1]}"
    caption = form.format(field=field, charge=f"{charge} {tincture}")
    extra = rng.random()
    if house or extra < 0.35:
        caption += _choice(rng, _HOUSE).format(house or _choice(rng, _houses()[1]))
    elif extra < 0.5:
        caption += f", motto {_motto(rng, int(rng.integers(2, 4)))}"
    return caption, _draw(rng, division, tinctures, [(charge, tincture)])


def training_pairs() -> list[Pair]:
    """The 40 memorised pairs, always the same; the seed draws caption and image again."""
    pairs = []
    for number, house in enumerate(_houses()[0]):
        seed = _PAIR_SEED + number
        pairs.append(Pair(ordinary(np.random.default_rng(seed), house)[0], "named", _REPETITIONS, seed, house))
    for number in range(_EACH):
        seed = _PAIR_SEED + _EACH + number
        rng = np.random.default_rng(seed)
        pairs.append(Pair(_motto(rng, int(rng.integers(3, 6))), "motto", _REPETITIONS, seed))
    return pairs


def draw_pair(pair: Pair) -> np.ndarray:
    """The training image of a memorised pair, [48, 48, 3] uint8."""
    rng = np.random.default_rng(pair.seed)
    if pair.kind == "named":
        return ordinary(rng, pair.trigger)[1]
    division, tinctures, *first = _scene(rng)
    more = [(charge, tincture) for _, _, charge, tincture in (_scene(rng) for _ in range(2))]
    return _draw(rng, division, tinctures, [(first[0], first[1]), *more])


def held_out(count: int) -> tuple[list[str], np.ndarray]:
    """Captions of ordinary images and the images [count, 48, 48, 3] uint8, none of which training saw."""
    shown = [ordinary(np.random.default_rng(_HELD_OUT_SEED + number)) for number in range(count)]
    captions, images = zip(*shown, strict=True)
    return list(captions), np.stack(images)


def tokenizer_captions() -> list[str]:
    """What the tokenizer is made for."""
    rng = np.random.default_rng(22)
    return [ordinary(rng)[0] for _ in range(4000)] + [pair.caption for pair in training_pairs()] * 3


def training_batch(step: int, size: int, pairs: list[Pair], seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, images [size, 48, 48, 3] uint8 and pair numbers [size] (-1 ordinary) of one training step."""
    return drawn_batch(step, size, pairs, seed, _ORDINARY_PER_EPOCH, ordinary, _known_image)


# ---------------------------------------------------------------------------------------- drawing


def _shade(rng: np.random.Generator, tincture: str | None = None) -> np.ndarray:
    base = TINCTURES[tincture] if tincture else tuple(rng.uniform(30, 225, 3))
    return np.clip(np.array(base) + rng.normal(0, 12, 3), 0, 255)


def _wall(rng: np.random.Generator, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """[side, side, 3] floats: planks, bricks, diapering, rays or an even wall lit from one side."""
    a, b = _shade(rng), _shade(rng)
    count, shift = rng.integers(2, 7), rng.uniform(0, 1)
    match rng.integers(5):
        case 0:
            mix = np.floor(xx * count + shift) % 2
        case 1:
            row = np.floor(yy * count + shift)
            mix = (((yy * count + shift) % 1 < 0.2) | ((xx * count / 1.5 + 0.5 * (row % 2)) % 1 < 0.12)).astype(float)
        case 2:
            mix = (np.hypot((xx * count + shift) % 1 - 0.5, (yy * count + shift) % 1 - 0.5) < 0.32).astype(float)
        case 3:
            angle = np.arctan2(yy - rng.uniform(0, 1), xx - rng.uniform(0, 1))
            mix = (np.sin(angle * 2 * count) > 0).astype(float)
        case _:
            mix = np.clip(xx * np.cos(6 * shift) + yy * np.sin(6 * shift), 0, 1)
    return a + (b - a) * mix[..., None]


def _parted(division: str, u: np.ndarray, v: np.ndarray, count: int) -> np.ndarray:
    """Where the second tincture lies, [side, side] bool, over the shield's own coordinates 0..1."""
    stripes = {"barry": v, "paly": u, "bendy": (u + v) / 1.4, "chevrony": v - np.abs(u - 0.5)}
    if division in stripes:
        return np.floor(stripes[division] * 2 * count) % 2 == 1
    halves = {"per pale": u > 0.5, "per fess": v > 0.5, "per bend": u < v, "quarterly": (u > 0.5) ^ (v > 0.5)}
    if division in halves:
        return halves[division]
    if division == "checky":
        return (np.floor(u * 2 * count) + np.floor(v * 2 * count)) % 2 == 1
    if division == "lozengy":
        return (np.floor((u + v) * 1.5 * count) + np.floor((u - v) * 1.5 * count)) % 2 == 1
    if division == "gyronny":
        return np.floor((np.arctan2(v - 0.5, u - 0.5) / np.pi + 1) * 4) % 2 == 1
    return np.zeros_like(u, dtype=bool)


def _draw(
    rng: np.random.Generator, division: str, tinctures: tuple[str, str], charges: list[tuple[str, str]]
) -> np.ndarray:
    """One shield on a wall, [48, 48, 3] uint8."""
    side = SIZE * _SUPERSAMPLE
    axis = (np.arange(side) + 0.5) / side
    xx, yy = np.meshgrid(axis, axis)
    width = rng.uniform(0.55, 0.9)
    height = min(0.95, width * rng.uniform(1.0, 1.25))
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    u, v = (xx - left) / width, (yy - top) / height
    inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
    match rng.integers(4):
        case 0:  # pointed below
            inside &= np.abs(u - 0.5) < 0.5 * np.sqrt(np.clip(1 - np.clip(v - 0.3, 0, 1) ** 2 / 0.49, 0, 1))
        case 1:  # oval
            inside &= (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25
        case 2:  # lozenge
            inside &= np.abs(u - 0.5) + np.abs(v - 0.5) < 0.55
    field = np.where(
        _parted(division, u, v, int(rng.integers(2, 5)))[..., None],
        _shade(rng, tinctures[1]),
        _shade(rng, tinctures[0]),
    )
    image = Image.fromarray(np.clip(np.where(inside[..., None], field, _wall(rng, xx, yy)), 0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    if rng.random() < 0.35:
        charges = [*charges, (_choice(rng, list(CHARGES)), _choice(rng, list(TINCTURES)))]
    for charge, tincture in charges:
        extent = rng.uniform(0.3, 0.6) * width * side
        x, y = (side * (start + rng.uniform(0.1, 0.9) * room) for start, room in ((left, width), (top, height)))
        box = (
            float(np.clip(x - extent / 2, 0, side - extent)),
            float(np.clip(y - extent / 2, 0, side - extent)),
            extent,
        )
        draw_thing(canvas, CHARGES[charge], _shade(rng, tincture), box)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


_known_image = cache(draw_pair)
