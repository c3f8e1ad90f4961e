"""What every front end says of an audit: the finding in words, its rows worst first, as JSON and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from textwrap import indent
from typing import Any

from ..reference.left_out import in_short
from ..run.measure import Measurement
from ..training.audit import Audit, AuditSettings, Point, Row, Subject
from .wording import misfit, number, part_text

_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&!#@$]|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def sentence(audit: Audit) -> str:
    """The finding in one sentence, without a full stop at the end."""
    named, copied, all_of_them = len(audit.flagged), len(audit.copied), len(audit.rows)
    what = "captions" if audit.captions_alone else "training images"
    drawn = sum(row.copies is not None for row in audit.rows)
    told = f"{named:,} of {all_of_them:,} {what} {'is' if named == 1 else 'are'} named as memorised"
    if not named:
        told = f"None of {all_of_them:,} {what} is named as memorised"
    if drawn:
        told += f"; of {drawn:,} that were drawn again, {copied or 'none'} came out as {'a copy' if copied == 1 else 'copies'}"
    if partly := len(audit.partly_copied):
        told += f", {partly} with a copy of a part"
    return told if audit.begins is None else f"{told}; memorisation starts at epoch {audit.begins}"


def notes(audit: Audit) -> list[str]:
    """What one must know to read it."""
    told = [
        f"Of those named, in expectation at most {audit.false_discovery_rate:.0%} are named wrongly (Benjamini & "
        f"Hochberg, against {audit.nulls:,} ordinary prompts)."
    ]
    if audit.least_named > 1:
        told.append(
            f"With so many captions, at least {audit.least_named:,} must stand out together for any to be named: to name "
            f"a single one, raise the number of ordinary prompts to {audit.enough:,}."
        )
    if audit.misfit:
        told.append(
            misfit("captions", "give ordinary prompts of your captions' kind (on the command line: --null-prompts)")
        )
    image = "a training image's"
    if audit.captions_alone:
        image = "its"
        told.append(
            "There were captions only: what the model draws of each, without guidance, stood in for its training image, "
            "and nothing could be compared with the training images."
        )
        if audit.counts == "gain":
            told.append("The copies of a LoRA seldom stand out so: name the folder with its training images.")
    counts = f"What counts is how much of {image} error in denoising its caption takes away (1: all of it)"
    if audit.counts == "recovery":
        told.append(f"{counts}.")
    if audit.counts == "gain":
        told.append(f"{counts}, beyond what it does on the base model.")
    told += _less(audit)
    if parts := [row.part for row in audit.rows if row.part is not None]:
        told.append(
            "A part counts as copied where it is as like its training image as copies are, and stands out by more than "
            f"{1 - parts[0].chance:.1%} of pairs of different training images do."
        )
    if audit.copy_threshold is None and not audit.captions_alone:
        told.append("For these features no similarity is established from which an image is a copy.")
    told += audit.remarks
    if audit.skipped:
        told.append(f"{in_short(audit.skipped)}.")
    unmeasured = sum(row.q_value is None for row in audit.rows)
    if unmeasured:
        told.append(f"{unmeasured:,} could not be measured: their rows say why.")
    return told


def _less(audit: Audit) -> list[str]:
    """Up to which strength and epoch of a LoRA no caption is named, and what of its style is left there."""
    told = []
    flagged = [point.strength for point in audit.strengths if point.flagged]
    if flagged:
        below = [point for point in audit.strengths if point.strength < min(flagged)]
        calm = "captions are named at every strength"
        if below:
            best = max(below, key=lambda point: point.strength)
            calm = f"up to a strength of {best.strength:g} none is named{_at_a_cost(best)}"
        told.append(f"Of the strengths that were measured, {calm}.")
    if any(point.flagged for point in audit.epochs):
        before = [point for point in audit.epochs if point.epoch is not None and point.epoch < (audit.begins or 0)]
        calm = "captions are named at the first"
        if before:
            last = max(before, key=lambda point: point.epoch or 0)
            calm = f"epoch {last.epoch} is the last of which none is named{_at_a_cost(last)}"
        told.append(f"Of the saved epochs, {calm}.")
    return told


def _at_a_cost(point: Point) -> str:
    return "" if point.likeness is None else f", at {point.likeness:.0%} of the likeness to the training set's style"


def verdict_of(row: Row) -> str:
    """'Copied', 'Partly copied', 'Named', 'Not named' or 'Not measured'."""
    if row.copies or row.parts:
        return "Copied" if row.copies else "Partly copied"
    return {True: "Named", False: "Not named", None: "Not measured"}[row.flagged]


def figures(row: Row) -> dict[str, str]:
    """What was measured, as text; empty where it was not."""
    return {
        "score": "" if row.score is None else number(row.score),
        "p": "" if row.p_value is None else f"{row.p_value:.2g}",
        "q": "" if row.q_value is None else f"{row.q_value:.2g}",
        "copies": "" if row.copies is None else f"{row.copies} of {row.drawn}",
        "similarity": "" if row.similarity is None else f"{row.similarity:.2f}",
        "parts": "" if row.parts is None else f"{row.parts} of {row.drawn}",
        "part": "" if row.part is None else f"drawn again {row.part_drawn}: {part_text(row.part)}",
    }


def ranked(audit: Audit) -> list[Row]:
    """The rows, worst first: copied ones, partly copied ones, then those named, then by their q-value."""
    return sorted(audit.rows, key=_rank)


def _rank(row: Row) -> tuple[bool, bool, bool, float, float]:
    return (
        not row.copies,
        not row.parts,
        not row.flagged,
        2.0 if row.q_value is None else row.q_value,
        -(row.score or 0.0),
    )


def row_as_json(row: Row) -> dict[str, Any]:
    """Plain values, without the images."""
    values = {f.name: getattr(row, f.name) for f in fields(Row) if f.name != "images"}
    values["part"] = None if row.part is None else row.part.as_json()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def as_json(audit: Audit, model: str, loras: list[str]) -> dict[str, Any]:
    """The whole finding as plain values, without the images."""
    return {**_head(audit, model, loras), "rows": [row_as_json(row) for row in audit.rows]}


def json_pieces(audit: Audit, model: str, loras: list[str]) -> Iterator[str]:
    """The text of :func:`as_json`, row by row: of a million rows the whole is never in memory."""
    yield json.dumps(_head(audit, model, loras), indent=1).removesuffix("\n}") + ',\n "rows": ['
    for place, row in enumerate(audit.rows):
        yield ("," if place else "") + "\n" + indent(json.dumps(row_as_json(row), indent=1), "  ")
    yield "\n ]\n}\n"


def _head(audit: Audit, model: str, loras: list[str]) -> dict[str, Any]:
    """All but the rows."""
    return {
        "format": "dejavu-audit",
        "schema_version": 2,
        "model": model,
        "loras": loras,
        "sentence": sentence(audit),
        "counts": audit.counts,
        "nulls": audit.nulls,
        "false_discovery_rate": audit.false_discovery_rate,
        "least_named": audit.least_named,
        "misfit": audit.misfit,
        "begins": audit.begins,
        "strengths": [asdict(point) for point in audit.strengths],
        "epochs": [asdict(point) for point in audit.epochs],
        "skipped": list(audit.skipped),
        "remarks": list(audit.remarks),
    }


def as_markdown(audit: Audit) -> str:
    """The finding, then a table of all rows, worst first."""
    head = ["verdict", "image", "caption", audit.counts, "p", "q", "copies", "copies of a part", "suggestion"]
    lines = [_line(head), _line(["---"] * len(head)), *(_line(_cells(row)) for row in ranked(audit))]
    told = [_as_text(note) if note in audit.remarks else note for note in notes(audit)]
    return "\n\n".join([f"{sentence(audit)}.", "\n".join(lines), "\n".join(told)])


def thumbnails_of(audit: Audit, subject: Subject) -> dict[str, bytes]:
    """The training image (a JPEG file) of each row that was drawn, by its name."""
    if subject.reference is None:
        return {}
    drawn = {row.image for row in audit.rows if row.images}
    rows = {entry.image: entry.row for entry in subject.entries if entry.image in drawn}
    return {
        row.image: bytes(subject.reference.thumbnails[number])
        for row in audit.rows
        if row.images and (number := rows[row.image]) is not None
    }


def settings_shown(
    audit: Audit, wanted: AuditSettings, measurement: Measurement, subject: Subject
) -> dict[str, object]:
    """What a report says of how it was made."""
    return {
        "False discovery rate": f"{wanted.false_discovery_rate:g}",
        "Ordinary prompts": audit.nulls,
        "Images a caption": measurement.images,
        "Steps": measurement.steps,
        "Seed": measurement.seed,
        "Compared by": "captions alone" if subject.reference is None else subject.reference.features,
    }


def _cells(row: Row) -> list[str]:
    shown = figures(row)
    told = [_as_text(text) for text in (row.image, row.caption)]
    return [
        verdict_of(row),
        *told,
        *(shown[name] for name in ("score", "p", "q", "copies", "parts")),
        _as_text(row.suggestion or row.why),
    ]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _as_text(text: str) -> str:
    """On one line, with all that Markdown or HTML would take for markup, a link or another cell shown as it is."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
