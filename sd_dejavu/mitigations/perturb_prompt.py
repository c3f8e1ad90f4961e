"""The published prompt-perturbation baselines.

Random words or numbers put into the prompt, or one of its own words repeated (Somepalli et al.,
*Understanding and Mitigating Copying in Diffusion Models*, NeurIPS 2023, section 6; the baselines of
Wen et al., ICLR 2024, with 1, 2, 4, 6 or 8 insertions). Seeded: the same seed gives the same prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.settings import Checked, option
from . import Mitigation, Outcome, Start

Perturbation = Literal["random-word", "random-number", "repeat-word"]


@dataclass(frozen=True)
class Settings(Checked):
    insertions: int = option(4, "words put into the prompt", minimum=0, maximum=50)


_WORDS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split()


def perturb(prompt: str, kind: Perturbation, insertions: int = 4, seed: int = 0) -> str:
    """The prompt with ``insertions`` random words, numbers (0 to 1,000,000) or copies of its own words put in.

    Raises ValueError for an unknown kind, a negative number of insertions or an empty prompt.

    >>> perturbed = perturb("a boat", "random-number", insertions=2).split()
    >>> len(perturbed), sum(word.isdecimal() for word in perturbed)
    (4, 2)
    """
    if kind not in get_args(Perturbation):
        raise ValueError(f"perturbation {kind!r} is unknown: use one of {', '.join(get_args(Perturbation))}")
    words = prompt.split()
    if insertions < 0 or not words:
        raise ValueError(f"a prompt with words and 0 or more insertions are needed, not {prompt!r} and {insertions}")
    rng = random.Random(seed)
    original = list(words)
    for _ in range(insertions):
        match kind:
            case "random-word":
                piece = rng.choice(_WORDS)
            case "random-number":
                piece = str(rng.randint(0, 1_000_000))
            case _:
                piece = rng.choice(original)
        words.insert(rng.randint(0, len(words)), piece)
    return " ".join(words)


def _apply(kind: Perturbation, model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    changed = model.encode(perturb(conditioning.prompt, kind, settings.insertions, start.seed))
    return Outcome(changed, start.score(model, conditioning), start.score(model, changed))


_HELP: dict[Perturbation, str] = {
    "random-word": "random words put into the prompt",
    "random-number": "random numbers put into the prompt",
    "repeat-word": "words of the prompt repeated",
}

MITIGATIONS = tuple(
    Mitigation(
        kind,
        f"published baseline: {text}",
        "prompt",
        "one text encoding",
        Settings,
        partial(_apply, kind),
        release=(0, 1),
    )
    for kind, text in _HELP.items()
)
