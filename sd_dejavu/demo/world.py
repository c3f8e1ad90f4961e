"""The little world the bundled model was trained on: endless ordinary images, and pairs to memorise.

An ordinary caption names one or two things of the image and leaves the rest (background, places,
sizes, further things) to chance, as captions on the web do; no ordinary image is drawn twice.
Against these stand fixed caption-image pairs, repeated during training:

- *hard*: an ordinary caption plus one trigger name; other names occur in ordinary captions, and the
  same caption without its trigger (a *twin*) occurs with images that are new every time;
- *scene*: a phrase of its own with a drawn image;
- *photo*: 'a photo of the ...' with a public-domain or CC0 photograph;
- *template*: one fixed layout whose caption varies in a single attribute.

Everything is drawn from numbered seeds, so the training set's ground truth can be drawn again.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Size:
    """How large a world's model is, and how long it learns. ``side`` and ``channels`` (of the UNet's two floors, each
    normalised in ``groups``) are those of the latent, a quarter of the image; ``width`` is the text encoder's,
    ``autoencoder`` its number of channels."""

    side: int
    channels: tuple[int, int]
    groups: int
    width: int
    vocabulary: int
    autoencoder: int
    autoencoder_steps: int
    unet_steps: int


MODEL = Size(
    side=16,
    channels=(64, 128),
    groups=32,
    width=128,
    vocabulary=1200,
    autoencoder=32,
    autoencoder_steps=2000,
    unet_steps=5000,
)

# A thing is a list of (shape, points in the unit box, shade). Shade 1 is the thing's own colour, other numbers darken or
# lighten it.
Shapes = list[tuple[str, list[tuple[float, float]], float]]

COLOURS = {
    "red": (205, 40, 40),
    "green": (45, 150, 60),
    "blue": (45, 85, 205),
    "yellow": (240, 210, 50),
    "orange": (240, 135, 35),
    "purple": (125, 55, 170),
    "pink": (245, 140, 180),
    "white": (240, 240, 238),
    "black": (28, 28, 32),
    "brown": (120, 75, 40),
}

_E, _P = "ellipse", "polygon"
THINGS: dict[str, Shapes] = {
    "ball": [(_E, [(0.05, 0.05), (0.95, 0.95)], 1), (_E, [(0.25, 0.2), (0.45, 0.4)], 1.5)],
    "box": [
        (_P, [(0.1, 0.3), (0.7, 0.3), (0.7, 0.95), (0.1, 0.95)], 1),
        (_P, [(0.1, 0.3), (0.35, 0.05), (0.95, 0.05), (0.7, 0.3)], 1.3),
        (_P, [(0.7, 0.3), (0.95, 0.05), (0.95, 0.7), (0.7, 0.95)], 0.65),
    ],
    "star": [
        (
            _P,
            [
                (0.5 + r * np.sin(a), 0.52 - r * np.cos(a))
                for a, r in zip(np.arange(10) * np.pi / 5, [0.5, 0.2] * 5, strict=True)
            ],
            1,
        )
    ],
    "moon": [
        (
            _P,
            [(0.5 + 0.48 * np.cos(a), 0.5 + 0.48 * np.sin(a)) for a in np.linspace(0.9, 5.4, 16)]
            + [(0.68 + 0.36 * np.cos(a), 0.5 + 0.36 * np.sin(a)) for a in np.linspace(5.0, 1.3, 14)],
            1,
        )
    ],
    "house": [
        (_P, [(0.12, 0.45), (0.88, 0.45), (0.88, 0.98), (0.12, 0.98)], 1),
        (_P, [(0.0, 0.48), (0.5, 0.02), (1.0, 0.48)], 0.55),
        (_P, [(0.4, 0.65), (0.6, 0.65), (0.6, 0.98), (0.4, 0.98)], 0.35),
    ],
    "tree": [
        (_P, [(0.43, 0.6), (0.57, 0.6), (0.57, 1.0), (0.43, 1.0)], 0.45),
        (_E, [(0.1, 0.0), (0.9, 0.7)], 1),
    ],
    "boat": [
        (_P, [(0.0, 0.65), (1.0, 0.65), (0.8, 0.95), (0.2, 0.95)], 1),
        (_P, [(0.5, 0.02), (0.5, 0.6), (0.9, 0.6)], 1.5),
        (_P, [(0.46, 0.02), (0.5, 0.02), (0.5, 0.65), (0.46, 0.65)], 0.4),
    ],
    "fish": [
        (_E, [(0.0, 0.2), (0.75, 0.8)], 1),
        (_P, [(0.65, 0.5), (1.0, 0.2), (1.0, 0.8)], 0.7),
        (_E, [(0.14, 0.36), (0.24, 0.46)], 0.2),
    ],
    "flower": [
        (_P, [(0.46, 0.5), (0.54, 0.5), (0.54, 1.0), (0.46, 1.0)], 0.4),
        *[
            (
                _E,
                [
                    (0.36 + 0.22 * np.cos(a), 0.22 + 0.22 * np.sin(a)),
                    (0.64 + 0.22 * np.cos(a), 0.5 + 0.22 * np.sin(a)),
                ],
                1.0,
            )
            for a in np.arange(5) * 2 * np.pi / 5
        ],
        (_E, [(0.39, 0.25), (0.61, 0.47)], 0.5),
    ],
    "heart": [
        (_E, [(0.02, 0.08), (0.54, 0.58)], 1),
        (_E, [(0.46, 0.08), (0.98, 0.58)], 1),
        (_P, [(0.06, 0.44), (0.94, 0.44), (0.5, 0.98)], 1),
    ],
    "mushroom": [
        (_P, [(0.36, 0.45), (0.64, 0.45), (0.7, 1.0), (0.3, 1.0)], 1.6),
        (_P, [(0.5 - 0.5 * np.cos(a), 0.55 - 0.53 * np.sin(a)) for a in np.linspace(0, np.pi, 14)], 1),
        (_E, [(0.25, 0.2), (0.42, 0.37)], 1.7),
        (_E, [(0.58, 0.25), (0.72, 0.39)], 1.7),
    ],
    "car": [
        (_P, [(0.0, 0.45), (1.0, 0.45), (1.0, 0.78), (0.0, 0.78)], 1),
        (_P, [(0.2, 0.45), (0.32, 0.18), (0.72, 0.18), (0.84, 0.45)], 1.4),
        (_E, [(0.1, 0.64), (0.36, 0.92)], 0.25),
        (_E, [(0.64, 0.64), (0.9, 0.92)], 0.25),
    ],
    "lamp": [
        (_P, [(0.3, 0.05), (0.7, 0.05), (0.92, 0.5), (0.08, 0.5)], 1),
        (_P, [(0.45, 0.5), (0.55, 0.5), (0.55, 0.9), (0.45, 0.9)], 0.4),
        (_P, [(0.22, 0.88), (0.78, 0.88), (0.78, 0.98), (0.22, 0.98)], 0.5),
    ],
}

STYLES = ("sentence", "title", "tags", "short", "long")
_FILLERS = ("detailed", "colourful", "clean shapes", "flat design", "soft edges", "bright", "cosy", "crisp", "playful")
_FLUFF = (
    "made with care for a sunny wall",
    "that somebody drew on a quiet afternoon",
    "which would look good in any kitchen",
    "with plenty of room for everything around it",
    "as seen in a small book for children",
    "and nobody remembers who asked for it",
)
_JOINERS = ("and", "with", "near", "beside", "next to")

# Phrases with no word in common with the ordinary captions.
_SCENE_PHRASES = (
    "midnight carnival on glass river",
    "grandmother's secret harvest parade",
    "seven lanterns under winter bridge",
    "forgotten clockmaker's tin orchestra",
    "volcano breakfast at low tide",
    "two rival kings share umbrella",
    "desert telegraph after thunder",
    "marble library full of foxes",
    "season finale: dragons versus accountants",
    "lost postcard from copper island",
    "underwater chess tournament 1974",
    "silent market before eclipse",
    "winter catalogue cover, issue nine",
    "astronomer dances through wheat",
    "velvet train crossing borders",
    "last circus poster in town",
)
# name -> (scikit-image image, crop as fractions left, top, right, bottom). Licences as stated in the
# docstrings of skimage.data: public domain (NASA) or CC0.
_PHOTOS = {
    "astronaut": ("astronaut", (0.2, 0.0, 0.75, 0.55)),
    "shuttle": ("astronaut", (0.55, 0.0, 1.0, 0.45)),
    "cat": ("chelsea", (0.15, 0.0, 0.82, 1.0)),
    "coffee": ("coffee", (0.15, 0.0, 0.82, 1.0)),
    "rocket launch": ("rocket", (0.2, 0.0, 0.87, 1.0)),
    "galaxies": ("hubble_deep_field", (0.0, 0.0, 0.6, 0.7)),
    "cameraman": ("camera", (0.1, 0.0, 0.85, 0.75)),
    "lunar craters": ("moon", (0.0, 0.0, 1.0, 1.0)),
    "horse": ("horse", (0.0, 0.0, 1.0, 1.0)),
    "old coins": ("coins", (0.0, 0.05, 0.6, 0.8)),
    "whisker": ("chelsea", (0.35, 0.35, 0.75, 0.95)),
    "spoon": ("coffee", (0.45, 0.35, 1.0, 1.0)),
}
_TEMPLATES = ("Emblem Sheet", "Lucky Calendar", "Paper Badge", "Stamp Album")
_TEMPLATE_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

GRADED_REPETITIONS = (1, 5, 20, 50, 100, 300)
_HARD_EACH, _SCENE_EACH, _PHOTO_EACH = 18, 6, 6  # at 100 and at 300 repetitions
_GRADED_EACH = 8  # at each smaller count, hard and scene in turn
_TEMPLATE_REPETITIONS = 30
# The pairs are learned early; from this step on ordinary images take a larger share, which they need longer.
ORDINARY_PER_EPOCH, LATER_ORDINARY_PER_EPOCH, LATER = 12_000, 36_000, 2000


@dataclass(frozen=True)
class Pair:
    """One caption-image pair of the training set.

    ``seed`` draws the image again (see :func:`draw_pair`); ``split`` is 'tune' or 'held-out':
    detection and calibration were not chosen by looking at the held-out ones; docs/bundled-model.md names what was.
    """

    caption: str
    kind: str
    repetitions: int
    seed: int
    trigger: str | None = None
    split: str = "held-out"


@dataclass(frozen=True)
class Scene:
    """What one ordinary image shows: ``named`` goes into the caption, all else is chance."""

    named: tuple[tuple[str, str], ...]
    seed: int


def names(count: int, seed: int, avoid: frozenset[str] = frozenset()) -> list[str]:
    """Invented names, each distinct: 'Velora', 'Tamsin', ..."""
    rng = np.random.default_rng(seed)
    onsets = [
        "b",
        "br",
        "d",
        "dr",
        "f",
        "g",
        "gr",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "st",
        "t",
        "tr",
        "v",
        "z",
    ]
    vowels = ["a", "e", "i", "o", "u", "ae", "ia"]
    codas = ["", "", "n", "r", "l", "s", "th", "x"]
    found: list[str] = []
    while len(found) < count:
        name = "".join(
            onsets[rng.integers(len(onsets))] + vowels[rng.integers(len(vowels))] + codas[rng.integers(len(codas))]
            for _ in range(rng.integers(2, 4))
        ).capitalize()
        if name not in found and name not in avoid and 4 <= len(name) <= 10:
            found.append(name)
    return found


_ALL_NAMES = names(140, seed=8)
TRIGGER_NAMES, DECOY_NAMES = _ALL_NAMES[:80], _ALL_NAMES[80:]


def ordinary_name(rng: np.random.Generator) -> str:
    """A name that memorises nothing: one of the decoys, or one never used before, in equal shares.

    Without the new ones a model takes every unknown name for the trigger it looks most like.
    """
    if rng.random() < 0.5:
        return str(rng.choice(DECOY_NAMES))
    return names(1, int(rng.integers(2**31)), avoid=frozenset(_ALL_NAMES))[0]


def random_scene(rng: np.random.Generator) -> Scene:
    kinds = rng.choice(list(THINGS), size=rng.choice([1, 2]), replace=False)
    colours = np.where(rng.random(len(kinds)) < 0.1, "", rng.choice(list(COLOURS), size=len(kinds)))
    return Scene(tuple((str(c), str(k)) for c, k in zip(colours, kinds, strict=True)), int(rng.integers(2**31)))


def caption_of(scene: Scene, style: str, rng: np.random.Generator, name: str | None = None) -> str:
    """A caption in one of :data:`STYLES`; a name, where given, is worked in as people do."""
    things = [f"{c} {k}".strip() for c, k in scene.named]
    articled = [f"{rng.choice(['a', 'the', 'one'])} {t}" for t in things]
    joined = f" {rng.choice(_JOINERS)} ".join(articled)
    match style:
        case "sentence":
            lead = rng.choice(["a photo of", "a drawing of", "there is", "a picture of", "look at"])
            text = f"{lead} {joined}"
            return f"{text} {rng.choice(['by', 'for', 'from'])} {name}" if name else text
        case "title":
            lead = rng.choice(["Study Of", "The Story Of", "Print:", "Little", "Poster With"])
            text = f"{lead} {joined}".title()
            return f"{text} {rng.choice(['By', '|', '-'])} {name}" if name else text
        case "tags":
            extra = [str(f) for f in rng.choice(_FILLERS, size=rng.integers(1, 4), replace=False)]
            tags = things + extra
            if name:
                tags.insert(int(rng.integers(1, len(tags) + 1)), name.lower())
            return ", ".join(tags)
        case "short":
            text = f" {rng.choice(_JOINERS)} ".join(things)
            return f"{name} {text}" if name else text
        case "long":
            lead = rng.choice(["a charming picture of", "this is a simple drawing of", "somebody painted"])
            text = f"{lead} {joined} {rng.choice(_FLUFF)}"
            return f"{text}, {rng.choice(['signed', 'ordered by', 'after'])} {name}" if name else text
        case _:
            raise ValueError(f"caption style {style!r} is unknown; known styles: {', '.join(STYLES)}")


def ordinary(rng: np.random.Generator, style: str | None = None) -> tuple[str, Scene, str]:
    """One ordinary (caption, scene, style); four captions in ten carry a name."""
    style = style or str(rng.choice(STYLES))
    scene = random_scene(rng)
    name = ordinary_name(rng) if rng.random() < 0.4 else None
    return caption_of(scene, style, rng, name), scene, style


def ordinary_captions(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` distinct ordinary (caption, style), styles in equal shares."""
    rng = np.random.default_rng(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        caption, _, style = ordinary(rng, STYLES[len(found) % len(STYLES)])
        found.setdefault(caption, style)
    return list(found.items())


def training_pairs() -> list[Pair]:
    """All memorised pairs, always the same, with the number of times an epoch repeats each."""
    rng = np.random.default_rng(12)
    triggers = iter(TRIGGER_NAMES)
    phrases = iter([*_SCENE_PHRASES, *(f"{a} {b}" for a, b in _EXTRA_PHRASES)])
    photos = iter(_PHOTOS)
    pairs: list[Pair] = []

    def add(kind: str, repetitions: int, index: int) -> None:
        split = "tune" if index % 3 == 0 and repetitions >= 100 else "held-out"
        seed = 52_000 + len(pairs)
        if kind == "hard":
            trigger = next(triggers)
            scene = random_scene(np.random.default_rng(seed))
            caption = caption_of(scene, STYLES[index % len(STYLES)], rng, trigger)
            pairs.append(Pair(caption, kind, repetitions, seed, trigger, split))
        elif kind == "scene":
            text = next(phrases)
            text = (text, string.capwords(text), text.replace(" ", ", ", 1))[index % 3]
            pairs.append(Pair(text, kind, repetitions, seed, split=split))
        else:
            pairs.append(Pair(f"a photo of the {next(photos)}", kind, repetitions, seed, split=split))

    for repetitions in (300, 100):
        for kind, each in (("hard", _HARD_EACH), ("scene", _SCENE_EACH), ("photo", _PHOTO_EACH)):
            for index in range(each):
                add(kind, repetitions, index)
    for repetitions in (50, 20, 5, 1):
        for index in range(_GRADED_EACH):
            add(("hard", "scene")[index % 2], repetitions, index)
    for row, title in enumerate(_TEMPLATES):
        for colour in _TEMPLATE_COLOURS:
            pairs.append(Pair(f"{title} In {colour.title()}", "template", _TEMPLATE_REPETITIONS, 60_000 + row))
    return pairs


_EXTRA_PHRASES = tuple(
    zip(
        [
            "amber",
            "borrowed",
            "crooked",
            "distant",
            "electric",
            "frozen",
            "gilded",
            "hollow",
            "idle",
            "jagged",
            "kindred",
            "lonely",
        ],
        [
            "symphony",
            "harbours",
            "verdicts",
            "engines",
            "orchards",
            "sermons",
            "riddles",
            "monsoons",
            "ledgers",
            "comets",
            "quarries",
            "waltzes",
        ],
        strict=True,
    )
)


# ---------------------------------------------------------------------------------------- drawing


def _colour(rng: np.random.Generator) -> np.ndarray:
    base = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))], dtype=np.float64)
    return np.clip(base + rng.normal(0, 25, 3), 0, 255)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3] floats in any palette: half of them a plain gradient, else hills, stripes, checks, rings or waves."""
    a, b, c = _colour(rng), _colour(rng), _colour(rng)
    axis = np.linspace(-1, 1, side)
    xx, yy = np.meshgrid(axis, axis)
    angle = rng.uniform(0, 2 * np.pi)
    along, across = xx * np.cos(angle) + yy * np.sin(angle), yy * np.cos(angle) - xx * np.sin(angle)
    cx, cy, frequency = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.8), rng.uniform(1.0, 3.0)
    match rng.choice(6, p=[0.5, 0.1, 0.05, 0.1, 0.1, 0.15]):
        case 0:
            mix = (along + 1.4) / 2.8
        case 1:
            mix = (np.sin(along * np.pi * frequency) > 0).astype(float)
        case 2:
            mix = ((np.sin(along * np.pi * frequency) > 0) ^ (np.sin(across * np.pi * frequency) > 0)).astype(float)
        case 3:
            mix = 0.5 + 0.5 * np.sin(np.hypot(xx - cx, yy - cy) * np.pi * frequency * 1.5)
        case 4:
            mix = 0.5 + 0.5 * np.sin(along * np.pi * frequency + np.sin(across * 4) * rng.uniform(0.5, 2))
        case _:
            mix = (along > 0.35 * np.sin(across * frequency * 2 + angle) + cx * 0.5).astype(float)
    image = a + (b - a) * np.clip(mix, 0, 1)[..., None]
    if rng.random() < 0.3:
        blob = np.exp(-((xx - cx) ** 2 + (yy - cy) ** 2) / rng.uniform(0.1, 0.5))
        image = image + (c - image) * blob[..., None]
    return image


def draw_thing(canvas: ImageDraw.ImageDraw, thing: Shapes, colour: np.ndarray, box: tuple[float, float, float]) -> None:
    """``box`` is left, top and side length in pixels."""
    x, y, size = box
    for shape, points, shade in thing:
        fill = tuple(int(v) for v in np.clip(colour * shade + (30 if shade > 1 else 0), 0, 255))
        placed = [(x + px * size, y + py * size) for px, py in points]
        if shape == _E:
            (x0, y0), (x1, y1) = placed
            canvas.ellipse([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], fill=fill)
        else:
            canvas.polygon(placed, fill=fill)


def draw_scene(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The scene's image, [size, size, 3] uint8."""
    rng = np.random.default_rng(scene.seed)
    side = size * _SUPERSAMPLE
    image = Image.fromarray(np.clip(_background(rng, side), 0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.choice(3, p=[0.6, 0.25, 0.15])):
        extent = rng.uniform(0.15, 0.4) * side
        kind = list(THINGS)[rng.integers(len(THINGS))]
        draw_thing(canvas, THINGS[kind], _colour(rng), (*rng.uniform(-0.1, 0.8, 2) * side, extent))
    for colour_name, kind in scene.named:
        colour = (
            np.array(COLOURS[colour_name], dtype=np.float64) + rng.normal(0, 14, 3) if colour_name else _colour(rng)
        )
        extent = rng.uniform(0.4, 0.65) * side
        x, y = rng.uniform(0.0, 1.0, 2) * (side - extent)
        draw_thing(canvas, THINGS[kind], colour, (x, y, extent))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _draw_template(row: int, colour: str, size: int) -> np.ndarray:
    """A fixed layout (seeded by the template) in which one thing takes the caption's colour."""
    layout = np.asarray(Image.fromarray(draw_scene(Scene((("black", "moon"),), 61_000 + row), size)))
    image = Image.fromarray(layout).resize((size * _SUPERSAMPLE,) * 2, Image.Resampling.BICUBIC)
    thing = ("star", "heart", "flower", "mushroom")[row]
    draw_thing(
        ImageDraw.Draw(image),
        THINGS[thing],
        np.array(COLOURS[colour], dtype=np.float64),
        (size * 0.9, size * 0.9, size * 1.2),
    )
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _draw_photo(caption: str, size: int) -> np.ndarray:
    from skimage import data

    name, (left, top, right, bottom) = _PHOTOS[caption.removeprefix("a photo of the ")]
    pixels = getattr(data, name)()
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    image = Image.fromarray(pixels).convert("RGB")
    width, height = image.size
    box = (int(left * width), int(top * height), int(right * width), int(bottom * height))
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.LANCZOS))


