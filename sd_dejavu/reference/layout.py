"""How a trainer reads a folder of images: its parts, how often an epoch shows their images, where captions come from.

The rules were read in the trainers' own sources: kohya's sd-scripts (48d368f), ai-toolkit (27a03a9) and OneTrainer
(23df383). Where no trainer is named it is guessed from what lies there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ..kept.foreign import CAPTION_BYTES, REPEATS, Unreadable, contents
from .caption_lists import CaptionList, diffusers_list, kohya_list
from .captions import Rules
from .left_out import Kind
from .reading import CALLED, GUESS, TRAINERS, Reading, Trainer
from .records import CAPTION_ENDINGS, IMAGE_ENDINGS

UNREAD_ENDINGS = ("gif", "tif", "tiff", "heic", "heif")  # images that we do not read
_TRAINED: dict[Trainer, tuple[str, ...]] = {  # where a trainer does not take all of them
    "kohya": ("png", "jpg", "jpeg", "webp", "bmp", "avif", "jxl"),
    "onetrainer": ("bmp", "jpg", "jpeg", "png", "tif", "tiff", "webp", "avif"),
    "ai-toolkit": ("jpg", "jpeg", "png", "webp"),
}
MASKS: dict[str, Kind] = {"-masklabel": "mask", "-condlabel": "condition"}  # at the end of their names
LISTS = ("metadata.jsonl", "metadata.csv")  # diffusers' scripts, by the library datasets
KOHYAS_LISTS = (
    "meta_lat.json",
    "meta_clean.json",
    "meta_cap_dd.json",
    "meta_cap.json",
)  # the last step of its tools first
_NUMBERED = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)
_LOOKED_AT = 100  # captions, for a guess
_CAPTION_SHOWN = 4096  # bytes of each


@dataclass(frozen=True)
class Found:
    """What lies in a folder and below it, by relative names with '/': images in their order, and all other files."""

    root: Path
    images: tuple[str, ...]
    others: frozenset[str]
    tars: tuple[Path, ...] = ()
    tables: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Part:
    """How the images of one folder are read; ``deep``: those of the folders below it too.

    The text of a caption comes from the ``list``, the file beside an image with the first of the ``endings`` that is
    there, the image's own ``name``, or is the ``default``; ``empty_default``: also where the file is empty. ``left_out``
    says as what none of its images is trained.
    """

    folder: str = ""
    deep: bool = True
    repeats: int = 1
    endings: tuple[str, ...] = CAPTION_ENDINGS
    default: str = ""
    empty_default: bool = False
    by_name: bool = False
    list: CaptionList | None = None
    rules: Rules = field(default_factory=Rules)
    left_out: Kind | None = None


@dataclass(frozen=True)
class Layout:
    """``how`` says it in words; ``outside`` is the kind of what no part covers."""

    trainer: Trainer
    parts: tuple[Part, ...]
    how: str
    guessed: str = ""
    outside: Kind = "beside"

    @property
    def description(self) -> str:
        guessed = f" (guessed from {self.guessed})" if self.guessed else ""
        return f"read as {CALLED[self.trainer]} reads it{guessed}: {self.how}"


def look(root: Path, archives: Sequence[str], tables: Sequence[str]) -> Found:
    """All files below a folder, but hidden ones; links to folders are not followed."""
    images: list[str] = []
    others: set[str] = set()
    by_ending: dict[str, list[Path]] = {"tar": [], "table": []}
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            name, low = Path(place, file).relative_to(root).as_posix(), file.lower()
            if file.startswith("."):
                continue
            if low.rpartition(".")[2] in (*IMAGE_ENDINGS, *UNREAD_ENDINGS):
                images.append(name)
            elif low.endswith(tuple(archives)):
                by_ending["tar"].append(root / name)
            elif low.endswith(tuple(tables)):
                by_ending["table"].append(root / name)
            else:
                others.add(name)
    for kind in by_ending.values():
        kind.sort(key=lambda path: path.relative_to(root).as_posix())
    return Found(root, tuple(sorted(images)), frozenset(others), tuple(by_ending["tar"]), tuple(by_ending["table"]))


def layout_of(found: Found, reading: Reading) -> Layout:
    """The layout that no configuration describes. Raises ValueError with a sentence where it cannot be had."""
    trainer, why = _guess(found) if reading.trainer == GUESS else (_named(reading.trainer), "")
    made = {
        "kohya": _kohya,
        "onetrainer": _onetrainer,
        "ai-toolkit": _ai_toolkit,
        "diffusers": _diffusers,
        "plain": _plain,
    }[trainer](found, reading)
    unread = [] if trainer == "diffusers" else caption_lists(found)[:1]
    return replace(made, guessed=why, how="; ".join([made.how, *(f"{name} is not read" for name in unread)]))


def _named(trainer: str) -> Trainer:
    return next(known for known in TRAINERS if known == trainer)


def _guess(found: Found) -> tuple[Trainer, str]:
    """(trainer, from what that was guessed); 'plain' where nothing speaks for another."""
    if _mostly_numbered(found):
        return "kohya", "its numbered folders"
    if lists := caption_lists(found):
        return "diffusers", lists[0]
    if known := _kohyas_list(found):
        return "kohya", known
    if any(mask_of(name) for name in found.images):
        return "onetrainer", "its masks"
    if any(re.search(r"\[(?:trigger|name)\]", text) for text in _captions(found)):
        return "ai-toolkit", "[trigger] in its captions"
    return "plain", ""


def _mostly_numbered(found: Found) -> bool:
    """Whether most folders' images lie in ones named like ``10_cat``, and no more lie beside them."""
    numbered = sum(bool(re.match(r"\d+_[^/]*/", name)) for name in found.images)
    beside = sum("/" not in name for name in found.images)
    return numbered > len(found.images) - numbered - beside and numbered >= beside


