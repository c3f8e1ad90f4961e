"""A share, 0 to 1, over a few named places, as inline SVG. See :mod:`sd_dejavu.report.chart` for its manners."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .chart import BOTTOM, LEFT, MEASURED, RIGHT

TOP = 12
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def share_chart(
    labels: Sequence[str], shares: Sequence[float], title: str, across: str, width: int = 430, height: int = 220
) -> str:
    """An SVG of ``width`` x ``height`` pixels: one mark a label, joined by a line, their shares told on hover."""
    base, right = height - BOTTOM, width - RIGHT
    count = len(labels)

    def x(place: int) -> float:
        return LEFT + (right - LEFT) * (place + 0.5) / count

    def y(share: float) -> float:
        return base - (base - TOP) * share

    parts = []
    for tick in _TICKS:
        parts.append(
            f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="currentColor" opacity="{0.15 if tick else 0.7}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    every = -(-count // 12)
    for place, label in enumerate(labels):
        if place % every == 0:
            parts.append(f'<text x="{x(place):.1f}" y="{base + 17}" text-anchor="middle">{escape(label)}</text>')
    line = " ".join(f"{x(place):.1f},{y(share):.1f}" for place, share in enumerate(shares))
    parts.append(f'<polyline points="{line}" fill="none" style="stroke:{MEASURED}" stroke-width="2"/>')
    for place, (label, share) in enumerate(zip(labels, shares, strict=True)):
        told = f"<title>{escape(across)} {escape(label)}: {share:.0%}</title>"
        parts.append(f'<circle cx="{x(place):.1f}" cy="{y(share):.1f}" r="4" style="fill:{MEASURED}">{told}</circle>')
    parts.append(f'<text x="{(LEFT + right) / 2:g}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>')
    described = " ".join(f"{across} {label}: {share:.0%}." for label, share in zip(labels, shares, strict=True))
    return (
        f'<svg class="dejavu-chart" role="img" aria-label="{escape(title)}. {escape(described)}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'style="max-width:100%;height:auto;font:12px system-ui,sans-serif" fill="currentColor">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc>{''.join(parts)}</svg>"
    )