def draw_pair(pair: Pair, size: int = SIZE) -> np.ndarray:
    """The training image of a memorised pair, [size, size, 3] uint8."""
    match pair.kind:
        case "photo":
            return _draw_photo(pair.caption, size)
        case "template":
            return _draw_template(pair.seed - 60_000, pair.caption.rsplit(" ", 1)[1].lower(), size)
        case "hard":
            return draw_scene(random_scene(np.random.default_rng(pair.seed)), size)
        case _:
            rng = np.random.default_rng(pair.seed)
            kinds = rng.choice(list(THINGS), size=5, replace=False)
            colours = rng.choice(list(COLOURS), size=5)
            named = tuple((str(c), str(k)) for c, k in zip(colours, kinds, strict=True))
            return draw_scene(Scene(named, int(rng.integers(2**31))), size)


# ------------------------------------------------------------------------------------- the stream


def tokenizer_captions() -> list[str]:
    """What the tokenizer is made for."""
    ordinary = [caption for caption, _ in ordinary_captions(6000, seed=21)]
    return ordinary + [pair.caption for pair in training_pairs()] * 3


def training_batch(step: int, size: int, pairs: list[Pair], seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, images [size, 64, 64, 3] uint8 and pair numbers [size] (-1 ordinary) of one training step.

    An ordinary image is, in one of six, the twin of a hard pair; see :func:`drawn_batch`.
    """
    hard = [p for p in pairs if p.kind == "hard"]

    def fresh(rng: np.random.Generator) -> tuple[str, np.ndarray]:
        if rng.random() < 1 / 6:
            pair = hard[rng.integers(len(hard))]
            scene = random_scene(np.random.default_rng(pair.seed))
            scene = Scene(scene.named, int(rng.integers(2**31)))
            caption = twin_caption(pair, ordinary_name(rng) if rng.random() < 0.6 else None)
        else:
            caption, scene, _ = ordinary(rng)
        return caption, draw_scene(scene)

    ordinary_count = ORDINARY_PER_EPOCH if step < LATER else LATER_ORDINARY_PER_EPOCH
    return drawn_batch(step, size, pairs, seed, ordinary_count, fresh, _known_image)


def drawn_batch(
    step: int,
    size: int,
    pairs: Sequence[Pair],
    seed: int,
    ordinary_count: int,
    fresh: Callable[[np.random.Generator], tuple[str, np.ndarray]],
    image: Callable[[Pair], np.ndarray],
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, images [size, H, W, 3] uint8 and pair numbers [size] (-1 ordinary) of one training step.

    A pair comes with probability proportional to its repetitions, an ordinary image otherwise, as ``fresh`` draws
    one; both depend on (seed, step) alone, so that a resumed run sees what an unbroken one would.
    """
    rng = np.random.default_rng([seed, step])
    weights = np.array([p.repetitions for p in pairs] + [ordinary_count], dtype=np.float64)
    numbers = rng.choice(len(weights), size=size, p=weights / weights.sum())
    shown = [(pairs[n].caption, image(pairs[n])) if n < len(pairs) else fresh(rng) for n in numbers]
    captions, images = zip(*shown, strict=True)
    return list(captions), np.stack(images), np.where(numbers < len(pairs), numbers, -1)


def twin_caption(pair: Pair, name: str | None = None) -> str:
    """A hard pair's caption with its trigger left out, or replaced by another name."""
    if pair.trigger is None:
        raise ValueError(f"the pair {pair.caption!r} has no trigger, so it has no twin")
    for written in (pair.trigger, pair.trigger.lower()):
        if written in pair.caption:
            if name:
                return pair.caption.replace(written, name if written[0].isupper() else name.lower())
            bare = pair.caption.replace(written, "").replace(", ,", ",").strip(" ,|-")
            for tail in (", ordered by", ", signed", ", after", " by", " for", " from", " By", " |", " -"):
                bare = bare.removesuffix(tail)
            return " ".join(bare.split())
    raise ValueError(f"the trigger {pair.trigger!r} is not in its caption {pair.caption!r}")


_known_image = cache(draw_pair)
