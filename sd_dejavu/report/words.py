"""The prompt as HTML, every word shaded by its significance. All of the user's text is escaped."""

from __future__ import annotations

from markupsafe import Markup, escape

from ..verdict import Explanation, WordSignificance
from .wording import number, top_words_text

SHADE = "rgb(var(--dejavu-word, 213 94 0) / {alpha:.2f})"
DARKEST, THICKEST = 0.5, 4  # alpha of the shade, and pixels of underline, at significance 1

_OUTER = Markup('<span class="dejavu-words" dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">{}</span>')
_WORD = Markup('<span class="dejavu-word" tabindex="0" title="{title}" style="{style}">{text}</span>')


def word_spans(prompt: str, explanation: Explanation | None) -> Markup:
    """The prompt with white space kept; darker and more thickly underlined is more significant, the top word bold."""
    if explanation is None or not explanation.words:
        return _OUTER.format(prompt)
    if not prompt:  # a host that tells no text: numbered tokens
        chips = (_span(word, word.text, explanation) for word in explanation.words)
        return _OUTER.format(Markup(" ").join(chips))
    parts, reached = Markup(), 0
    for word in sorted(explanation.words, key=lambda w: w.start):
        parts += escape(prompt[reached : word.start])
        parts += _span(word, prompt[word.start : word.end], explanation)
        reached = word.end
    return _OUTER.format(parts + escape(prompt[reached:]))


def _span(word: WordSignificance, text: str, explanation: Explanation) -> Markup:
    return _WORD.format(title=_value(word, explanation), style=_style(word, explanation), text=text)


def word_legend(explanation: Explanation) -> Markup:
    """What the shading means, how significance was found, and the top words with their values as text."""
    swatch = Markup('<span class="dejavu-swatch" style="padding:0 .35em;{}">{:g}</span>')
    scale = Markup("").join(swatch.format(_shade(s), s) for s in (0, 0.25, 0.5, 0.75, 1))
    return Markup(
        '<span class="dejavu-legend">Significance by {view}: {scale} '
        '(darker, thicker line: more; bold: most). Highest: <span dir="auto">{top}</span>.</span>'
    ).format(view=explanation.view, scale=scale, top=top_words_text(explanation))


def _value(word: WordSignificance, explanation: Explanation) -> str:
    return f"significance {word.significance:.2f}, {number(word.raw)} ({explanation.raw_unit})"


def _style(word: WordSignificance, explanation: Explanation) -> str:
    return _shade(word.significance) + (";font-weight:700" if word == explanation.top else "")


def _shade(significance: float) -> str:
    level = min(1.0, max(0.0, significance))
    # Whole pixels: browsers draw any line above zero at least one pixel thick.
    return f"background-color:{SHADE.format(alpha=DARKEST * level)};border-bottom:{round(THICKEST * level)}px solid"
