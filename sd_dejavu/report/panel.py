"""Reports on the pictures of one run as a piece of a page: for hosts that show HTML and run no script in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..run.report import Report
from ..trace import NotMeasured
from ..verdict import Verdict
from .chart import loss_sparkline, magnitude_chart
from .picture import colours, png_uri
from .wording import beside_label, changed, facts, label, sentence
from .words import word_legend, word_spans

_PANEL = Markup('<div class="dejavu-panel" data-dejavu="panel">{}</div>')
_PICTURE = Markup(
    '<section class="dejavu-picture" aria-label="{title}"><h4>{title}</h4>'
    '<p class="dejavu-verdict"><strong class="dejavu-label">{label}</strong> {sentence}.</p>{body}</section>'
)
_WORDS = Markup('<div class="dejavu-prompt" data-dejavu="prompt">{words}</div><p>{legend}</p>')
_WHERE = Markup('<img class="dejavu-where" alt="Where in the picture the prompt acts: brighter is more" src="{}">')
_FOLDED = Markup("<details><summary>Figures</summary><dl>{}</dl></details>")
_FACT = Markup("<dt>{}</dt><dd>{}</dd>")


def panel(reports: Sequence[tuple[str, Report]]) -> Markup:
    """(title, report on one picture) each as a section; all of the user's text is escaped."""
    if not reports:
        return _PANEL.format("No run has been watched yet.")
    return _PANEL.format(Markup("").join(_picture(title, report) for title, report in reports))


def plain_text(reports: Sequence[tuple[str, Report]]) -> str:
    """The same in a line for each picture."""
    return "\n".join(f"{title}: {sentence(r.verdicts[0])}" for title, r in reports)


def paragraph(text: str) -> Markup:
    """A text that is not known to be harmless, as a paragraph."""
    return Markup("<p>{}</p>").format(text)


def framed(page: str, title: str) -> Markup:
    """A whole page of our own inside another one, apart from its styles and scripts."""
    frame = '<iframe class="dejavu-frame" sandbox title="{}" srcdoc="{}"></iframe>'
    return Markup(frame).format(title, page)


def _picture(title: str, report: Report) -> Markup:
    (verdict,) = report.verdicts
    parts = [
        _WORDS.format(words=word_spans(verdict.prompt, verdict.explanation), legend=_legend(verdict)),
        _charts(report, verdict),
        _mitigation(report),
        *(Markup('<p class="dejavu-note">{}.</p>').format(note) for note in report.state.notes),
        _FOLDED.format(Markup("").join(_FACT.format(*fact) for fact in facts(verdict))),
    ]
    return _PICTURE.format(
        title=title, label=label(verdict), sentence=beside_label(verdict), body=Markup("").join(parts)
    )


def _legend(verdict: Verdict) -> Markup:
    explained = verdict.explanation is not None and verdict.explanation.words
    return word_legend(verdict.explanation) if explained and verdict.explanation else Markup("")


def _charts(report: Report, verdict: Verdict) -> Markup:
    if not verdict.score_per_step:
        return Markup("")
    band, _ = report.ordinary()
    # In the batch's only trace the first reading of a mitigated run stands before the mitigation.
    after = report.after[0].score_per_step if report.after else None
    chart = Markup(magnitude_chart(verdict.score_per_step, band, after, 460, 220))
    try:
        values = report.maps()[0].double().numpy()
    except NotMeasured:
        return chart
    scaled = (values - values.min()) / (np.ptp(values) or 1)
    return chart + _WHERE.format(png_uri(np.rint(colours(scaled)).astype(np.uint8)))


def _mitigation(report: Report) -> Markup:
    outcome = report.state.outcome
    if outcome is None:
        return Markup("")
    told = changed(outcome)
    moved = outcome.details.get("moved")
    if moved is not None:
        told += f" The conditioning moved by {moved:.0%} of its length."
    if outcome.conditioning.prompt and outcome.conditioning.prompt != report.state.prompt:
        told += f" Prompt: {outcome.conditioning.prompt}"
    losses = outcome.details.get("losses", ())
    return Markup("<p>{} {}</p>").format(told, Markup(loss_sparkline(losses)) if losses else "")
