"""The prompt as an image: each word shaded by its significance, the verdict above. For hosts that pass images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..core.conditioning import split_words
from ..core.verdict import Verdict
from .image import Pixels
from .wording import sentence, top_words_text

WIDTH, MARGIN, SIZE, LINE = 768, 16, 20, 34
_SHADE = np.array([213, 94, 0], dtype=float)
_PAPER = np.array([255, 255, 255], dtype=float)
_INK = (24, 24, 28)


def word_image(verdict: Verdict, notes: Sequence[str] = ()) -> Pixels:
    """uint8 [H, 768, 3]: the verdict's sentence, then the prompt; darker ground and thicker line mean more.

    A prompt whose text is not known shows as its numbered tokens. ``notes`` stand below.
    """
    lines = [[(word, 0.0) for word in line] for line in _wrapped(sentence(verdict).split())]
    lines += [[]]
    explanation = verdict.explanation
    shares = {word.start: word.significance for word in explanation.words} if explanation else {}
    prompt = [(word.text, shares.get(word.start, 0.0)) for word in split_words(verdict.prompt)]
    if not prompt and explanation:
        prompt = [(word.text, word.significance) for word in explanation.words]
    lines += _wrapped_pairs(prompt)
    if explanation is not None:
        legend = ". ".join([f"What counts most: {top_words_text(explanation)}", *notes])
    else:
        legend = ". ".join(notes) or "The words were not looked at."
    lines += [[], *([(word, 0.0) for word in line] for line in _wrapped(legend.split()))]
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE * len(lines)), "white")
    draw, space = ImageDraw.Draw(image), _length(" ")
    for number, line in enumerate(lines):
        x, y = float(MARGIN), MARGIN + LINE * number
        for word, share in line:
            length = _length(word)
            if share > 0:
                shade = tuple(int(v) for v in _PAPER + (_SHADE - _PAPER) * 0.6 * share)
                draw.rectangle([x - 3, y, x + length + 3, y + LINE - 8], fill=shade)
                draw.line([(x - 3, y + LINE - 7), (x + length + 3, y + LINE - 7)], _INK, max(1, round(4 * share)))
            image.paste(_INK, (round(x) - MARGIN, y), _drawn(word))
            x += length + space
    return np.asarray(image).copy()


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(SIZE)  # unpacked anew at each call


@lru_cache(4096)
def _length(word: str) -> float:
    return float(_font().getlength(word))


@lru_cache(256)
def _drawn(word: str) -> Image.Image:
    """The word's shape, a margin from the left: most words of a prompt are the same in the next run."""
    shape = Image.new("L", (min(WIDTH, round(_length(word))) + 2 * MARGIN, LINE))
    ImageDraw.Draw(shape).text((MARGIN, 0), word, fill=255, font=_font())
    return shape


def _wrapped(words: list[str]) -> list[list[str]]:
    return [[word for word, _ in line] for line in _wrapped_pairs([(word, 0.0) for word in words])]


def _wrapped_pairs(words: list[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Lines that fit; a word longer than a line stands alone and is cut by the image's edge."""
    lines: list[list[tuple[str, float]]] = [[]]
    used = 0.0
    space = _length(" ")
    for word, share in words:
        length = _length(word)
        if lines[-1] and used + length > WIDTH - 2 * MARGIN:
            lines.append([])
            used = 0.0
        lines[-1].append((word, share))
        used += length + space
    return lines
