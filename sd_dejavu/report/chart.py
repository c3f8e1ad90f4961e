"""Charts as inline SVG: magnitude at each evaluation over the null band, and a small loss curve.

Axes and text take the page's text colour. The curves' colours are CSS custom properties
(--dejavu-measured, --dejavu-after) with fallbacks from Okabe and Ito's colour-blind-safe palette; marker
shape and dashes tell the curves apart without colour. The SVG holds numbers and fixed words only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ..verdict import BandStep
from .wording import number

Step = tuple[float, float | None]  # sigma, magnitude or None where not measured
Point = tuple[float, float]  # x, y in pixels
T = TypeVar("T")

MEASURED = "var(--dejavu-measured,#d55e00)"
AFTER = "var(--dejavu-after,#0072b2)"
LEFT, RIGHT, BOTTOM, CHARACTER = 48, 12, 40, 6.4  # margins and the width of a legend character, pixels


def magnitude_chart(
    score_per_step: Sequence[Step],
    band: Sequence[BandStep] = (),
    after: Sequence[Step] | None = None,
    width: int = 560,
    height: int = 220,
) -> str:
    """Magnitude at each evaluation as an SVG of ``width`` x ``height`` pixels.

    ``band`` is what ordinary prompts give and is laid under the evaluations of the same sigma.
    ``after`` is a second curve, measured under a mitigation. Values must share one unit with the band.
    """
    after = after or ()
    longest = max(score_per_step, after, key=len)
    curves = [("this prompt", MEASURED, _finite(score_per_step)), ("after mitigation", AFTER, _finite(after))]
    curves = [curve for curve in curves if any(v is not None for v in curve[2])]
    under = [_at_sigma(band, i, sigma) for i, (sigma, _) in enumerate(longest)]
    highest = [v for _, _, values in curves for v in values if v is not None] + [b.q95 for b in under if b]
    title = "Magnitude at each evaluation"
    if not curves:
        middle = f'<text x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle">No evaluation was measured</text>'
        return _svg(width, height, title, "No evaluation was measured.", middle)

    legend, top = _legend([(name, colour) for name, colour, _ in curves], any(under), width)
    ticks = _ticks(max(highest), max(2, (height - top - BOTTOM) // 36))
    count = len(longest)

    def x(index: int) -> float:
        return LEFT + (width - LEFT - RIGHT) * ((index + 0.5) / count)

    def y(value: float) -> float:
        return height - BOTTOM - (height - BOTTOM - top) * value / ticks[-1]

    parts = [*legend, *_axes(x, y, ticks, count, width, height)]
    for run in _runs(under):
        low, high, mid = ([(x(i), y(getattr(b, q))) for i, b in run] for q in ("q05", "q95", "q50"))
        if len(run) == 1:
            low, high, mid = ([(px - 8, py), (px + 8, py)] for [(px, py)] in (low, high, mid))
        parts.append(f'<polygon points="{_points([*high, *reversed(low)])}" fill="currentColor" opacity=".16"/>')
        parts.append(_line(mid, "currentColor", 'stroke-dasharray="5 4" opacity=".75"'))
    for name, colour, values in curves:
        second = colour == AFTER
        for stretch in _runs(values):
            parts.append(_line([(x(i), y(v)) for i, v in stretch], colour, 'stroke-dasharray="9 3"' if second else ""))
        for i, value in enumerate(values):
            told = "not measured" if value is None else number(value)
            hover = f"<title>{name}, evaluation {i + 1}: {told}</title>"
            if value is None:
                cross = f'x="{x(i):.1f}" y="{height - BOTTOM - 3:g}" text-anchor="middle"'
                parts.append(f'<text {cross} style="fill:{colour}">×{hover}</text>')
            else:
                parts.append(_marker(x(i), y(value), colour, second, min(3.5, 1 + 120 / count), hover))
    return _svg(width, height, title, _description(curves, under), "".join(parts))


def loss_sparkline(losses: Sequence[float], width: int = 120, height: int = 28) -> str:
    """A mitigation's loss at each optimisation step, scaled from its lowest to its highest value."""
    values = [(i, v) for i, v in enumerate(losses) if math.isfinite(v)]
    if not values:
        return ""
    low, high = min(v for _, v in values), max(v for _, v in values)
    across, span = max(1, len(losses) - 1), (high - low) or 1
    points = [(3 + (width - 6) * i / across, height - 3 - (height - 6) * (v - low) / span) for i, v in values]
    last = _marker(*points[-1], AFTER, False, 2.5, "")
    told = f"from {number(values[0][1])} to {number(values[-1][1])} in {len(losses)} steps"
    return _svg(width, height, "Loss at each step", f"The loss went {told}.", _line(points, AFTER, "") + last)


