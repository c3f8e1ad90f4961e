"""Builds a reference set from a source, piece by piece, so that a build that was stopped goes on where it stood.

Every 128 records one finished piece is renamed into a work folder beside the set; the set itself is put together
from all pieces at the end. Pieces have fixed borders and the names of a stopped run's settings are compared, so
the result is the same, however often the build was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.settings import option
from ..kept import Resumable, is_finite, locked, write_tensors
from .features import KINDS, Features, Staged
from .images import ImageError, digest, open_image, thumbnail, to_tensor
from .reading import Reading
from .records import Record, Source
from .reference_set import (
    CHUNK_ELEMENTS,
    NEIGHBOURHOOD,
    ReferenceSet,
    Thumbnails,
    files_of,
    neighbourhood,
    read_document,
)
from .sources import open_source

PIECE = 128
THUMBNAIL_SIDE = 128
_WORK = ".refset-unfinished"
_NEAR = {"cosine": 0.95, "normalised L2": -0.5}  # for features that are none of KINDS

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildSettings(Reading):
    """How a reference set is built, apart from its features."""

    near_threshold: float | None = option(
        None,
        "similarity above which two training images count as near duplicates (default: "
        + ", ".join(f"{name} {kind.near:g}" for name, kind in KINDS.items())
        + ")",
        kind=float,
        maximum=1.0,
    )
    count_near_up_to: int = option(
        50_000, "near duplicates are not counted in larger sets: the work grows with the square", minimum=0
    )
    thumbnail_side: int = option(THUMBNAIL_SIDE, "longest side of the thumbnails in pixels", minimum=16, maximum=1024)
    ignore_repeats: bool = option(False, "the name of --trainer plain in release 0.1")

    @property
    def reading(self) -> Reading:
        return replace(self, trainer="plain") if self.ignore_repeats else self


def near_threshold_of(features: Features, wanted: float | None = None) -> float:
    """What the user wants, else the threshold of this kind of features."""
    if wanted is not None:
        return wanted
    kind = KINDS.get(features.name.split()[0])
    return kind.near if kind else _NEAR[features.metric]


def build(
    source: Path,
    out: Path,
    features: Features,
    wanted: BuildSettings = BuildSettings(),
    made_with: dict[str, Any] | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    restart: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
) -> ReferenceSet:
    """The set of all images of ``source``, saved as ``out``; goes on with a build that was stopped.

    ``made_with`` is stored with the set, to make the same features again; it must hold no paths. ``restart`` drops
    what is there under this name. ``on_progress(stage, done, total)`` is called as the work goes on. A set that is
    finished and of the same source and settings is left as it is. Raises ValueError with a sentence where there is
    another one, another process builds it, or no image is usable.
    """
    records = open_source(source, wanted.reading)
    near = near_threshold_of(features, wanted.near_threshold)
    begun = {
        "source": records.identity,
        "features": features.name,
        "metric": features.metric,
        "near_threshold": near,
        "count_near_up_to": wanted.count_near_up_to,
        "thumbnail_side": wanted.thumbnail_side,
        "piece": PIECE,
    }
    work = files_of(out)[0].with_suffix(_WORK)
    unfinished = Resumable(work, "an unfinished build", "give --restart to begin anew")
    with only_writer(out):
        unfinished.sweep()
        if restart:
            for file in reversed(files_of(out)):
                file.unlink(missing_ok=True)
            unfinished.discard()
        elif not work.is_dir() and (found := _finished(out, begun, features)) is not None:
            return found
        unfinished.begin(begun)
        _embed_pieces(records, work, features, wanted.thumbnail_side, batch_size, device, on_progress)
        built = _assembled(
            work, features, near, {"source": records.description, "made_with": made_with or {}, "begun": begun}
        )
        if len(built) <= wanted.count_near_up_to:
            counts = near_duplicates(
                built.to(device), near, lambda done, total: on_progress("near duplicates", done, total)
            )
            built = replace(built, near_duplicates=counts)
        built.save(out)
        unfinished.discard()
        return built


def only_writer(out: Path) -> AbstractContextManager[None]:
    """While open, no other process can make the set of this name. Raises ValueError where one does."""
    base = files_of(out)[0]
    base.parent.mkdir(parents=True, exist_ok=True)
    return locked(base.with_suffix(""), base.with_suffix(".lock"))


def from_images(
    images: Tensor,
    captions: Sequence[str],
    names: Sequence[str],
    features: Features,
    duplicates: Sequence[int] | None = None,
    near_threshold: float | None = None,
    thumbnail_side: int = THUMBNAIL_SIDE,
    batch_size: int = 32,
) -> ReferenceSet:
    """A set of images [N, 3, H, W] in 0..1 that are in memory already, in their order; equal ones stay apart."""
    from PIL import Image

    with torch.no_grad():
        rows = torch.cat([features(part).float().cpu() for part in images.split(batch_size)])
    eights = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    counts = torch.ones(len(rows), dtype=torch.int64) if duplicates is None else torch.tensor(list(duplicates))
    near = near_threshold_of(features, near_threshold)
    made = ReferenceSet(
        rows,
        tuple(captions),
        tuple(names),
        counts,
        torch.full((len(rows),), -1),
        Thumbnails.of([thumbnail(Image.fromarray(image), thumbnail_side) for image in eights]),
        features.name,
        features.metric,
        near,
    )
    return replace(made, near_duplicates=near_duplicates(made, near))


def embed(features: Features, images: Iterable[Tensor], batch_size: int = 32, device: str = "cpu") -> Tensor:
    """Rows [N, D] on the CPU for images [1, 3, H, W] of any sizes, in their order.

    Images are reduced one by one where the features can do that, so that only small ones are held together.
    """
    if not isinstance(features, Staged):
        with torch.no_grad():
            single = [features(image.to(device))[0].float().cpu() for image in images]
        return torch.stack(single) if single else torch.empty(0, 0)
    with torch.no_grad():
        prepared = [features.prepare(image.to(device)) for image in images]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(prepared):
            by_shape.setdefault(tuple(one.shape), []).append(number)
        rows: list[Tensor] = [torch.empty(0)] * len(prepared)
        for numbers in by_shape.values():
            for start in range(0, len(numbers), batch_size):
                part = numbers[start : start + batch_size]
                for number, row in zip(part, features.embed(torch.cat([prepared[n] for n in part])), strict=True):
                    rows[number] = row.float().cpu()
    return torch.stack(rows) if rows else torch.empty(0, 0)


@torch.no_grad()
def near_duplicates(
    reference: ReferenceSet, threshold: float, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """For each row how many others are more similar than ``threshold``, [N] int64 on the CPU."""
    rows = reference.embeddings.float()
    count = len(rows)
    step = max(1, CHUNK_ELEMENTS // max(count, rows.shape[1]))
    found = []
    for start in range(0, count, step):
        part = rows[start : start + step]
        if reference.metric == "cosine":
            similarity = part @ rows.T
        else:
            # By products: far quicker, and a threshold is far from the small distances that this loses.
            distance = torch.cdist(part, rows, compute_mode="use_mm_for_euclid_dist")
            distance[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0
            similarity = -distance / neighbourhood((-distance).topk(min(NEIGHBOURHOOD, count), dim=1).values)
        similarity[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf
        found.append((similarity > threshold).sum(1).cpu())
        on_progress(min(start + step, count), count)
    return torch.cat(found)


# ----------------------------------------------------------------------------------------- the work folder


def _finished(out: Path, begun: dict[str, Any], features: Features) -> ReferenceSet | None:
    """The finished set of this very source and settings, or None where there is none under this name."""
    text_file = files_of(out)[1]
    if not text_file.exists():
        return None
    if read_document(text_file)["details"].get("begun") != begun:
        raise ValueError(
            f"{text_file} is there already, made from another source or with other settings: give another name, or "
            "--restart to replace it"
        )
    return ReferenceSet.load(out, features)


def _piece_file(work: Path, number: int) -> Path:
    return work / f"{number:08d}.safetensors"


@dataclass(frozen=True)
class _Piece:
    """The images of up to 128 records that could be used, and those that could not."""

    rows: list[dict[str, Any]]
    embeddings: Tensor
    thumbnails: Thumbnails
    skipped: list[dict[str, str]]
    notes: list[dict[str, str]]


def _read_piece(path: Path) -> _Piece | None:
    """None where it is not there, or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            records = json.loads(file.metadata()["records"])
            small = Thumbnails(file.get_tensor("thumbnails"), file.get_tensor("thumbnail_ends"))
            return _Piece(
                records["rows"], file.get_tensor("embeddings"), small, records["skipped"], records.get("notes", [])
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _pieces_done(work: Path) -> int:
    """Sound pieces from the first on; one that was not wholly written (the machine lost power) is made again."""
    number = 0
    while _read_piece(_piece_file(work, number)) is not None:
        number += 1
    return number


def _embed_pieces(
    source: Source,
    work: Path,
    features: Features,
    side: int,
    batch_size: int,
    device: str,
    on_progress: Progress,
) -> None:
    total, number = source.count(), _pieces_done(work)
    on_progress("embedding", min(number * PIECE, total), total)
    records = source.records(number * PIECE)
    while piece := list(islice(records, PIECE)):
        _write_piece(_piece_file(work, number), piece, features, side, batch_size, device)
        number += 1
        on_progress("embedding", min(number * PIECE, total), total)


def _write_piece(
    path: Path, records: Sequence[Record], features: Features, side: int, batch_size: int, device: str
) -> None:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []
    thumbnails: list[bytes] = []

    def images() -> Iterator[Tensor]:
        for record in records:
            try:
                if record.fault:
                    raise ImageError(record.fault)
                image = open_image(record.data, record.upright)
            except ImageError as error:
                skipped.append({"name": record.name, "reason": str(error), "kind": record.kind})
                continue
            notes.extend({"name": record.name, "note": note} for note in record.notes)
            rows.append(
                {"name": record.name, "caption": record.caption, "repeats": record.repeats, "digest": digest(image)}
            )
            thumbnails.append(thumbnail(image, side))
            yield to_tensor(image)

    embeddings = embed(features, images(), batch_size, device)
    sound = [is_finite(row) for row in embeddings]
    reason = "the feature network gives NaN or infinity for it"
    skipped += [
        {"name": row["name"], "reason": reason, "kind": "unreadable"}
        for row, good in zip(rows, sound, strict=True)
        if not good
    ]
    places = [place for place, good in enumerate(sound) if good]
    kept = Thumbnails.of([thumbnails[place] for place in places])
    tensors = {"embeddings": embeddings[places], "thumbnails": kept.data, "thumbnail_ends": kept.ends}
    records_kept = {"rows": [rows[place] for place in places], "skipped": skipped, "notes": notes}
    write_tensors(path, tensors, {"records": json.dumps(records_kept)})


def _assembled(work: Path, features: Features, near: float, details: dict[str, Any]) -> ReferenceSet:
    """All pieces as one set: of the images with the same pixels the first gives the row, the others are counted."""
    rows: dict[str, dict[str, Any]] = {}
    embeddings: list[Tensor] = []
    thumbnails: list[bytes] = []
    skipped: list[dict[str, str]] = []
    notes: list[dict[str, str]] = []
    copies: list[dict[str, str]] = []
    number = 0
    while (piece := _read_piece(_piece_file(work, number))) is not None:
        number += 1
        skipped += piece.skipped
        notes += piece.notes
        kept = []
        for place, row in enumerate(piece.rows):
            if (first := rows.get(row["digest"])) is not None:
                first["repeats"] += row["repeats"]
                first["caption"] = first["caption"] or row["caption"]
                copies.append({"name": row["name"], "caption": row["caption"], "of": first["name"]})
            else:
                rows[row["digest"]] = row
                kept.append(place)
                thumbnails.append(piece.thumbnails[place])
        embeddings.append(piece.embeddings[kept])
    if not rows and not skipped:
        raise ValueError(f"the source ({details['source']}) holds no images")
    if not rows:
        first_reason = f"{skipped[0]['name']}: {skipped[0]['reason']}"
        raise ValueError(f"none of the {len(skipped)} images can be used; the first, {first_reason}")
    return ReferenceSet(
        torch.cat([part for part in embeddings if len(part)]),
        tuple(row["caption"] for row in rows.values()),
        tuple(row["name"] for row in rows.values()),
        torch.tensor([row["repeats"] for row in rows.values()]),
        torch.full((len(rows),), -1),
        Thumbnails.of(thumbnails),
        features.name,
        features.metric,
        near,
        {**details, "copies": copies, "skipped": skipped, "notes": notes},
    )
