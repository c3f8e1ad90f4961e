"""Magnitude at each evaluation over the null band, and a small loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from markupsafe import Markup

from ..core.verdict import BandStep
from . import svg
from .svg import AFTER, LEFT, MEASURED, Plot, Point
from .wording import number

Step = tuple[float, float | None]  # sigma, magnitude or None where not measured
T = TypeVar("T")

_BAND, _DASHES, _AFTER_DASHES = 0.16, "5 4", "9 3"


def magnitude_chart(
    score_per_step: Sequence[Step],
    band: Sequence[BandStep] = (),
    after: Sequence[Step] | None = None,
    width: int = 560,
    height: int = 220,
) -> Markup:
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
        nothing = "No evaluation was measured"
        return svg.drawing(width, height, title, f"{nothing}.", [svg.text(width / 2, height / 2, nothing, "middle")])

    legend, top = _legend([(name, colour) for name, colour, _ in curves], any(under), width)
    plot = Plot(width, height, top)
    ticks = _ticks(max(highest), max(2, (plot.base - top) // 36))
    count = len(longest)

    def at(index: int, value: float) -> Point:
        return plot.x((index + 0.5) / count), plot.y(value / ticks[-1])

    every = max(1, round(_nice(count / ((plot.right - LEFT) / 44))))
    steps = sorted({1, *range(every, count + 1, every)})
    parts = [*legend, *plot.rows((tick / ticks[-1], f"{tick:g}") for tick in ticks)]
    parts += [
        *plot.columns((((step - 0.5) / count, str(step)) for step in steps), "tick"),
        *plot.names("step (model evaluation)", "magnitude"),
    ]
    for run in _runs(under):
        low, high, mid = ([at(i, getattr(b, q)) for i, b in run] for q in ("q05", "q95", "q50"))
        if len(run) == 1:
            low, high, mid = ([(px - 8, py), (px + 8, py)] for [(px, py)] in (low, high, mid))
        parts += [svg.area([*high, *reversed(low)], _BAND), _median(mid)]
    for name, colour, values in curves:
        parts += [_curve([at(i, v) for i, v in stretch], colour) for stretch in _runs(values)]
        for i, value in enumerate(values):
            told = f"{name}, evaluation {i + 1}: {'not measured' if value is None else number(value)}"
            if value is None:
                parts.append(svg.text(at(i, 0)[0], plot.base - 3, "×", "middle", colour, told))
            else:
                parts.append(_marker(*at(i, value), min(3.5, 1 + 120 / count), colour, told))
    return svg.drawing(width, height, title, _description(curves, under), parts)


def loss_sparkline(losses: Sequence[float], width: int = 120, height: int = 28) -> Markup:
    """A mitigation's loss at each optimisation step, scaled from its lowest to its highest value."""
    values = [(i, v) for i, v in enumerate(losses) if math.isfinite(v)]
    if not values:
        return Markup("")
    low, high = min(v for _, v in values), max(v for _, v in values)
    across, span = max(1, len(losses) - 1), (high - low) or 1
    points = [(3 + (width - 6) * i / across, height - 3 - (height - 6) * (v - low) / span) for i, v in values]
    told = f"The loss went from {number(values[0][1])} to {number(values[-1][1])} in {len(losses)} steps."
    return svg.drawing(
        width, height, "Loss at each step", told, [svg.line(points, AFTER), svg.dot(*points[-1], 2.5, AFTER)]
    )


def _legend(curves: Sequence[tuple[str, str]], has_band: bool, width: int) -> tuple[list[str], int]:
    """The legend's elements, in as many rows as the width asks for, and the y where the plot may begin."""
    items = list(curves)
    if has_band:
        items += [("ordinary prompts, 5 to 95 %", "band"), ("their median", "median")]
    parts: list[str] = []
    left, top = LEFT, 12
    for name, kind in items:
        if left > LEFT and left + 28 + len(name) * svg.CHARACTER > width - svg.RIGHT:
            left, top = LEFT, top + 18
        right = left + 22
        if kind == "band":
            parts.append(f'<rect x="{left}" y="{top - 6}" width="22" height="12" opacity="{_BAND}"/>')
        elif kind == "median":
            parts.append(_median([(left, top), (right, top)]))
        else:
            parts += [_curve([(left, top), (right, top)], kind), _marker(left + 11, top, 3.5, kind)]
        parts.append(svg.text(left + 28, top + 4, name))
        left += 28 + round(len(name) * svg.CHARACTER) + 14
    return parts, top + 20


def _curve(points: Sequence[Point], colour: str) -> str:
    return svg.line(points, colour, _AFTER_DASHES if colour == AFTER else "")


def _marker(x: float, y: float, r: float, colour: str, hover: str = "") -> str:
    return (svg.square if colour == AFTER else svg.dot)(x, y, r, colour, hover)


def _median(points: Sequence[Point]) -> str:
    return svg.line(points, svg.TEXT, _DASHES, 0.75)


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