def _svg(width: int, height: int, title: str, description: str, body: str) -> str:
    # No xmlns: inline SVG needs none. aria-label as well as title: not every reader speaks a title.
    return (
        f'<svg class="dejavu-chart" role="img" aria-label="{title}. {description}" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" style="max-width:100%;height:auto;font:12px system-ui,sans-serif" '
        f'fill="currentColor"><title>{title}</title><desc>{description}</desc>{body}</svg>'
    )


def _axes(
    x: Callable[[int], float], y: Callable[[float], float], ticks: Sequence[float], count: int, width: int, height: int
) -> Iterable[str]:
    base, middle = height - BOTTOM, (LEFT + width - RIGHT) / 2
    for tick in ticks:
        opacity = 0.7 if tick == 0 else 0.15
        yield f'<path d="M{LEFT} {y(tick):.1f}H{width - RIGHT}" stroke="currentColor" opacity="{opacity}"/>'
        yield f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
    every = max(1, round(_nice(count / ((width - LEFT - RIGHT) / 44))))
    for step in sorted({1, *range(every, count + 1, every)}):
        yield f'<path d="M{x(step - 1):.1f} {base}v4" stroke="currentColor"/>'
        yield f'<text x="{x(step - 1):.1f}" y="{base + 17}" text-anchor="middle">{step}</text>'
    yield f'<text x="{middle:g}" y="{height - 6}" text-anchor="middle">step (model evaluation)</text>'
    centre = (base + y(ticks[-1])) / 2
    yield f'<text transform="translate(13 {centre:.1f}) rotate(-90)" text-anchor="middle">magnitude</text>'


def _legend(curves: Sequence[tuple[str, str]], has_band: bool, width: int) -> tuple[list[str], int]:
    """The legend's elements, in as many rows as the width asks for, and the y where the plot may begin."""
    items = list(curves)
    if has_band:
        items += [("ordinary prompts, 5 to 95 %", "band"), ("their median", "median")]
    parts: list[str] = []
    left, top = LEFT, 12
    for name, kind in items:
        if left > LEFT and left + 28 + len(name) * CHARACTER > width - RIGHT:
            left, top = LEFT, top + 18
        ends = [(left, top), (left + 22, top)]
        if kind == "band":
            parts.append(f'<rect x="{left}" y="{top - 6}" width="22" height="12" opacity=".16"/>')
        elif kind == "median":
            parts.append(_line(ends, "currentColor", 'stroke-dasharray="5 4" opacity=".75"'))
        else:
            parts.append(_line(ends, kind, 'stroke-dasharray="9 3"' if kind == AFTER else ""))
            parts.append(_marker(left + 11, top, kind, kind == AFTER, 3.5, ""))
        parts.append(f'<text x="{left + 28}" y="{top + 4}">{name}</text>')
        left += 28 + round(len(name) * CHARACTER) + 14
    return parts, top + 20


def _marker(x: float, y: float, colour: str, square: bool, r: float, inside: str) -> str:
    if square:
        place = f'x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"'
        return f'<rect {place} style="fill:{colour}">{inside}</rect>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" style="fill:{colour}">{inside}</circle>'


def _line(points: Sequence[Point], colour: str, more: str) -> str:
    return f'<polyline points="{_points(points)}" fill="none" stroke-width="2" style="stroke:{colour}" {more}/>'


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _description(curves: Sequence[tuple[str, str, list[float | None]]], under: Sequence[BandStep | None]) -> str:
    told = []
    for name, _, values in curves:
        known = [v for v in values if v is not None]
        text = f"{name}: {len(known)} of {len(values)} evaluations measured, "
        text += f"{number(known[0])} at the first, {number(min(known))} to {number(max(known))} over all"
        pairs = [(v, b) for v, b in zip(values, under, strict=False) if v is not None and b]
        if pairs:
            text += f", above the ordinary range at {sum(v > b.q95 for v, b in pairs)} of {len(pairs)}"
        told.append(text[0].upper() + text[1:] + ".")
    return " ".join(told)


def _finite(steps: Sequence[Step]) -> list[float | None]:
    return [v if v is not None and math.isfinite(v) else None for _, v in steps]


def _at_sigma(band: Sequence[BandStep], index: int, sigma: float) -> BandStep | None:
    """The band at this noise level: its entry of the same index if that fits, else any that fits."""
    near = (b for b in (*band[index : index + 1], *band) if math.isclose(b.sigma, sigma, rel_tol=1e-3, abs_tol=1e-6))
    return next(near, None)


def _runs(values: Sequence[T | None]) -> list[list[tuple[int, T]]]:
    """Stretches without None, as (index, value)."""
    runs: list[list[tuple[int, T]]] = [[]]
    for i, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((i, value))
    return [run for run in runs if run]


def _ticks(highest: float, count: int) -> list[float]:
    """About ``count`` round steps from 0 to at least ``highest``."""
    step = _nice((highest or 1) / count)
    return [round(i * step, 12) for i in range(math.ceil((highest or 1) / step - 1e-9) + 1)]


def _nice(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
