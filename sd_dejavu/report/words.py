"""The prompt as HTML, every word shaded by its significance. All of the user's text is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from markupsafe import Markup

from ..core.verdict import Explanation, WordSignificance
from .templating import macro
from .wording import number, top_words_text

SHADE = "rgb(var(--dejavu-word, 213 94 0) / {alpha:.2f})"
DARKEST, THICKEST = 0.5, 4  # alpha of the shade, and pixels of underline, at significance 1
CALM = "rgb(128 128 128 / {alpha:.2f})"
PALEST = 0.3  # alpha at significance 1 of a prompt that is not flagged: pale, with no line and no bold word
NO_WORDS = "No words were looked at: that is done where an image is flagged, or always if 'Explain' says so."

Piece = tuple[str, str | None, str, str]  # text; of a word its style, what is told on hover, and when it is opened


def word_spans(
    prompt: str,
    explanation: Explanation | None,
    calm: bool = False,
    told: Callable[[WordSignificance], str] = lambda word: "",
) -> Markup:
    """The prompt with white space kept; darker and more thickly underlined is more significant, the top word bold.

    ``calm`` is for a prompt that is not flagged, whose words are pale; ``told`` says more of each word, for pages
    that open one.
    """
    return macro("words", _pieces(prompt, explanation, calm, told))


def word_legend(explanation: Explanation, calm: bool = False) -> Markup:
    """What the shading means, how significance was found, and the top words with their values as text."""
    scale = [(f"{level:g}", _shade(level, calm)) for level in (0, 0.25, 0.5, 0.75, 1)]
    return macro("legend", explanation.view, scale, top_words_text(explanation), calm)


def without_word(word: WordSignificance, score: float | None, ordinary: Mapping[str, float] | None) -> str:
    """What the score would be without a word, in a sentence; ``ordinary`` has the median of others."""
    if word.score_without is None:
        return "This run did not measure what the score would be without it."
    now = "" if score is None else f" instead of {number(score)}"
    others = "" if ordinary is None else f"; ordinary prompts score about {number(ordinary['median'])}"
    return f"Without it the first step would score about {number(word.score_without)}{now}{others}."


def _pieces(
    prompt: str, explanation: Explanation | None, calm: bool, told: Callable[[WordSignificance], str]
) -> list[Piece]:
    if explanation is None or not explanation.words:
        return [(prompt, None, "", "")]

    def piece(word: WordSignificance, text: str) -> Piece:
        bold = ";font-weight:700" if word == explanation.top and not calm else ""
        value = f"significance {word.significance:.2f}, {number(word.raw)} ({explanation.raw_unit})"
        return text, _shade(word.significance, calm) + bold, value, told(word)

    if not prompt:  # a host that tells no text: numbered tokens
        return [one for word in explanation.words for one in ((" ", None, "", ""), piece(word, word.text))][1:]
    found: list[Piece] = []
    reached = 0
    for word in sorted(explanation.words, key=lambda w: w.start):
        found += [(prompt[reached : word.start], None, "", ""), piece(word, prompt[word.start : word.end])]
        reached = word.end
    return [*found, (prompt[reached:], None, "", "")]


def _shade(significance: float, calm: bool = False) -> str:
    level = min(1.0, max(0.0, significance))
    if calm:
        return f"background-color:{CALM.format(alpha=PALEST * level)}"
    # Whole pixels: browsers draw any line above zero at least one pixel thick.
    return f"background-color:{SHADE.format(alpha=DARKEST * level)};border-bottom:{round(THICKEST * level)}px solid"
