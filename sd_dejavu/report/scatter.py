"""A scatter of named marks, both axes from 0 to 1, as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import svg

TOP, LABELS, LINE = 16, 200, 15  # pixels: margin, room for the names, the least distance between two of them
_TICKS = [(tick, f"{tick:g}") for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]


@dataclass(frozen=True)
class Mark:
    """x and y in 0..1."""

    name: str
    x: float
    y: float


def scatter_chart(marks: Sequence[Mark], title: str, across: str, up: str, width: int = 720, height: int = 420) -> str:
    """An SVG file of ``width`` x ``height`` pixels; the first mark stands for the state without any method.

    Names stand in a column to the right, in the order of their marks from top to bottom, with a line to each.
    """
    plot = svg.Plot(width, height, TOP, LABELS)
    parts = [*plot.rows(_TICKS, svg.FAINT), *plot.columns(_TICKS, "grid"), *plot.names(across, up)]
    places = _places([plot.y(mark.y) for mark in marks], plot.base)
    for number, (mark, place) in enumerate(zip(marks, places, strict=True)):
        x, y, named = plot.x(mark.x), plot.y(mark.y), plot.right + svg.RIGHT
        parts.append(svg.line([(x, y), (named, place)], svg.TEXT, opacity=0.25, width=1))
        told = f"{mark.name}: {up} {mark.y:.2f}, {across} {mark.x:.2f}"
        parts.append(svg.dot(x, y, 4.5, svg.AFTER if number else svg.MEASURED, told))
        parts.append(svg.text(named + 4, place + 4, mark.name))
    described = " ".join(f"{m.name}: {m.y:.2f} at {m.x:.2f}." for m in marks)
    return svg.drawing(width, height, title, described, parts, file=True) + "\n"


def _places(heights: Sequence[float], lowest: float) -> list[float]:
    """Where each name stands: at its mark's height, moved apart by at least a line, none below ``lowest`` or above the plot."""
    order = sorted(range(len(heights)), key=lambda number: -heights[number])
    found, limit = [0.0] * len(heights), lowest
    for number in order:  # from the bottom up
        found[number] = min(heights[number], limit)
        limit = found[number] - LINE
    limit = TOP
    for number in reversed(order):  # and back from the top
        found[number] = max(found[number], limit)
        limit = found[number] + LINE
    return found
