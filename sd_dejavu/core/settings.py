"""Settings, declared once: a frozen dataclass next to its method, read by every front end.

Each field carries its help sentence and range. Command-line options, node inputs, script controls and
saved parameters are all derived from :func:`options_of`; :class:`Checked` speaks for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    former: str = ""
    later: bool = False

    @property
    def id(self) -> str:
        """What saved workflows, settings of hosts and unfinished work know it by: the name that it was released with."""
        return self.former or self.name


def option(
    default: Any,
    help: str,
    kind: type | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    exclusive: bool = False,
    former: str = "",
    later: bool = False,
) -> Any:
    """A dataclass field with its help and range; ``exclusive`` leaves the minimum and maximum themselves out, and what
    is nearer to the minimum than 1e-9.

    ``kind`` must be given where the default is None. ``former`` is the name it was released with, where it has another
    now; front ends take both. ``later`` options are not in release 0.1, so work that was saved by it lacks them: they come
    last, and may be left out.

    >>> @dataclass
    ... class Settings:
    ...     steps: int = option(50, "denoising steps", minimum=1)
    >>> options_of(Settings)[0].minimum, Settings().steps
    (1, 50)
    """
    details = Option(
        "", default, help, kind or type(default), minimum, maximum, tuple(choices), exclusive, former, later
    )
    return field(default=default, metadata={"option": details})


def same(settings: type, name: str) -> Any:
    """A dataclass field that is declared in another settings class."""
    declared = next(known for known in fields(settings) if known.name == name)
    return field(default=declared.default, metadata=declared.metadata)


def options_of(settings: type) -> list[Option]:
    """The options of a settings class, in the order declared."""
    found = []
    for item in fields(settings):
        known: Option = item.metadata["option"]
        values = {f.name: getattr(known, f.name) for f in fields(Option)}
        found.append(Option(**{**values, "name": item.name}))
    return found


def by_id(settings: Any) -> dict[str, Any]:
    """The values of some settings by what saved work knows them by."""
    return {known.id: getattr(settings, known.name) for known in options_of(type(settings))}


class Checked:
    """What settings classes derive from: one with a value out of range cannot be made."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the setting, the value seen and what is allowed."""
        for known in options_of(type(self)):
            check(known, getattr(self, known.name))


def check(known: Option, value: Any) -> None:
    """The same for the value of one setting.

    >>> check(Option("steps", 50, "denoising steps", int, minimum=1), 0)
    Traceback (most recent call last):
    ValueError: steps must be at least 1, not 0
    """
    label = known.name.replace("_", " ")
    if value is None and known.default is None:
        return
    if known.choices and value not in known.choices:
        raise ValueError(f"{label} must be one of {', '.join(known.choices)}, not {value!r:.60}")
    if known.kind is str and not isinstance(value, str):
        raise ValueError(f"{label} must be text, not {value!r:.60}")
    if known.kind is bool and not isinstance(value, bool):
        raise ValueError(f"{label} must be true or false, not {value!r:.60}")
    low, high = known.minimum, known.maximum
    if known.kind in (int, float):
        whole = known.kind is int
        is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not is_number or not _finite(value):
            raise ValueError(f"{label} must be a {'whole ' if whole else ''}number, not {value!r:.60}")
        if known.exclusive and low is not None and low < value < low + LEAST_ABOVE:
            raise ValueError(f"{label} must be at least {low + LEAST_ABOVE:g}, not {value!s:.60}")
        below = low is not None and (value < low or (known.exclusive and value == low))
        above = high is not None and (value > high or (known.exclusive and value == high))
        if below or above:
            least, most = ("above", "below") if known.exclusive else ("at least", "at most")
            bounds = [f"{word} {bound:g}" for word, bound in ((least, low), (most, high)) if bound is not None]
            raise ValueError(f"{label} must be {' and '.join(bounds)}, not {value!s:.60}")


def named(values: Mapping[str, Any], options: Iterable[Option], title: str) -> dict[str, Any]:
    """Values of some settings by their names, as :func:`of_page` gives them; former names are taken too.

    Raises ValueError for names of none.
    """
    known = {o.name: o for o in options}
    former = {o.id: o.name for o in known.values()}
    if unknown := sorted(values.keys() - known.keys() - former.keys()):
        raise ValueError(f"{title} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    given = {former.get(name, name): value for name, value in values.items()}
    return {name: of_page(known[name], value) for name, value in given.items()}


def of_page(known: Option, value: Any) -> Any:
    """A value as the pages of hosts and JSON give it: they know whole numbers only as floats that happen to be whole.

    >>> of_page(Option("steps", 50, "denoising steps", int), 20.0)
    20
    """
    return int(value) if known.kind is int and isinstance(value, float) and value.is_integer() else value


def of_text(known: Option, text: str) -> Any:
    """The value that ``str`` has written. Raises ValueError where the setting cannot have it."""
    value = {"True": True, "False": False}.get(text, text) if known.kind is bool else known.kind(text)
    check(known, value)
    return value


def _finite(value: Any) -> bool:
    """Also of whole numbers that are too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
