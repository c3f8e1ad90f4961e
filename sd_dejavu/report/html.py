"""One self-contained HTML page about one or several prompts: no script, no address outside the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.verdict import BandStep, Verdict
from .chart import loss_sparkline, magnitude_chart
from .image import Pixels, png_uri, where_overlay
from .templating import rendered, writable
from .wording import beside_label, facts, label, number, p_text, sentence
from .words import word_legend, word_spans

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mitigated:
    """The same prompt run again under one mitigation.

    ``prompt`` is the new text where the method changes it. ``similarity`` compares the new images
    with the training image, ``moved`` is the distance the conditioning was moved by, relative to its norm, and ``losses``
    has one value an optimisation step.
    """

    method: str
    prompt: str | None = None
    verdict: Verdict | None = None
    images: Sequence[Pixels] = ()
    similarity: float | None = None
    losses: Sequence[float] = ()
    moved: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt: its verdict, the null band (L2), and the images of the plain run.

    ``where`` is the squared-difference map [h, w] of the first image. ``similarity`` compares the
    images with the training image; from ``copy_threshold`` up it counts as a copy.
    """

    verdict: Verdict
    band: Sequence[BandStep] = ()
    images: Sequence[Pixels] = ()
    where: Tensor | NDArray[Any] | None = None
    training_image: Pixels | None = None
    similarity: float | None = None
    copy_threshold: float | None = None
    mitigations: tuple[Mitigated, ...] = ()


@dataclass(frozen=True, eq=False)
class Report:
    """A page; ``settings`` are shown as they are, in their order."""

    title: str
    subtitle: str
    model: str
    cases: Sequence[Case]
    settings: Mapping[str, object] = field(default_factory=dict)


def render(report: Report) -> str:
    """The page as text, to be written as UTF-8. All user-supplied text is escaped."""
    labels = [label(case.verdict) for case in report.cases]
    tallied = {"Flagged": "flagged", "Not flagged": "not flagged", "No verdict": "without a verdict"}
    tally = ", ".join(f"{labels.count(name)} {text}" for name, text in tallied.items() if name in labels)
    page = rendered("report.html.j2", report=report, cases=[_case(c) for c in report.cases], tally=tally)
    return writable(page)


def similarity_text(similarity: float | None, copy_threshold: float | None) -> str:
    """'similarity 0.93, a copy (0.80 or more)'; empty where it was not measured."""
    if similarity is None:
        return ""
    if copy_threshold is None:
        return f"similarity {similarity:.2f}"
    if similarity >= copy_threshold:
        return f"similarity {similarity:.2f}, a copy ({copy_threshold:.2f} or more)"
    return f"similarity {similarity:.2f}, not a copy (below {copy_threshold:.2f})"


def _case(case: Case) -> dict[str, object]:
    verdict = case.verdict
    return {
        "label": label(verdict),
        "sentence": beside_label(verdict),
        "prompt": verdict.prompt,
        "words": word_spans(verdict.prompt, verdict.explanation, verdict.flagged is not True),
        "legend": word_legend(verdict.explanation, verdict.flagged is not True)
        if verdict.explanation and verdict.explanation.words
        else None,
        "facts": facts(verdict),
        "charts": _charts(case, None, (560, 320)),
        "images": [png_uri(p) for p in case.images],
        "where": None if case.where is None else png_uri(_where(case)),
        "training": None if case.training_image is None else png_uri(case.training_image),
        "training_name": _training_name(case),
        "similarity": similarity_text(case.similarity, case.copy_threshold),
        "mitigations": [_mitigated(case, m) for m in case.mitigations],
    }


def _training_name(case: Case) -> str:
    if case.similarity is None or case.copy_threshold is None:
        return "Training image"
    return "Training image it copies" if case.similarity >= case.copy_threshold else "Nearest training image"


def _mitigated(case: Case, after: Mitigated) -> dict[str, object]:
    return {
        "method": after.method,
        "note": after.note,
        "sentence": after.verdict and sentence(after.verdict),
        "prompt": after.prompt and word_spans(after.prompt, None),
        "images": [png_uri(p) for p in after.images],
        "similarity": similarity_text(after.similarity, case.copy_threshold),
        "rows": _rows(case, after),
        "moved": None if after.moved is None else number(after.moved),
        "losses": loss_sparkline(after.losses),
        "loss_ends": [number(v) for v in (after.losses[0], after.losses[-1])] if len(after.losses) else [],
        "steps": len(after.losses),
        "charts": _charts(case, after.verdict, (320,)) if after.verdict else [],
    }


def _rows(case: Case, after: Mitigated) -> list[tuple[str, str, str]]:
    """(name, before, after) of what was measured at least after the mitigation."""
    rows = []
    if after.verdict and after.verdict.score is not None:
        rows.append(("Score", _shown(case.verdict.score), number(after.verdict.score)))
    if after.verdict and after.verdict.p_value is not None:
        rows.append(("p", _p(case.verdict), _p(after.verdict)))
    if after.similarity is not None:
        rows.append(("Similarity", _shown(case.similarity, 2), _shown(after.similarity, 2)))
    return rows


def _p(verdict: Verdict) -> str:
    return p_text(verdict).removeprefix("p ").removeprefix("= ")


def _shown(value: float | None, decimals: int | None = None) -> str:
    if value is None:
        return "not measured"
    return number(value) if decimals is None else f"{value:.{decimals}f}"


def _charts(case: Case, after: Verdict | None, widths: Sequence[int]) -> list[str]:
    """The same chart for wide and for narrow screens; none where no step was seen. The band holds L2 values."""
    steps, steps_after = case.verdict.score_per_step, after.score_per_step if after else None
    if not steps or steps_after == ():
        return []
    return [magnitude_chart(steps, case.band, steps_after, width) for width in widths]


def _where(case: Case) -> Pixels:
    assert case.where is not None
    image = case.images[0] if case.images else np.zeros((*case.where.shape[-2:], 3), np.uint8)
    return where_overlay(image, case.where)
