"""Reports on the images of one run as a piece of a page: for hosts that show HTML and run no script in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ..core.progress import duration
from ..core.trace import NotMeasured
from ..core.verdict import Verdict
from ..doctor import Finding, headline
from ..run.report import Report
from ..training.repair import Repaired
from .chart import loss_sparkline, magnitude_chart
from .image import colours, png_uri, tells_parts
from .repair_rows import HEAD, cells
from .repair_rows import sentence as sentence_of
from .templating import macro, rendered
from .wording import beside_label, changed, facts, label, sentence
from .words import NO_WORDS, without_word, word_legend, word_spans


@dataclass(frozen=True)
class Offer:
    """To calibrate for these images: (ordinary prompts, seconds that they take), the quickest first.

    With ``whole_runs`` each of the prompts is sampled to the end.
    """

    choices: tuple[tuple[int, float], ...]
    whole_runs: bool = False


def panel(reports: Sequence[tuple[str, Report]], offer: Offer | None = None) -> str:
    """(title, report on one image) each as a section; all of the user's text is escaped.

    Where an ``offer`` is made, buttons for it come first; what they do is the page's.
    """
    images = [_image(title, report) for title, report in reports]
    return rendered("panel.html.j2", images=images, offer=_offered(offer), from_image=_from_image(reports))


def plain_text(reports: Sequence[tuple[str, Report]]) -> str:
    """The same in a line for each image."""
    return "\n".join(f"{title}: {sentence(r.verdicts[0])}" for title, r in reports)


def paragraph(text: str, figures: str = "") -> Markup:
    """A text that is not known to be harmless, as a paragraph; behind it the ``figures`` that not everybody reads."""
    return macro("paragraph", text, figures)


def framed(page: str, title: str) -> Markup:
    """A whole page of our own inside another one, apart from its styles and scripts."""
    return macro("frame", page, title)


def findings(lines: Sequence[Finding]) -> Markup:
    """What works on this machine: whether all does, and a line each."""
    return macro("findings", headline(lines), lines)


def course(found: Repaired, file: str) -> Markup:
    """What a repair has reached, where the new LoRA lies, and all that was tried."""
    return macro("course", f"{sentence_of(found)} Saved as {file}.", HEAD, [cells(point) for point in found.curve])


def _image(title: str, report: Report) -> dict[str, object]:
    (verdict,) = report.verdicts
    outcome, explanation = report.state.outcome, verdict.explanation
    calm = verdict.flagged is not True
    _, ordinary = report.ordinary()
    first = verdict.score if verdict.score_kind == "first step" else None
    return {
        "title": title,
        "label": label(verdict),
        "sentence": beside_label(verdict),
        "calm": calm,
        "waits": can_be_calibrated(report),
        "words": word_spans(
            verdict.prompt,
            explanation,
            calm,
            lambda word: f"counts {word.significance:.2f} of 1. {without_word(word, first, ordinary)}",
        ),
        "legend": word_legend(explanation, calm) if explanation and explanation.words else NO_WORDS,
        "has_words": bool(explanation and explanation.words),
        "chart": _chart(report, verdict),
        "where": _where(report) if verdict.score_per_step else "",
        "mitigation": _mitigation(report),
        "losses": loss_sparkline(outcome.details.get("losses", ())) if outcome else "",
        "notes": report.state.notes,
        "facts": facts(verdict),
    }


def can_be_calibrated(report: Report) -> bool:
    """Whether a calibration would give this image its verdict."""
    setting = report.state.setting
    return report.verdicts[0].lacks_calibration and setting is not None and setting.begins_with == "noise"


def _offered(offer: Offer | None) -> list[tuple[int, str]]:
    """(ordinary prompts, what is said of so many)."""
    if offer is None:
        return []
    what = "samples {} ordinary prompts to the end" if offer.whole_runs else "measures {} ordinary prompts"
    return [
        (
            count,
            f"{what.format(f'{count:,}').capitalize()} once ({duration(seconds)}). P-values then come in steps of 1 in "
            f"{count:,}.",
        )
        for count, seconds in offer.choices
    ]


def _from_image(reports: Sequence[tuple[str, Report]]) -> bool:
    """Whether images get no verdict because their runs begin with an image."""
    verdicts = [(report.state.setting, report.verdicts[0]) for _, report in reports]
    return any(
        setting is not None and setting.begins_with == "an image" and verdict.flagged is None
        for setting, verdict in verdicts
    )


def _chart(report: Report, verdict: Verdict) -> str:
    if not verdict.score_per_step:
        return ""
    band, _ = report.ordinary()
    # In the batch's only trace the first reading of a mitigated run stands before the mitigation.
    after = report.after[0].score_per_step if report.after else None
    return magnitude_chart(verdict.score_per_step, band, after, 460, 220)


def _where(report: Report) -> str:
    """The map as an image; '' where there is none, or it tells no part of the image from another."""
    try:
        values = report.maps()[0].double().numpy()
    except NotMeasured:
        return ""
    if not tells_parts(values):
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
