"""Settings, declared once: a frozen dataclass next to its method, read by every front end.

Each field carries its help sentence and range. Command-line options, node inputs, script controls and
saved parameters are all derived from :func:`options_of`; :func:`validate` speaks for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

LEAST_ABOVE = 1e-9  # how far above an exclusive minimum a value must be: 1 / alpha must stay a number to count to


@dataclass(frozen=True)
class Option:
    """One setting as a front end shows it."""

    name: str
    default: Any
    help: str
    kind: type
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    exclusive: bool = False


def option(
    default: Any,
    help: str,
    kind: type | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    exclusive: bool = False,
) -> Any:
    """A dataclass field with its help and range; ``exclusive`` leaves the minimum and maximum themselves out, and what
    is nearer to the minimum than 1e-9.

    ``kind`` must be given where the default is None.
    """
    details = Option("", default, help, kind or type(default), minimum, maximum, tuple(choices), exclusive)
    return field(default=default, metadata={"option": details})


def options_of(settings: type) -> list[Option]:
    """The options of a settings class, in the order declared."""
    found = []
    for item in fields(settings):
        known: Option = item.metadata["option"]
        values = {f.name: getattr(known, f.name) for f in fields(Option)}
        found.append(Option(**{**values, "name": item.name}))
    return found


def validate(settings: Any) -> None:
    """Raises ValueError naming the setting, the value seen and what is allowed."""
    for known in options_of(type(settings)):
        value = getattr(settings, known.name)
        label = known.name.replace("_", " ")
        if value is None and known.default is None:
            continue
        if known.choices and value not in known.choices:
            raise ValueError(f"{label} must be one of {', '.join(known.choices)}, not {value!r}")
        low, high = known.minimum, known.maximum
        if known.kind in (int, float):
            whole = known.kind is int
            is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
            if not is_number or not _finite(value):
                raise ValueError(f"{label} must be a {'whole ' if whole else ''}number, not {value!r}")
            if known.exclusive and low is not None and low < value < low + LEAST_ABOVE:
                raise ValueError(f"{label} must be at least {low + LEAST_ABOVE:g}, not {value}")
            below = low is not None and (value < low or (known.exclusive and value == low))
            above = high is not None and (value > high or (known.exclusive and value == high))
            if below or above:
                least, most = ("above", "below") if known.exclusive else ("at least", "at most")
                bounds = [f"{word} {bound:g}" for word, bound in ((least, low), (most, high)) if bound is not None]
                raise ValueError(f"{label} must be {' and '.join(bounds)}, not {value}")


def _finite(value: Any) -> bool:
    """Also of whole numbers that are too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
