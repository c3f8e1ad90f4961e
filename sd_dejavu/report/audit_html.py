"""An audit as one self-contained HTML page: what was found, and the images of the worst captions."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..training.audit import Audit, Point, Row
from .audit_rows import figures, notes, ranked, sentence, verdict_of
from .share_chart import share_chart
from .templating import rendered, writable

ROWS_SHOWN = 200


@dataclass(frozen=True)
class AuditPage:
    """``thumbnails`` holds the training image (a JPEG file) of each row with images, by its name."""

    audit: Audit
    model: str
    lora: str
    dataset: str
    thumbnails: Mapping[str, bytes]
    settings: Mapping[str, object]


def render_audit(page: AuditPage) -> str:
    """The page as text, to be written as UTF-8. All user-supplied text is escaped."""
    audit = page.audit
    rows = ranked(audit)
    shown = [_shown(row, page.thumbnails) for row in rows[:ROWS_SHOWN]]
    return writable(
        rendered(
            "audit.html.j2",
            page=page,
            sentence=sentence(audit),
            notes=notes(audit),
            rows=shown,
            left_out=max(0, len(rows) - ROWS_SHOWN),
            worst=[row for row in shown if row["images"]],
            charts=_charts(audit),
            counts=audit.counts,
        )
    )


def _shown(row: Row, thumbnails: Mapping[str, bytes]) -> dict[str, object]:
    trained = thumbnails.get(row.image)
    return {
        "image": row.image,
        "caption": row.caption,
        "label": verdict_of(row),
        **figures(row),
        "part_drawn": row.part_drawn,
        "drawn_frame": "" if row.part is None else _frame(row.part.box),
        "training_frame": "" if row.part is None else _frame(row.part.of_box),
        "word": row.word or "",
        "suggestion": row.suggestion or row.why,
        "duplicates": row.duplicates,
        "near_duplicates": row.near_duplicates,
        "training": None if trained is None else _uri("jpeg", trained),
        "images": [_uri("png", image) for image in row.images],
    }


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


def _frame(box: Sequence[float]) -> str:
    """Where a frame round a part of an image stands, as CSS."""
    left, top, right, bottom = (100 * share for share in box)
    return f"left:{left:g}%;top:{top:g}%;width:{right - left:g}%;height:{bottom - top:g}%"


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
