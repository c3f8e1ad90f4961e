"""What a trainer makes of a caption's text, by its own rules.

Read in the sources of kohya's sd-scripts (``process_caption``), ai-toolkit (``get_caption``) and OneTrainer
(``LoadMultipleTexts``, ``SelectRandomText``, ``DropTags``).

One rule where a trainer draws at random: read is the caption that it drew most often, and of several as often the first.
So of several lines and of ``{a|b}`` it is the first one, tags stay in their order, and nothing is dropped, unless it always
is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .reading import Trainer
from .records import cleaned

KEPT_APART = "|||"  # kohya's usual separator of the tags that stay in place
_PLACES = re.compile(r"\[(?:trigger|name)\]")
_LIKE_CHOICE = re.compile(r"\{[^{}|]*\|[^{}]*\}")
FIRST_LINE = "only the first line of its caption is read, as the trainer does"
FIRST_VARIANT = (
    "its caption has several lines, of which the trainer draws one: the most frequent one is read, or the first"
)
FIRST_CHOICE = "the trainer draws one of {a|b} in its caption: the most frequent one is read, or the first"
AS_TEXT = "{a|b} in its caption is read as text: kohya's enable_wildcard is off where no configuration turns it on"
NO_TRIGGER = "[trigger] in its caption is read as text: give the trigger word, or ai-toolkit's configuration"


@dataclass(frozen=True)
class Rules:
    """How the captions of one folder are made, as far as a trainer lets a user choose.

    ``assumed``: no configuration says so. ``separator`` parts tags; ``kept_separator`` the tags that stay in place from the
    others, ``second_separator`` is put back to ``separator``; ``tags_apart`` says that tags are shuffled or dropped,
    which leads their text through another mill. Shares are 0 to 1.
    """

    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    wildcards: bool = False
    separator: str = ","
    kept: int = 0
    kept_separator: str = ""
    second_separator: str = ""
    tags_apart: bool = False
    dropout: float = 0.0
    tag_dropout: float = 0.0
    assumed: bool = True


def caption_of(trainer: Trainer, text: str, rules: Rules) -> tuple[str, str]:
    """(caption, note) of the text that was found for an image: in its file, a list, or as its folder's default."""
    if rules.dropout >= 1:
        return "", ""
    caption, note = _MAKERS[trainer](text.replace("\r\n", "\n").replace("\r", "\n"), rules)
    return cleaned(caption), note


def most_frequent(choices: Sequence[str]) -> str:
    """Of several as frequent the first.

    >>> most_frequent(["red", "blue", "blue"]), most_frequent(["red", "blue"])
    ('blue', 'red')
    """
    return Counter(choices).most_common(1)[0][0] if choices else ""


def _plain(text: str, rules: Rules) -> tuple[str, str]:
    return text, ""


def _kohya(text: str, rules: Rules) -> tuple[str, str]:
    lines = [line.strip() for line in text.split("\n")]
    caption = "\n".join(line for line in lines if line) if rules.wildcards else lines[0]
    note = FIRST_LINE if any(lines[1:]) else ""
    caption = f"{rules.prefix} {caption}" if rules.prefix else caption
    caption = f"{caption} {rules.suffix}" if rules.suffix else caption
    if rules.wildcards:
        note = FIRST_VARIANT if "\n" in caption else ""
        line = most_frequent(caption.split("\n"))
        caption = _drawn(line)
        note = note or (FIRST_CHOICE if _LIKE_CHOICE.search(line) else "")
    elif rules.assumed and not note and _LIKE_CHOICE.search(caption):
        note = AS_TEXT
    kept_separator = rules.kept_separator or (KEPT_APART if rules.assumed else "")
    if rules.tags_apart or (rules.assumed and kept_separator in caption):
        caption = _tags(caption, rules, kept_separator)
    if rules.second_separator:
        caption = caption.replace(rules.second_separator, rules.separator)
    return caption, note


def _drawn(caption: str) -> str:
    """With the most frequent of each ``{a|b}``; doubled braces are braces.

    >>> _drawn("a {red|blue|blue} {{hat}}")
    'a blue {hat}'
    """
    opening, closing = "\ue000", "\ue001"  # of the private use area, which no caption needs
    text = caption.replace("{{", opening).replace("}}", closing)
    found: list[str] = []
    done = 0
    while (start := text.find("{", done)) >= 0 and (end := text.find("}", start)) >= 0:
        drawn = most_frequent(text[start + 1 : end].split("|")) if end > start + 1 else "{}"
        found += [text[done:start], drawn]
        done = end + 1
    return "".join([*found, text[done:]]).replace(opening, "{").replace(closing, "}")


def _tags(caption: str, rules: Rules, kept_separator: str) -> str:
    """Tags that stay in place first, then the others, then those that stay at the end; the separators are gone."""

    def parted(text: str) -> list[str]:
        return [tag.strip() for tag in text.split(rules.separator) if tag.strip()]

    if kept_separator and kept_separator in caption:
        first, others, *last = caption.split(kept_separator, 2)
        fixed, flexible, end = parted(first), parted(others), parted(last[0] if last else "")
    else:
        tags = [tag.strip() for tag in caption.strip().split(rules.separator)]
        fixed, flexible, end = tags[: rules.kept], tags[rules.kept :], []
    return ", ".join([*fixed, *(flexible if rules.tag_dropout < 1 else []), *end])


def _onetrainer(text: str, rules: Rules) -> tuple[str, str]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    caption = most_frequent(lines)
    if rules.tags_apart:
        tags = [tag.strip() for tag in caption.split(rules.separator) if tag.strip()]
        caption = f"{rules.separator} ".join(tags if rules.tag_dropout < 1 else tags[: rules.kept])
    return caption, FIRST_VARIANT if len(set(lines)) > 1 else ""


def _ai_toolkit(text: str, rules: Rules) -> tuple[str, str]:
    tags = text.split(",")
    caption = ", ".join(tags if rules.tag_dropout < 1 else tags[: rules.kept])
    if not rules.trigger and rules.assumed:
        note = NO_TRIGGER if _PLACES.search(caption) else ""
    else:
        caption, note = _PLACES.sub(lambda _: rules.trigger, caption), ""
        if rules.trigger.strip() and rules.trigger not in caption:
            caption = f"{rules.trigger} {caption}"
    return re.sub(r"[ \t]+", " ", caption), note


_MAKERS: dict[Trainer, Callable[[str, Rules], tuple[str, str]]] = {
    "kohya": _kohya,
    "onetrainer": _onetrainer,
    "ai-toolkit": _ai_toolkit,
    "diffusers": _plain,
    "plain": _plain,
}
