"""What goes to a terminal: a verdict, and whatever else holds text that others wrote.

Everything is said in text too, for NO_COLOR and for pipes. Prompts, captions, paths and messages go through
:func:`plain` or :func:`one_line`, so that no markup in them is read and no character steers the terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..core.verdict import Verdict
from .wording import facts, label, sentence, top_words_text

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
GAP = "·"
_PALE, _STRONG = (255, 236, 214), (224, 112, 20)  # both bear black text at a contrast above 6:1
_CALM = 0.3  # of the shade, where the prompt is not flagged
# Controls but the line break, turns of the writing direction, and halves of characters.
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BORDER = {True: "red", False: "green", None: "yellow"}


def verdict_panel(verdict: Verdict) -> RenderableType:
    """The sentence, the prompt with its words shaded by significance, and what stands behind the verdict."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if verdict.explanation and verdict.explanation.words:
        table.add_row("Words", plain(f"{top_words_text(verdict.explanation)} (how much each counts, of 1)"))
    for name, value in facts(verdict):
        table.add_row(name, plain(value))
    if len(verdict.score_per_step) > 1:
        table.add_row("Per step", Text(step_sparkline([value for _, value in verdict.score_per_step])))
    body = Group(plain(sentence(verdict), style="bold"), Text(), _prompt(verdict), Text(), table)
    border = _BORDER[verdict.flagged]
    return Panel(body, title=f"Déjà Vu: {label(verdict)}", title_align="left", border_style=border)


def step_sparkline(values: Sequence[float | None]) -> str:
    """One block a value, from 0 to the highest; a dot where nothing was measured."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    highest = max(known, default=0.0) or 1.0
    return "".join(
        GAP if v is None or not math.isfinite(v) else BLOCKS[min(7, max(0, int(8 * v / highest)))] for v in values
    )


def _prompt(verdict: Verdict) -> Text:
    text = plain(verdict.prompt)
    text.overflow = "fold"
    explanation, flagged = verdict.explanation, verdict.flagged is True
    for word in explanation.words if explanation else ():
        level = min(1.0, max(0.0, word.significance)) * (1 if flagged else _CALM)
        red, green, blue = (round(p + (s - p) * level) for p, s in zip(_PALE, _STRONG, strict=True))
        if level >= 0.05:
            text.stylize(f"black on rgb({red},{green},{blue})", word.start, word.end)
        if flagged and explanation and word == explanation.top:
            text.stylize("bold", word.start, word.end)
    return text


def plain(text: object, style: str = "") -> Text:
    """For every cell, title and line that rich prints: the text as it is, without markup."""
    return Text(safe(str(text)), style)


def one_line(text: object) -> str:
    """For messages, which are one line each: line breaks become blanks."""
    return safe(" ".join(line.strip() for line in str(text).splitlines()))


def safe(text: str) -> str:
    """The same number of characters, none of which can steer the terminal or fail to be encoded."""
    return STEERING.sub("\ufffd", text)
