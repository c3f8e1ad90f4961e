"""Reports on the images of one run as a piece of a page: for hosts that show HTML and run no script in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..core.trace import NotMeasured
from ..core.verdict import Verdict
from ..run.report import Report
from .chart import loss_sparkline, magnitude_chart
from .image import colours, png_uri
from .templating import macro, rendered
from .wording import beside_label, changed, facts, label, sentence
from .words import word_legend, word_spans


def panel(reports: Sequence[tuple[str, Report]]) -> str:
    """(title, report on one image) each as a section; all of the user's text is escaped."""
    return rendered("panel.html.j2", images=[_image(title, report) for title, report in reports])


def plain_text(reports: Sequence[tuple[str, Report]]) -> str:
    """The same in a line for each image."""
    return "\n".join(f"{title}: {sentence(r.verdicts[0])}" for title, r in reports)


def paragraph(text: str) -> Markup:
    """A text that is not known to be harmless, as a paragraph."""
    return macro("paragraph", text)


def framed(page: str, title: str) -> Markup:
    """A whole page of our own inside another one, apart from its styles and scripts."""
    return macro("frame", page, title)


def _image(title: str, report: Report) -> dict[str, object]:
    (verdict,) = report.verdicts
    outcome, explanation = report.state.outcome, verdict.explanation
    return {
        "title": title,
        "label": label(verdict),
        "sentence": beside_label(verdict),
        "words": word_spans(verdict.prompt, explanation),
        "legend": word_legend(explanation) if explanation and explanation.words else "",
        "chart": _chart(report, verdict),
        "where": _where(report) if verdict.score_per_step else "",
        "mitigation": _mitigation(report),
        "losses": loss_sparkline(outcome.details.get("losses", ())) if outcome else "",
        "notes": report.state.notes,
        "facts": facts(verdict),
    }


def _chart(report: Report, verdict: Verdict) -> str:
    if not verdict.score_per_step:
        return ""
    band, _ = report.ordinary()
    # In the batch's only trace the first reading of a mitigated run stands before the mitigation.
    after = report.after[0].score_per_step if report.after else None
    return magnitude_chart(verdict.score_per_step, band, after, 460, 220)


def _where(report: Report) -> str:
    try:
        values = report.maps()[0].double().numpy()
    except NotMeasured:
        return ""
    scaled = (values - values.min()) / (np.ptp(values) or 1)
    return png_uri(np.rint(colours(scaled)).astype(np.uint8))


def _mitigation(report: Report) -> str:
    outcome = report.state.outcome
    if outcome is None:
        return ""
    told = changed(outcome)
    moved = outcome.details.get("moved")
    if moved is not None:
        told += f" The conditioning moved by {moved:.0%} of its length."
    if outcome.conditioning.prompt and outcome.conditioning.prompt != report.state.prompt:
        told += f" Prompt: {outcome.conditioning.prompt}"
    return told
