"""Reference images in Automatic1111 and Forge: sets that the user has put into one folder, and guidance away from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...core.guidance import GuidanceRule
from ...mitigations import anti_memorization_guidance as amg
from ...mitigations.guard import Guard
from ...reference.nearest import same_features
from ...reference.reference_set import ReferenceSet
from .guidance import GuidedModel

WEIGHTS = "features"  # the folder beside the sets for the files of feature networks (SSCD), whatever their names


@dataclass(frozen=True)
class KnownSet(Guard):
    """A reference set with the features that it was made with."""

    references: ReferenceSet


def names(folder: Path) -> list[str]:
    """The sets that 'sd-dejavu refset build' has made in this folder, or the user has copied there."""
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def guard_of(folder: Path, name: str) -> KnownSet:
    """One of :func:`names`. Raises ValueError for any other name, or where its features are not at hand."""
    if name not in names(folder):
        raise ValueError(f"there is no reference set {name!r}: choose one of the list, or put it into {folder.name}/")
    path = folder / f"{name}.safetensors"
    return _guard(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _guard(path: Path, changed: int) -> KnownSet:
    """The file is read again when its time of change is another."""
    references = ReferenceSet.load(path)
    faults = []
    for weights in ["", *sorted(str(p) for p in (path.parent / WEIGHTS).glob("*") if p.is_file())]:
        try:
            return KnownSet(same_features(references, weights, "cpu"), references, references.captions)
        except ValueError as error:
            faults.append(str(error))
    raise ValueError(f"the features of the reference set {path.stem} are not at hand: {faults[-1]}")


def rule_of(guard: Guard, model: GuidedModel) -> GuidanceRule:
    """Anti-memorization guidance for one run, with the numbers for its kind of features."""
    settings, kind = amg.preset(guard.features), model.prediction_type
    return amg.AntiMemorization(guard, model.images_of, model.encode, settings, kind, model.decoding)
