"""A scatter of named marks as inline SVG, both axes from 0 to 1. See :mod:`sd_dejavu.report.chart` for its manners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .chart import AFTER, BOTTOM, LEFT, MEASURED, RIGHT

TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TOP, LABELS, LINE = 16, 200, 15  # pixels: margin, room for the names, the least distance between two of them


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
    right, base = width - RIGHT - LABELS, height - BOTTOM

    def x(value: float) -> float:
        return LEFT + (right - LEFT) * value

    def y(value: float) -> float:
        return base - (base - TOP) * value

    parts = []
    for tick in TICKS:
        parts.append(
            f'<path d="M{LEFT} {y(tick):.1f}H{right}M{x(tick):.1f} {TOP}V{base}" stroke="#000" opacity=".15"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{x(tick):.1f}" y="{base + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2:g}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>')
    middle = (TOP + base) / 2
    parts.append(f'<text transform="translate(13 {middle:g}) rotate(-90)" text-anchor="middle">{escape(up)}</text>')
    places = _places([y(mark.y) for mark in marks], base)
    for number, (mark, place) in enumerate(zip(marks, places, strict=True)):
        colour = AFTER if number else MEASURED
        line = f"{x(mark.x):.1f},{y(mark.y):.1f} {right + 12},{place:.1f}"
        parts.append(f'<polyline points="{line}" fill="none" stroke="#000" opacity=".25"/>')
        told = f"{escape(mark.name)}: {up} {mark.y:.2f}, {across} {mark.x:.2f}"
        circle = f'cx="{x(mark.x):.1f}" cy="{y(mark.y):.1f}" r="4.5"'
        parts.append(f'<circle {circle} style="fill:{colour}"><title>{told}</title></circle>')
        parts.append(f'<text x="{right + 16}" y="{place + 4:.1f}">{escape(mark.name)}</text>')
    described = " ".join(f"{escape(m.name)}: {m.y:.2f} at {m.x:.2f}." for m in marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" style="font:12px system-ui,sans-serif;background:#fff">'
        f"<title>{escape(title)}</title><desc>{described}</desc>{''.join(parts)}</svg>\n"
    )


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
