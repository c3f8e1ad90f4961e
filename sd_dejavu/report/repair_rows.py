"""A repair in words, for the command line and the hosts."""

from __future__ import annotations

from ..training.repair import Point, Repaired

HEAD = ("held back", "kept", "copies", "of ordinary prompts", "likeness")


def cells(point: Point) -> tuple[str, ...]:
    """One point of the course under :data:`HEAD`.

    >>> cells(Point("strength", 0.5, 1, 8, 0.873, 0.25))
    ('strength', '0.5', '1 of 8', '25%', '87%')
    """
    copies = f"{point.copies} of {point.drawn}"
    return point.way, f"{point.kept:g}", copies, f"{point.elsewhere:.0%}", _likeness(point)


def sentence(found: Repaired) -> str:
    """What was reached, in a few sentences."""
    before, after = found.before, found.after
    told = [
        f"Copies before: {before.copies} of {before.drawn}; after: {after.copies} of {after.drawn}; likeness kept: "
        f"{_likeness(after)} ({after.way}, {after.kept:g} kept)."
    ]
    if after.kept == 1:
        told.append("Nothing is held back: nothing that was tried is better than the LoRA as it is.")
    if after.likeness is None:
        told.append("The LoRA draws nothing nearer to its training set's style, so no likeness can be told.")
    if not found.reached:
        told.append(
            f"It still copies more than {found.most_copies:.0%}: use it at a lower strength, or train for fewer steps."
        )
    return " ".join(told)


def as_markdown(found: Repaired) -> str:
    """The sentence, and the whole course."""
    rows = [HEAD, ("---",) * len(HEAD), *(cells(point) for point in found.curve)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{sentence(found)}\n\n{table}"


def _likeness(point: Point) -> str:
    return "–" if point.likeness is None else f"{point.likeness:.0%}"
