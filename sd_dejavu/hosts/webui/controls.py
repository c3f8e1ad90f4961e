"""The controls of the accordion, made from the core's settings; infotext and API arguments speak of the same ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

from ...core.settings import Option, check, named, of_text, options_of
from ...mitigations import perturb_prompt
from ...report.wording import label, number, p_text
from ...run.monitoring import Monitoring
from ...run.report import Report

TITLE = "Déjà Vu"
INFOTEXT = f"{TITLE} settings"
LINES = (TITLE, f"{TITLE} score", f"{TITLE} p-value")
NOT_CHANGED = "none"
NO_REFERENCES = "none"
SLIDER_LIMIT = 5000  # of wider ranges a slider picks nothing

_OWN: tuple[Option, ...] = (
    *options_of(Monitoring),
    Option(
        "perturb",
        NOT_CHANGED,
        "the published baselines: random words, random numbers or repeated words put into the prompt",
        str,
        choices=(NOT_CHANGED, *get_args(perturb_prompt.Perturbation)),
    ),
    *options_of(perturb_prompt.Settings),
    Option(
        "references",
        NO_REFERENCES,
        "anti-memorization guidance: lead every image away from these training images where it comes near one",
        str,
    ),
)
OPTIONS = tuple(sorted(_OWN, key=lambda known: known.later))  # the host knows saved arguments by their places


ENABLED = Option("enabled", False, "watch this run", bool)


@dataclass(frozen=True)
class Wanted:
    """What the user chose."""

    enabled: bool
    monitoring: Monitoring
    perturb: str
    insertions: int
    references: str


def read(arguments: Sequence[object], changes: Mapping[str, object] | None = None) -> Wanted:
    """From the script's arguments: (enabled, a value for each option), or one dictionary with some of them by name.

    A tail that is missing takes the defaults; ``changes`` go over all. Raises ValueError naming what is wrong.
    """
    every = (ENABLED, *OPTIONS)
    if arguments and isinstance(arguments[0], Mapping):
        given = {ENABLED.name: True, **arguments[0]}
    else:
        given = dict(zip((known.name for known in every), arguments, strict=False))
        if given.get(ENABLED.name) is None:  # what the host's API gives to a script that was not asked for
            given.pop(ENABLED.name, None)
    values = {known.name: known.default for known in every} | named({**given, **(changes or {})}, every, "Déjà Vu")
    for known in every:
        check(known, values[known.name])
    monitoring = Monitoring(**{field.name: values[field.name] for field in fields(Monitoring)})
    return Wanted(values["enabled"], monitoring, values["perturb"], values["insertions"], values["references"])


def perturbed(prompts: Sequence[str], seeds: Sequence[int], wanted: Wanted) -> list[str]:
    """The prompts with the published baseline put in, seeded as their images are."""
    if wanted.perturb == NOT_CHANGED:
        return list(prompts)
    kind: Any = wanted.perturb
    return [perturb_prompt.perturb(p, kind, wanted.insertions, int(s)) for p, s in zip(prompts, seeds, strict=True)]


def as_infotext(wanted: Wanted) -> str:
    """The settings that differ from their defaults, to be written into images and pasted back."""
    chosen = {**asdict(wanted), **asdict(wanted.monitoring)}
    changed = {known.name: chosen[known.name] for known in OPTIONS if chosen[known.name] != known.default}
    return "; ".join(f"{name}={_quoted(str(value))}" for name, value in changed.items()) or "default"


def _quoted(text: str) -> str:
    """As in an address, %3B stands for a semicolon, which would end a setting, and %20 for a blank at either end."""
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return "".join(
        c if begin <= place < end and c.isprintable() and c not in "%;" else quote(c, safe="")
        for place, c in enumerate(text)
    )


def pasted(known: Mapping[str, object], name: str) -> object:
    """The value of one option in an image's parameters: its default where they do not name it, None without any.

    None also for a value that the option cannot have, of another version: the control then stays as it is.
    """
    if INFOTEXT not in known:
        return None
    option = next(o for o in OPTIONS if o.name == name)
    values = dict(part.split("=", 1) for part in str(known[INFOTEXT]).split("; ") if "=" in part)
    written = values.get(name, values.get(option.id))
    if written is None:
        return option.default
    try:
        return of_text(option, unquote(written))
    except ValueError:
        return None


_LABELS = {  # where the name of an option says too little beside its control; Automatic1111 wants each once in a tab
    "baseline": "Measured against",
    "mitigation": "How to mitigate",
    "references": "Reference set",
    "count": "Ordinary prompts",
    "nulls": "Ordinary prompts",
    "replace": "Replace a larger calibration",
    "lora": "LoRA",
    "sample": "Captions",
    "worst": "Images drawn again",
    "false_discovery_rate": "Captions named wrongly",
    "restart": "Begin anew",
    "way": "What is held back",
    "most_copies": "Copies that may stay",
    "captions": "Captions drawn",
    "ordinary": "Ordinary prompts drawn",
}
_FREE_TEXT = ("folder", "name", "save_as", "trainer_config", "trigger_word")
LONGEST_INFO = 120  # characters


def label_of(known: Option) -> str:
    """What a control of the page is called."""
    return _LABELS.get(known.name, known.name.replace("_", " ").capitalize())


def told_of(known: Option) -> str:
    """What is said below it, on one line or two: of a long help its beginning, and nothing where that is its label.

    >>> told_of(Option("x", 1, "what is drawn: " + "and so on, " * 20, int))
    'What is drawn'
    """
    told = known.help
    if len(told) > LONGEST_INFO:
        told = re.split(r"[:;] | \(", told)[0]
    told = told[:1].upper() + told[1:]
    return "" if told == label_of(known) else told


def shown_as(known: Option, choices: Sequence[str] = ()) -> Literal["dropdown", "text", "checkbox", "number", "slider"]:
    """The kind of component for one option on the host's page."""
    if known.name in _FREE_TEXT:
        return "text"
    if choices or known.kind is str:
        return "dropdown"
    if known.kind is bool:
        return "checkbox"
    return "number" if known.maximum is None or known.maximum > SLIDER_LIMIT else "slider"


def infotexts(reports: Sequence[tuple[int, Report]]) -> dict[str, list[str | None]]:
    """Lines for the parameters of each image: verdict, score and p-value of its first pass that has a verdict."""
    images = max((image for image, _ in reports), default=-1) + 1
    lines: dict[str, list[str | None]] = {name: [None] * images for name in LINES}
    told: dict[int, Report] = {}
    for image, report in reports:
        if image not in told or told[image].verdicts[0].flagged is None:
            told[image] = report
    for image, report in told.items():
        (verdict,) = report.verdicts
        lines["Déjà Vu"][image] = label(verdict)
        if verdict.score is not None:
            lines["Déjà Vu score"][image] = number(verdict.score)
        if verdict.p_value is not None:
            lines["Déjà Vu p-value"][image] = p_text(verdict).removeprefix("p ").removeprefix("= ")
    return {name: values for name, values in lines.items() if any(v is not None for v in values)}