def _captions(found: Found) -> Iterator[str]:
    """The beginnings of some."""
    beside = (name.rpartition(".")[0] + ".txt" for name in found.images)
    for name in islice((name for name in beside if name in found.others), _LOOKED_AT):
        if leads_out(found.root / name, found.root):
            continue
        try:
            yield contents(found.root / name, CAPTION_BYTES)[:_CAPTION_SHOWN].decode("utf-8", "replace")
        except Unreadable:
            continue


# ------------------------------------------------------------------------------------------- the trainers


def numbered_parts(found: Found, part: Part = Part()) -> list[Part]:
    """The folders named like ``10_cat``, read as ``part`` says: 10 times an epoch, with 'cat' where a caption is missing.

    A folder of the number 0 is none. Raises ValueError for an absurd number.
    """
    parts = []
    for folder in sorted({name.partition("/")[0] for name in found.images if "/" in name}):
        if (known := _NUMBERED.fullmatch(folder)) and int(known[1]) > 0:
            check_repeats(int(known[1]), f"the name of the folder {folder}", "rename it")
            part_of = replace(part, folder=folder, deep=False, repeats=int(known[1]), default=known[2] or "")
            parts.append(part_of)
    return parts


def check_repeats(repeats: int, who: str, advice: str) -> None:
    if repeats > REPEATS:
        raise ValueError(f"{who} asks for more than {REPEATS:,} repeats an epoch: {advice}")


def usual_ending(found: Found) -> tuple[str, ...]:
    """kohya's trainer reads captions of one ending: .txt where there is any, as its GUI sets it, else .caption."""
    stems = {name.rpartition(".")[0] for name in found.images}
    return next(((e,) for e in CAPTION_ENDINGS if any(f"{stem}.{e}" in found.others for stem in stems)), ("txt",))


def _kohya(found: Found, reading: Reading) -> Layout:
    ending = usual_ending(found)
    how = f"captions from .{ending[0]} files"
    parts, known = numbered_parts(found, Part(endings=ending)), _kohyas_list(found)
    if parts and (_mostly_numbered(found) or not known):
        how += ", else the folder's name; repeated as the folders' names say"
    elif known:
        parts, how = [Part(list=read_list(found, known))], f"captions from {known}"
    elif itself := _NUMBERED.fullmatch(found.root.name):
        check_repeats(int(itself[1]), f"the name of the folder {found.root.name}", "rename it")
        parts = [Part("", False, max(1, int(itself[1])), ending, itself[2] or "")]
        how += ", else the folder's name; repeated as its name says"
    else:
        parts = [Part(endings=ending)]
    return Layout("kohya", tuple(parts), how)


def _onetrainer(found: Found, reading: Reading) -> Layout:
    return Layout("onetrainer", (Part(endings=("txt",)),), "captions from .txt files, each of one line")


def _ai_toolkit(found: Found, reading: Reading) -> Layout:
    rules = Rules(trigger=reading.trigger_word)
    word = f", with the trigger word {reading.trigger_word}" if reading.trigger_word else ""
    return Layout("ai-toolkit", (Part(endings=("txt",), rules=rules),), f"captions from .txt files{word}")


def _diffusers(found: Found, reading: Reading) -> Layout:
    lists = caption_lists(found)
    for name in lists:
        check_inside(found, name)
    if not lists:
        return Layout("diffusers", (Part(endings=()),), f"without captions, as it holds no {LISTS[0]}")
    known = diffusers_list(found.root, lists, reading.caption_column)
    return Layout(
        "diffusers", (Part(list=known),), f"captions from {lists[0] if len(lists) == 1 else f'{len(lists)} lists'}"
    )


def _plain(found: Found, reading: Reading) -> Layout:
    return Layout("plain", (Part(),), "all images, each once, with the whole text of its .txt or .caption file")


def caption_lists(found: Found) -> list[str]:
    """diffusers' lists, a folder's one each."""
    names: dict[str, str] = {}
    for name in sorted(found.others, reverse=True):  # .jsonl before .csv
        folder, _, file = name.rpartition("/")
        if file in LISTS:
            names.setdefault(folder, name)
    return sorted(names.values())


def _kohyas_list(found: Found) -> str:
    """The one that training reads, where kohya's tools have left several; '' where none lies there."""
    there = sorted(name for name in found.others if re.fullmatch(r"meta_[^/]*\.json", name))
    return next((name for name in (*KOHYAS_LISTS, *there) if name in there), "")


def read_list(found: Found, name: str) -> CaptionList:
    """kohya's list of this name. Raises ValueError."""
    check_inside(found, name)
    return kohya_list(found.root / name, name)


# ------------------------------------------------------------------------------------------ single images


def mask_of(name: str) -> Kind | None:
    """As what an image is none to train: a mask or a condition of another, by its name, as OneTrainer knows them."""
    stem = name.rpartition(".")[0]
    return next((kind for end, kind in MASKS.items() if stem.endswith(end)), None)


def fault_of_ending(name: str, trainer: Trainer) -> str:
    """Why an image of this format is not read; '' where it is."""
    ending = name.rpartition(".")[2].lower()
    if ending not in _TRAINED.get(trainer, (ending,)):
        return f"{CALLED[trainer]} does not read .{ending}"
    return f"a .{ending} file, which is not read here" if ending in UNREAD_ENDINGS else ""


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path is a link to a file outside of a folder."""
    if not path.is_symlink() or not path.is_file():
        return False
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


LINK = "a link that leads out of the folder, which is not followed"


def check_inside(found: Found, name: str) -> None:
    if leads_out(found.root / name, found.root):
        raise ValueError(f"{name} is {LINK}: put the file itself there")
