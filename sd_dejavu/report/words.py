"""The prompt as HTML, every word shaded by its significance. All of the user's text is escaped."""

from __future__ import annotations

from markupsafe import Markup

from ..core.verdict import Explanation, WordSignificance
from .templating import macro
from .wording import number, top_words_text

SHADE = "rgb(var(--dejavu-word, 213 94 0) / {alpha:.2f})"
DARKEST, THICKEST = 0.5, 4  # alpha of the shade, and pixels of underline, at significance 1

Piece = tuple[str, str | None, str]  # text, and of a word its style and what is told on hover


def word_spans(prompt: str, explanation: Explanation | None) -> Markup:
    """The prompt with white space kept; darker and more thickly underlined is more significant, the top word bold."""
    return macro("words", _pieces(prompt, explanation))


def word_legend(explanation: Explanation) -> Markup:
    """What the shading means, how significance was found, and the top words with their values as text."""
    scale = [(f"{level:g}", _shade(level)) for level in (0, 0.25, 0.5, 0.75, 1)]
    return macro("legend", explanation.view, scale, top_words_text(explanation))


def _pieces(prompt: str, explanation: Explanation | None) -> list[Piece]:
    if explanation is None or not explanation.words:
        return [(prompt, None, "")]
    if not prompt:  # a host that tells no text: numbered tokens
        return [
            piece for word in explanation.words for piece in ((" ", None, ""), _piece(word, word.text, explanation))
        ][1:]
    found: list[Piece] = []
    reached = 0
    for word in sorted(explanation.words, key=lambda w: w.start):
        found += [(prompt[reached : word.start], None, ""), _piece(word, prompt[word.start : word.end], explanation)]
        reached = word.end
    return [*found, (prompt[reached:], None, "")]


def _piece(word: WordSignificance, text: str, explanation: Explanation) -> Piece:
    bold = ";font-weight:700" if word == explanation.top else ""
    value = f"significance {word.significance:.2f}, {number(word.raw)} ({explanation.raw_unit})"
    return text, _shade(word.significance) + bold, value


def _shade(significance: float) -> str:
    level = min(1.0, max(0.0, significance))
    # Whole pixels: browsers draw any line above zero at least one pixel thick.
    return f"background-color:{SHADE.format(alpha=DARKEST * level)};border-bottom:{round(THICKEST * level)}px solid"
