"""A share, 0 to 1, over a few named places."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from . import svg

TOP = 12
_TICKS = [(tick, f"{tick:.0%}") for tick in (0.0, 0.25, 0.5, 0.75, 1.0)]


def share_chart(
    labels: Sequence[str], shares: Sequence[float], title: str, across: str, width: int = 430, height: int = 220
) -> Markup:
    """An SVG of ``width`` x ``height`` pixels: one mark a label, joined by a line, their shares told on hover."""
    plot, count = svg.Plot(width, height, TOP), len(labels)
    places = [((place + 0.5) / count, label) for place, label in enumerate(labels)]
    points = [(plot.x(place), plot.y(share)) for (place, _), share in zip(places, shares, strict=True)]
    told = [f"{across} {label}: {share:.0%}" for label, share in zip(labels, shares, strict=True)]
    parts = [
        *plot.rows(_TICKS),
        *plot.columns(places[:: -(-count // 12)]),
        svg.line(points, svg.MEASURED),
        *(svg.dot(x, y, 4, svg.MEASURED, hover) for (x, y), hover in zip(points, told, strict=True)),
        *plot.names(across),
    ]
    return svg.drawing(width, height, title, " ".join(f"{one}." for one in told), parts)
