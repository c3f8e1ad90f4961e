"""Training images of a folder with their captions, as a trainer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import PurePosixPath

from ..kept import digest_of
from ..kept.foreign import CAPTION_BYTES, IMAGE_BYTES, REPEATS, Unreadable, check_caption, contents
from .captions import caption_of
from .images import missing_decoder
from .layout import LINK, Found, Layout, Part, fault_of_ending, leads_out, mask_of
from .left_out import Kind
from .reading import CALLED
from .records import CAPTION_ENDINGS, NOT_UTF8, Record, decoded, safe_name, stamp_of

_STRICT = ("kohya", "onetrainer", "ai-toolkit")  # trainers that stop at a caption that is not UTF-8
_WHY: dict[str, str] = {
    "mask": "a mask of OneTrainer's, no training image",
    "condition": "a condition of OneTrainer's or ai-toolkit's, no training image",
    "beside": "kohya's trainer reads the images of numbered folders only",
    "unlisted": "the list of captions does not name it",
    "unnamed": "the trainer's configuration does not name its folder",
    "regularisation": "a regularisation image, which stands for what is not to be learnt",
    "validation": "an image for validation, which is not trained",
}


@dataclass(frozen=True)
class _Image:
    """An image of the folder, and the part it belongs to; with the reason where it is left out."""

    name: str
    part: Part = Part()
    repeats: int = 1
    kind: Kind = "unreadable"
    fault: str = ""


@dataclass(frozen=True)
class FolderSource:
    """Images with their captions, in the order of their names. Left out ones are records that say why."""

    found: Found
    layout: Layout

    @cached_property
    def _images(self) -> tuple[_Image, ...]:
        by_folder: dict[str, list[Part]] = {}
        images = []
        for name in self.found.images:
            folder = name.rpartition("/")[0]
            if folder not in by_folder:
                by_folder[folder] = [part for part in self.layout.parts if _covers(part, folder)]
            images.append(self._image(name, by_folder[folder]))
        return tuple(images)

    def _image(self, name: str, parts: list[Part]) -> _Image:
        """Where several parts read it, an epoch shows it that often; the first says its caption."""
        trained = [part for part in parts if part.left_out is None]
        listed = [part for part in trained if part.list is None or _listed(part, name) is not None]
        in_controls = self.layout.trainer == "ai-toolkit" and PurePosixPath(name).parent.name == "_controls"
        kind: Kind | None = mask_of(name) or ("condition" if in_controls else None)
        if kind is None and not listed:
            kind = "unlisted" if trained else parts[0].left_out if parts else self.layout.outside
        if kind is not None:
            return _Image(name, kind=kind, fault=_WHY[kind])
        if fault := fault_of_ending(name, self.layout.trainer) or missing_decoder(name):
            return _Image(name, kind="format", fault=fault)
        return _Image(name, listed[0], min(REPEATS, sum(part.repeats for part in listed)))

    @property
    def description(self) -> str:
        count = sum(not image.fault for image in self._images)
        return f"{count:,} image{'' if count == 1 else 's'} of a folder, {self.layout.description}"

    @cached_property
    def identity(self) -> str:
        files = (name for image in self._images for name in (image.name, self._caption_file(image)) if name)
        stamps = (f"{name}\0{stamp_of(self.found.root / name)}\n" for name in files)
        # What is read plainly has the same as in release 0.1.
        how = "False" if self.layout.trainer == "plain" else repr((self.layout.trainer, self.layout.parts))
        return digest_of(chain([how], stamps), 32, "blake2b")

    def count(self) -> int:
        return len(self._images)

    def records(self, start: int = 0, images: bool = True) -> Iterator[Record]:
        for image in self._images[start:]:
            name = safe_name(image.name)
            if image.fault:
                yield Record(name, fault=image.fault, kind=image.kind)
                continue
            try:
                caption, notes = self._caption(image)
                data = self._contents(image.name, IMAGE_BYTES) if images else b""
                upright = self.layout.trainer != "kohya"
                yield Record(name, data, check_caption(caption), image.repeats, notes=notes, upright=upright)
            except Unreadable as error:
                yield Record(name, fault=str(error))

    def _contents(self, name: str, most: int) -> bytes:
        if leads_out(self.found.root / name, self.found.root):
            raise Unreadable(LINK)
        return contents(self.found.root / name, most)

    def _caption(self, image: _Image) -> tuple[str, tuple[str, ...]]:
        """(caption, notes). Raises Unreadable where the trainer could not have read it either."""
        part = image.part
        notes: list[str] = []
        text = _listed(part, image.name)
        if text is None and part.by_name:
            text = PurePosixPath(image.name).stem
        if text is None and (file := self._caption_file(image)):
            text, notes = self._beside(image, file)
        elif text is None:
            notes = self._unread(image, "")
        if text is None or (part.empty_default and not text.strip()):
            text = part.default
        caption, note = caption_of(self.layout.trainer, check_caption(text), part.rules)
        return caption, (*notes, *([note] if note else []))

    def _beside(self, image: _Image, file: str) -> tuple[str, list[str]]:
        if leads_out(self.found.root / file, self.found.root):
            raise Unreadable(f"its caption is {LINK}")
        data = contents(self.found.root / file, CAPTION_BYTES)
        text, note = decoded(data)
        if note and self.layout.trainer in _STRICT:
            raise Unreadable(f"{NOT_UTF8}, at which {CALLED[self.layout.trainer]} stops: save it as UTF-8")
        if not data and self.layout.trainer == "kohya":
            raise Unreadable(f"its caption's file is empty, at which {CALLED['kohya']} stops")
        return text, [*([note] if note else []), *self._unread(image, file)]

    def _caption_file(self, image: _Image) -> str:
        """The relative name of the file with its caption; '' where there is none."""
        if image.fault or image.part.list is not None or image.part.by_name:
            return ""
        stems = [image.name.rpartition(".")[0]]
        if self.layout.trainer == "kohya" and PurePosixPath(stems[0]).name.count("_") >= 4:
            stems.append(stems[0].rsplit("_", 4)[0])  # cut-out faces have their place and size in their names
        files = (f"{stem}.{ending}" for stem in stems for ending in image.part.endings)
        return next((file for file in files if file in self.found.others), "")

    def _unread(self, image: _Image, file: str) -> list[str]:
        """Notes on captions that lie beside the one that is read."""
        stem, read = image.name.rpartition(".")[0], file.rpartition(".")[2]
        others = [e for e in CAPTION_ENDINGS if e != read and f"{stem}.{e}" in self.found.others]
        instead = f"its caption is that of its .{read} file; " if read else ""
        return [f"{instead}the .{ending} file beside it is not read" for ending in others]


def _covers(part: Part, folder: str) -> bool:
    if folder == part.folder:
        return True
    return part.deep and (not part.folder or folder.startswith(f"{part.folder}/"))


def _listed(part: Part, name: str) -> str | None:
    """The text that the list of captions has for an image: by its name in the set, or in the part's folder."""
    if part.list is None:
        return None
    names = [name, name.removeprefix(f"{part.folder}/")] if part.folder else [name]
    found = (part.list.text_of(known, part.rules.separator, part.rules.wildcards) for known in names)
    return next((text for text in found if text is not None), None)
