"""An audit as one self-contained HTML page: what was found, and the pictures of the worst captions."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..training.audit import Audit, Point, Row
from .html import template, writable
from .share_chart import share_chart
from .wording import number

ROWS_SHOWN = 200


@dataclass(frozen=True)
class AuditPage:
    """``thumbnails`` holds the training picture (a JPEG file) of each row with pictures, by its name."""

    audit: Audit
    model: str
    lora: str
    dataset: str
    thumbnails: Mapping[str, bytes]
    settings: Mapping[str, object]


def render_audit(page: AuditPage) -> str:
    """The page as text, to be written as UTF-8. All user-supplied text is escaped."""
    audit = page.audit
    ranked = sorted(audit.rows, key=_rank)
    shown = [_shown(row, page.thumbnails) for row in ranked[:ROWS_SHOWN]]
    return writable(
        template("audit.html.j2").render(
            page=page,
            sentence=sentence(audit),
            notes=notes(audit),
            rows=shown,
            left_out=max(0, len(ranked) - ROWS_SHOWN),
            worst=[row for row in shown if row["pictures"]],
            charts=[Markup(chart) for chart in _charts(audit)],
            counts=audit.counts,
        )
    )


def sentence(audit: Audit) -> str:
    """The finding in one sentence, without a full stop at the end."""
    named, copied, all_of_them = len(audit.flagged), len(audit.copied), len(audit.rows)
    what = "captions" if audit.counts == "magnitude" else "training pictures"
    drawn = sum(row.copies is not None for row in audit.rows)
    told = f"{named:,} of {all_of_them:,} {what} {'is' if named == 1 else 'are'} named as memorised"
    if not named:
        told = f"None of {all_of_them:,} {what} is named as memorised"
    if drawn:
        told += f"; of {drawn:,} that were drawn again, {copied or 'none'} came out as {'a copy' if copied == 1 else 'copies'}"
    return told if audit.begins is None else f"{told}; memorisation starts at epoch {audit.begins}"


def notes(audit: Audit) -> list[str]:
    """What one must know to read it."""
    told = [
        f"Of those named, in expectation at most {audit.false_discovery_rate:.0%} are named wrongly (Benjamini & "
        f"Hochberg, against {audit.nulls:,} ordinary prompts)."
    ]
    if audit.least_named > 1:
        told.append(
            f"With so many captions, at least {audit.least_named:,} must stand out together for any to be named: "
            "raise the number of ordinary prompts to name fewer."
        )
    if audit.counts == "magnitude":
        told.append("There were captions only, so nothing could be compared with the training pictures.")
    if audit.counts == "contrast":
        told.append(
            "What counts is how much more each caption leads towards its own training picture than to others. Name the base model to leave "
            "out what it does already."
        )
    if audit.counts == "gain":
        told.append(
            "What counts is how much more each caption leads towards its own training picture than to others, beyond "
            "what it does on the base model."
        )
    if audit.copy_threshold is None and audit.counts != "magnitude":
        told.append("For these features no similarity is established from which a picture is a copy.")
    unmeasured = sum(row.q_value is None for row in audit.rows)
    if unmeasured:
        told.append(f"{unmeasured:,} could not be measured: their rows say why.")
    return told


def _rank(row: Row) -> tuple[bool, bool, float, float]:
    return (not row.copies, not row.flagged, 2.0 if row.q_value is None else row.q_value, -(row.score or 0.0))


def _shown(row: Row, thumbnails: Mapping[str, bytes]) -> dict[str, object]:
    trained = thumbnails.get(row.image)
    return {
        "image": row.image,
        "caption": row.caption,
        "label": verdict_of(row),
        "score": "" if row.score is None else number(row.score),
        "p": "" if row.p_value is None else f"{row.p_value:.2g}",
        "q": "" if row.q_value is None else f"{row.q_value:.2g}",
        "copies": "" if row.copies is None else f"{row.copies} of {row.drawn}",
        "similarity": "" if row.similarity is None else f"{row.similarity:.2f}",
        "word": row.word or "",
        "suggestion": row.suggestion or row.why,
        "duplicates": row.duplicates,
        "near_duplicates": row.near_duplicates,
        "training": None if trained is None else _uri("jpeg", trained),
        "pictures": [_uri("png", picture) for picture in row.pictures],
    }


def verdict_of(row: Row) -> str:
    """'Copied', 'Named', 'Not named' or 'Not measured'."""
    if row.copies:
        return "Copied"
    return {True: "Named", False: "Not named", None: "Not measured"}[row.flagged]


def _charts(audit: Audit) -> Sequence[str]:
    def shares(points: Sequence[Point]) -> list[float]:
        return [point.flagged / point.captions if point.captions else 0.0 for point in points]

    found = []
    if audit.epochs:
        labels = [str(point.epoch) for point in audit.epochs]
        found.append(share_chart(labels, shares(audit.epochs), "Captions named at each saved epoch", "epoch"))
    if len(audit.strengths) > 1:
        labels = [f"{point.strength:g}" for point in audit.strengths]
        found.append(share_chart(labels, shares(audit.strengths), "Captions named at each strength", "strength"))
    return found


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
