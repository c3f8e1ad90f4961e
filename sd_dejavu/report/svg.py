"""What charts are drawn with: one plot area, axes, lines and marks as SVG. All text is escaped here.

Axes and text take the page's text colour. The curves' colours are CSS custom properties (--dejavu-measured,
--dejavu-after) with fallbacks from Okabe and Ito's colour-blind-safe palette; marker shape and dashes tell curves
apart without colour. Places are in pixels from the top left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

Point = tuple[float, float]  # x, y in pixels
Tick = tuple[float, str]  # where on the axis, 0 to 1, and its label

MEASURED = "var(--dejavu-measured,#d55e00)"
AFTER = "var(--dejavu-after,#0072b2)"
TEXT = "currentColor"
LEFT, RIGHT, BOTTOM, CHARACTER = 48, 12, 40, 6.4  # margins and the width of a character, pixels
FAINT, STRONG = 0.15, 0.7  # opacity of grid lines and of an axis


def drawing(width: int, height: int, title: str, description: str, parts: Iterable[str], file: bool = False) -> Markup:
    """The SVG, inline in a page or as a ``file`` of its own on white."""
    # aria-label as well as title: not every reader speaks a title. Inline SVG needs no xmlns.
    label = escape(title if file else f"{title}. {description}")
    kind = 'xmlns="http://www.w3.org/2000/svg"' if file else 'class="dejavu-chart"'
    fits = "background:#fff" if file else "max-width:100%;height:auto"
    return Markup(
        f'<svg {kind} role="img" aria-label="{label}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'style="{fits};font:12px system-ui,sans-serif" fill="{TEXT}"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, anchor: str = "start", colour: str = "", hover: str = "") -> str:
    style = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(content)}{_hover(hover)}</text>'


def line(points: Iterable[Point], colour: str, dashes: str = "", opacity: float = 1, width: float = 2) -> str:
    more = (f' stroke-dasharray="{dashes}"' if dashes else "") + (f' opacity="{opacity:g}"' if opacity < 1 else "")
    return f'<polyline points="{_points(points)}" fill="none" stroke-width="{width:g}" style="stroke:{colour}"{more}/>'


def area(points: Iterable[Point], opacity: float) -> str:
    return f'<polygon points="{_points(points)}" fill="{TEXT}" opacity="{opacity:g}"/>'


def dot(x: float, y: float, r: float, colour: str, hover: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" style="fill:{colour}">{_hover(hover)}</circle>'


def square(x: float, y: float, r: float, colour: str, hover: str = "") -> str:
    place = f'x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"'
    return f'<rect {place} style="fill:{colour}">{_hover(hover)}</rect>'


def _hover(told: str) -> str:
    return f"<title>{escape(told)}</title>" if told else ""


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


@dataclass(frozen=True)
class Plot:
    """The area between the axes of a chart of ``width`` x ``height`` pixels, below ``top`` and left of ``beside``."""

    width: int
    height: int
    top: int
    beside: int = 0

    @property
    def right(self) -> int:
        return self.width - RIGHT - self.beside

    @property
    def base(self) -> int:
        return self.height - BOTTOM

    def x(self, share: float) -> float:
        return LEFT + (self.right - LEFT) * share

    def y(self, share: float) -> float:
        return self.base - (self.base - self.top) * share

    def rows(self, ticks: Iterable[Tick], axis: float = STRONG) -> Iterator[str]:
        """Horizontal grid lines with their labels; ``axis`` is the opacity of the lowest."""
        for share, label in ticks:
            yield self._grid(f"M{LEFT} {self.y(share):.1f}H{self.right}", FAINT if share else axis)
            yield text(LEFT - 6, self.y(share) + 4, label, "end")

    def columns(self, ticks: Iterable[Tick], marks: str = "") -> Iterator[str]:
        """Labels below the plot; ``marks`` may ask for a 'grid' line or a short 'tick' at each."""
        for share, label in ticks:
            if marks == "grid":
                yield self._grid(f"M{self.x(share):.1f} {self.top}V{self.base}", FAINT)
            elif marks:
                yield self._grid(f"M{self.x(share):.1f} {self.base}v4", 1)
            yield text(self.x(share), self.base + 17, label, "middle")

    def names(self, across: str, up: str = "") -> Iterator[str]:
        """What the axes show."""
        yield text((LEFT + self.right) / 2, self.height - 6, across, "middle")
        if up:
            turned = f"translate(13 {(self.top + self.base) / 2:.1f}) rotate(-90)"
            yield f'<text transform="{turned}" text-anchor="middle">{escape(up)}</text>'

    def _grid(self, path: str, opacity: float) -> str:
        return f'<path d="{path}" stroke="{TEXT}" opacity="{opacity:g}"/>'
