"""Reference images in Automatic1111 and Forge: sets in one folder of the host's, how one is built, and guidance away
from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from ...core.guidance import GuidanceRule
from ...core.settings import Checked, option, same
from ...mitigations import anti_memorization_guidance as amg
from ...mitigations.guard import Guard
from ...reference.build import BuildSettings, build
from ...reference.features import KINDS, FeatureSettings, load
from ...reference.left_out import notes_in_short
from ...reference.nearest import same_features
from ...reference.reading import Reading
from ...reference.reference_set import ReferenceSet
from ...report.wording import skipped
from .guidance import GuidedModel

WEIGHTS = "features"  # the folder beside the sets for the files of feature networks (SSCD), whatever their names
FEATURES = ("grey", "pixels", "sscd")  # those that need nothing which hosts may lack
HOW_TO_BUILD = "build one of your images and captions in the tab Déjà Vu"


@dataclass(frozen=True)
class Building(Checked):
    """A reference set to build."""

    folder: str = option("", "the folder of the training images, with their captions as a trainer reads them")
    name: str = option("", "what to keep it as")
    features: str = option(
        "grey",
        "what makes two images alike; "
        + "; ".join(f"{name}: {KINDS[name].help}" for name in FEATURES)
        + f", to be put into {WEIGHTS}/ beside the sets",
        choices=FEATURES,
    )
    restart: bool = option(False, "begin anew, without what is kept under this name")
    trainer: str = same(Reading, "trainer")
    trainer_config: str = same(Reading, "trainer_config")
    trigger_word: str = same(Reading, "trigger_word")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.folder.strip():
            raise ValueError("name the folder that the training images are in")
        if not re.fullmatch(r"\w([\w .-]*\w)?", self.name):
            raise ValueError(
                f"a set cannot be kept as {self.name!r:.60}: use letters, digits, blanks, dots, '-' and '_'"
                if self.name
                else "give the set a name"
            )


@dataclass(frozen=True)
class KnownSet(Guard):
    """A reference set with the features that it was made with."""

    references: ReferenceSet


def names(folder: Path) -> list[str]:
    """The sets that were built in this folder, or that the user has copied there."""
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def guard_of(folder: Path, name: str) -> KnownSet:
    """One of :func:`names`. Raises ValueError for any other name, or where its features are not at hand."""
    known = names(folder)
    if name not in known:
        chosen = f"there is no reference set {name!r}" if name else "no reference set is chosen"
        raise ValueError(f"{chosen}: {'choose one of the list' if known else HOW_TO_BUILD}")
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


def build_set(asked: Building, sets: Path, tell: Callable[[str, int, int], None]) -> str:
    """Build it below ``sets``; what was read, in words. One that was stopped goes on where it stood.

    ``tell`` is told the stage, how far it is and of how much, and may raise to end it. Raises ValueError where the folder
    holds no image that can be used, or another set is kept under this name.
    """
    source = Path(asked.folder.strip()).expanduser()
    if not source.is_absolute() or not source.exists():
        raise ValueError(f"there is no folder {source.name!r}: give the whole path of the one with your images")
    chosen = _features(asked.features, sets)
    reading = BuildSettings(asked.trainer, asked.trainer_config.strip(), asked.trigger_word.strip())
    how = {name: value for name, value in asdict(chosen).items() if name != "weights"}
    out = sets / f"{asked.name}.safetensors"
    made = build(source, out, load(chosen, "cpu"), reading, how, restart=asked.restart, on_progress=tell)
    captions = sum(bool(caption) for caption in made.captions)
    told = f"Ready: {len(made):,} different images, {captions:,} with a caption. Kept as {asked.name}."
    read = [f"{made.details['source']}.", *(f"{note}." for note in notes_in_short(made.details["notes"]))]
    return " ".join([told, *read, *skipped(made.details["skipped"], f"{asked.name}.json")])


def _features(name: str, sets: Path) -> FeatureSettings:
    files = sorted(str(path) for path in (sets / WEIGHTS).glob("*") if path.is_file())
    if KINDS[name].needs_weights and not files:
        raise ValueError(f"{name} needs its file: put it into {sets.name}/{WEIGHTS}/, or choose other features")
    return FeatureSettings(features=name, weights=files[0] if KINDS[name].needs_weights else "")


def rule_of(guard: Guard, model: GuidedModel) -> GuidanceRule:
    """Anti-memorization guidance for one run, with the numbers for its kind of features."""
    settings, kind = amg.preset(guard.features), model.prediction_type
    return amg.AntiMemorization(guard, model.images_of, model.encode, settings, kind, model.decoding)
