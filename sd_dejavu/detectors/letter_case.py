"""Letter case: a control, not a detector of memorisation.

The share of words that start with a capital letter. On the field's usual prompt lists this alone
reaches an AUC of .97, because the memorised ones are titles from the web and the ordinary ones are
sentences. A benchmark in which this control does well says little about the detectors beside it.
"""

from __future__ import annotations

from . import Detector, Observed


def score(observed: Observed) -> float:
    words = [word for word in observed.prompt.split() if word[:1].isalpha()]
    return sum(word[0].isupper() for word in words) / len(words) if words else 0.0


DETECTORS = (Detector("letter_case", "control: share of capitalised words, no model involved", "prompt", score),)
