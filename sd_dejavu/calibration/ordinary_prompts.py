"""Ordinary prompts: the null distribution for a real Stable Diffusion model.

A p-value compares a prompt with prompts nobody trained on, so these are written by a small grammar of
our own rather than copied from a caption list. They keep the idioms of web captions (stock-photo
titles, product names, news lines, 'How To ...'), because against bland prompts any detector would
look good: letter case alone tells the usual memorised list from the usual ordinary one. All people,
towns and shops are invented. The grammar and its words are in ordinary_prompts.json.

A slot ``{name}`` of the grammar stands for one of its options, which may hold slots themselves;
within one prompt no option is used twice while another is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median

STYLES = ("sentence", "title", "tags", "short", "long")

_MAX_FAILURES_IN_A_ROW = 1000


_LISTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

_WORDS: dict[str, Sequence[str]] = {
    **_LISTS["options"],
    **{name: [start + end for start in starts for end in ends] for name, (starts, ends) in _LISTS["joined"].items()},
    "number": [str(n) for n in (5, 7, 8, 9, 10, 11, 12, 14, 15, 17, 20, 21, 23, 25, 30, 40)],
    "year": [str(n) for n in range(1902, 2020)],
    "code": [f"{letters}-{n}" for letters in ["KT", "HB", "RM", "LV", "DX"] for n in range(113, 990, 29)],
}

_SLOT = re.compile(r"\{(\w+)\}")
_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one|uni|use|eu)")
_SMALL_WORDS = frozenset(_LISTS["small words"])
_NOT_CASED_IN_TITLES = _SMALL_WORDS | frozenset(_LISTS["not cased in titles"])
_SENTENCE_WORDS = frozenset(_LISTS["sentence words"])


def ordinary_prompts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """``count`` distinct (prompt, style), styles in equal shares and in turn.

    Distinct also without regard to letter case, which CLIP's tokenizer drops. The same arguments give
    the same prompts on every machine, and a smaller count gives the beginning of a larger one, so that
    a profile can be extended.

    >>> [style for prompt, style in ordinary_prompts(6)]
    ['sentence', 'title', 'tags', 'short', 'long', 'sentence']
    """
    if count < 0:
        raise ValueError(f"the number of prompts is {count}: give 0 or more")
    rng = Random(seed)
    found: list[tuple[str, str]] = []
    seen: set[str] = set()
    failures = 0
    while len(found) < count:
        style = STYLES[len(found) % len(STYLES)]
        prompt = _one(style, rng)
        if (folded := prompt.casefold()) not in seen:
            seen.add(folded)
            found.append((prompt, style))
            failures = 0
        elif (failures := failures + 1) > _MAX_FAILURES_IN_A_ROW:
            raise ValueError(
                f"{count} distinct prompts are too many: style {style!r} ran out after {len(found)} prompts; ask for fewer"
            )
    return found


def general_prompts(count: int) -> list[str]:
    """The same without their styles, for a model of which nothing more is known.

    >>> general_prompts(2) == [prompt for prompt, style in ordinary_prompts(2)]
    True
    """
    return [prompt for prompt, _ in ordinary_prompts(count)]


def style_of(prompt: str) -> str:
    """Which of :data:`STYLES` a prompt is nearest to. The first rule that fits decides:

    1. at most 2 words: *short*;
    2. at least 60% of the words in Title Case (small words such as 'of', 'the' do not count): *title*;
    3. commas, with at most 3 words in the median part between them: *tags*;
    4. at least 13 words: *long*;
    5. at most 3 words, or at most 6 with no article, number word, possessive, 'is' or 'are': *short*;
    6. all else: *sentence*.

    A word is anything between blanks that holds a letter or a digit.

    >>> style_of("castle, sunset, oil painting"), style_of("The Edge of a Lake")
    ('tags', 'title')
    """
    words = [w for w in prompt.split() if any(c.isalnum() for c in w)]
    if len(words) <= 2:
        return "short"
    bare = [re.sub(r"^\W+|\W+$", "", w) for w in words]
    telling = [w for w in bare if w[:1].isalpha() and w.lower() not in _NOT_CASED_IN_TITLES]
    if sum(w[0].isupper() for w in telling) >= 0.6 * max(1, len(telling)):
        return "title"
    parts = [len(part.split()) for part in prompt.split(",") if part.strip()]
    if len(parts) > 1 and median(parts) <= 3:
        return "tags"
    if len(words) >= 13:
        return "long"
    if len(words) <= 3 or (len(words) <= 6 and not _SENTENCE_WORDS.intersection(w.lower() for w in bare)):
        return "short"
    return "sentence"


def _pick(options: Sequence[str], rng: Random) -> str:
    # Python promises the same stream for random(), not for choice().
    return options[int(rng.random() * len(options))]


def _expand(text: str, rng: Random, used: set[str]) -> str:
    def option(slot: re.Match[str]) -> str:
        options = _WORDS[slot[1]]
        chosen = _pick([o for o in options if o not in used] or options, rng)
        used.add(chosen)
        return _expand(chosen, rng, used)

    return _SLOT.sub(option, text)


def _one(style: str, rng: Random) -> str:
    text = _expand(f"{{{style}}}", rng, set())
    text = _A_BEFORE_VOWEL.sub(r"\1n ", text)
    # Letter case as people write it: mostly lower, some sentences with a capital and a full stop.
    draw = rng.random()
    if style == "title":
        return _title_case(text, small_words=draw < 0.5)
    if draw < 0.7:
        return text
    capitalised = text[:1].upper() + text[1:]
    return f"{capitalised}." if style in ("sentence", "long") and draw > 0.85 else capitalised


def _title_case(text: str, small_words: bool) -> str:
    """'the edge of a lake' as 'The Edge of a Lake', or as 'The Edge Of A Lake' without small words."""
    words = text.split()
    return " ".join(
        word if small_words and number and word in _SMALL_WORDS else word[:1].upper() + word[1:]
        for number, word in enumerate(words)
    )
