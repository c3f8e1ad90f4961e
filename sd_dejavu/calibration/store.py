"""Where calibration profiles are kept, and how the right one is found again by itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import escape
from pathlib import Path

from ..kept import digest_of
from .profile import Profile, Setting, names_of

log = logging.getLogger("dejavu")


def user_folder() -> Path:
    """$SD_DEJAVU_HOME, or sd-dejavu below the user's data folder ($XDG_DATA_HOME, ~/.local/share)."""
    if home := os.environ.get("SD_DEJAVU_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sd-dejavu"


def path_for(setting: Setting, folder: Path | None = None) -> Path:
    """One file a setting: the model's fingerprint, and a digest of all the rest. Hosts have folders of their own."""
    told = repr(setting).replace(", baseline=", ", without=", 1)  # files of release 0.1 keep their names
    for unused in (", text_encoder='')", ", patches='')"):
        told = told.replace(unused, ")")
    return (folder or user_folder() / "calibration") / f"{setting.model}-{digest_of([told], 8)}.json"


def find(
    setting: Setting, kind: str, images: int = 1, also: Sequence[Path] = (), folder: Path | None = None
) -> Profile | None:
    """Of the profiles that fit this setting the one with the most nulls for this score, or None.

    They are looked for in ``folder``, a host's own, and in that of the command line. Among equals the one made for
    exactly this setting goes first, ``also`` last: more files to look at, such as the profiles a model brings along.
    Files that are no sound profile are passed over, with a warning in the log.
    """
    known = [path_for(setting, folder), *_kept(setting.model, folder), *_kept(setting.model)]
    paths = (path for path in dict.fromkeys([*known, *also]) if path.is_file())
    profiles = (profile for path in paths if (profile := _sound(path)) is not None)
    fitting = [p for p in profiles if p.setting.mismatch(setting, kind) is None and p.null_scores(kind, images)]
    return max(fitting, key=lambda p: len(p.null_scores(kind, images)), default=None)


def _kept(model: str, folder: Path | None = None) -> list[Path]:
    """The profiles of a model, under all its names, in a host's folder or in that of the command line."""
    try:
        within = folder or user_folder() / "calibration"
        return sorted(path for name in names_of(model) for path in within.glob(f"{escape(name)}-*.json"))
    except (OSError, RuntimeError) as error:  # a folder that may not be read, a user without a home
        _warn(f"the folder of calibrations, which cannot be read: {error}")
        return []


def find_for_monitor(
    setting: Setting, wanted: str, also: Sequence[Path] = (), folder: Path | None = None
) -> Profile | None:
    """One that holds this kind of score, or else the first step's, which decides during the run."""
    found = (find(setting, kind, 1, also, folder) for kind in dict.fromkeys((wanted, "first step")))
    return next((profile for profile in found if profile is not None), None)


def _sound(path: Path) -> Profile | None:
    """The profile of a file; None, with a warning, where it is none that can be used."""
    try:
        return _current(path)
    except ValueError as error:
        _warn(str(error))
        return None


@lru_cache(maxsize=64)
def _warn(text: str) -> None:
    """Once, though a host asks at every run."""
    log.warning("[Déjà Vu] passed over: %s", " ".join(text.split()))


class HoldsMore(ValueError):
    """A calibration that is kept holds more than the new one would, and was not asked to be replaced."""


@dataclass(frozen=True)
class Size:
    """How much a calibration holds: ordinary prompts, how many of them as whole runs, and images of each."""

    prompts: int
    whole_runs: int = 0
    images: int = 1

    @classmethod
    def of(cls, profile: Profile) -> Size:
        images = min((len(null.scores.get("first step", ())) for null in profile.nulls), default=0)
        return cls(len(profile.nulls), sum("all steps" in null.scores for null in profile.nulls), images)

    def __str__(self) -> str:
        whole = f", {self.whole_runs:,} of them as whole runs" if self.whole_runs else ""
        return f"{self.prompts:,} ordinary prompts{whole} (images a prompt: {self.images})"


def check_kept(path: Path, new: Size) -> None:
    """Raises HoldsMore where the calibration in this file holds more of anything than ``new``.

    To be asked before the measuring too, which takes long. A file that is no readable calibration has nothing to lose.
    """
    if not path.is_file():
        return
    try:
        kept = Size.of(_current(path))
    except ValueError:
        return
    if kept.prompts > new.prompts or kept.whole_runs > new.whole_runs or kept.images > new.images:
        raise HoldsMore(
            f"the calibration {path.name} is kept: it holds {kept}, the new one {new}; measure at least as many, or ask "
            "for 'replace'"
        )


def keep(profile: Profile, path: Path, replace: bool = False) -> None:
    """Save a calibration. Raises HoldsMore where more would be lost, unless it is asked to ``replace``."""
    if not replace:
        check_kept(path, Size.of(profile))
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.save(path)


def _current(path: Path) -> Profile:
    """The profile of a file. A host asks at every run; it is read again when its time of change or size is another."""
    about = path.stat()
    return _load(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=64)
def _load(path: Path, changed: int, size: int) -> Profile:
    return Profile.load(path)
