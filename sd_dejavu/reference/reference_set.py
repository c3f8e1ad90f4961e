"""A reference set: training images as embeddings with captions and counts, and the exact search for the nearest.

Similarity is the dot product of unit rows for cosine, and for the normalised L2 distance its negative
(Carlini et al., USENIX Security 2023; Chen et al., CVPR 2024):

    s(x, n) = -l2(x, n) / (0.5 * mean l2 from x to its 50 nearest reference images)

so that a higher value is always nearer, 0 is the very same row and about -2 is no nearer than the neighbourhood.
A set of fewer than 50 images takes the mean over all it has, and its values say little.

On disk a set is two files beside each other: NAME.safetensors with all numbers and thumbnails, NAME.json with the
text. Both carry the same fingerprint, so that halves of two sets are not taken for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from ..kept import digest_of, is_finite, json_text, write_tensors, write_text
from ..kept.foreign import Unreadable, check_caption, is_number, json_of, one_line, opened
from .features import Features, Metric

SCHEMA_VERSION = 1
FORMAT = "dejavu-reference-set"
NEIGHBOURHOOD = 50  # images whose mean distance normalises L2
CHUNK_ELEMENTS = 1 << 25  # similarities, and elements of rows, held at a time: 128 MiB in fp32 each
_DENOMINATOR_MINIMUM = 1e-12
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 1e9  # value of a row for the normalised L2 distance: squares of larger ones leave fp32
_UNIT_TOLERANCE = 0.01
_MOST_TIMES = 1 << 40  # that one image is counted
_TENSORS = ("embeddings", "duplicates", "near_duplicates", "thumbnails", "thumbnail_ends")


@dataclass(frozen=True)
class Neighbours:
    """The nearest reference images of each query, nearest first: similarity [B, k] and index [B, k] (int64)."""

    similarity: Tensor
    index: Tensor


class Thumbnails(Sequence[bytes]):
    """JPEG images kept end to end in one uint8 tensor; ``ends`` [N] says where each is over."""

    def __init__(self, data: Tensor, ends: Tensor) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, images: Sequence[bytes]) -> Thumbnails:
        data = torch.frombuffer(bytearray(b"".join(images)) or bytearray(1), dtype=torch.uint8)
        lengths = torch.tensor([len(p) for p in images], dtype=torch.int64)
        return cls(data[: int(lengths.sum())], lengths.cumsum(0))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        place = range(len(self))[number]
        start = int(self.ends[place - 1]) if place else 0
        return self.data[start : int(self.ends[place])].numpy().tobytes()


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """N different images. Exact copies of one image share one row.

    ``embeddings`` [N, D] fp32, unit rows for cosine. ``duplicates`` [N] int64: how many times the very same image
    is shown in one epoch (1: once). ``near_duplicates`` [N] int64: how many other rows are more similar than
    ``near_threshold``; -1 where that was not counted. ``features`` names the network that made the rows;
    ``details`` says how (its settings, without paths) and what was skipped.
    """

    embeddings: Tensor
    captions: tuple[str, ...]
    names: tuple[str, ...]
    duplicates: Tensor
    near_duplicates: Tensor
    thumbnails: Sequence[bytes]
    features: str
    metric: Metric
    near_threshold: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal rows, names and captions."""
        return _fingerprint(self.embeddings.detach().cpu().float().contiguous(), self._text_rows())

    def _text_rows(self) -> list[str]:
        return [json.dumps({"name": n, "caption": c}) for n, c in zip(self.names, self.captions, strict=True)]

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ValueError(f"the metric must be one of {', '.join(get_args(Metric))}, not {self.metric!r}")
        if self.embeddings.ndim != 2 or 0 in self.embeddings.shape:
            raise ValueError(f"embeddings must be rows [N, D], not of the shape {tuple(self.embeddings.shape)}")
        if self.embeddings.dtype not in _FLOATS:
            raise ValueError(f"embeddings must be floating-point numbers of 16 to 64 bits, not {self.embeddings.dtype}")
        if self.near_threshold is not None and not is_number(self.near_threshold):
            raise ValueError(
                f"the threshold of near duplicates must be a finite number, not {self.near_threshold!r:.40}"
            )
        lengths = {
            n: len(getattr(self, n)) for n in ("captions", "names", "duplicates", "near_duplicates", "thumbnails")
        }
        if wrong := [f"{count} {n.replace('_', ' ')}" for n, count in lengths.items() if count != len(self)]:
            raise ValueError(f"a set of {len(self)} embeddings cannot have {' and '.join(wrong)}")

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def to(self, device: str | torch.device) -> ReferenceSet:
        """With the embeddings on the device on which is searched."""
        return replace(self, embeddings=self.embeddings.to(device))

    def check(self, features: Features) -> None:
        """Raises ValueError where the rows were made by other features."""
        if (features.name, features.metric) != (self.features, self.metric):
            raise ValueError(
                f"the reference set was made with the features {self.features!r} ({self.metric}), not with "
                f"{features.name!r} ({features.metric}): use the same features, or build the set again"
            )

    # ---------------------------------------------------------------------------------- search

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest (all, if there are fewer) of each query [B, D], exactly. Memory does not grow with N.

        Of equally similar rows the first goes first. Raises ValueError for queries of another width, or not finite.
        """
        self._check_queries(queries)
        if k < 1:
            raise ValueError(f"the number of neighbours must be at least 1, not {k}")
        queries = queries.detach().to(self.embeddings.device, torch.float32)
        if self.metric == "cosine":
            return self._nearest(queries, k, _dot)
        found = self._nearest(queries, max(k, NEIGHBOURHOOD), _negative_l2)
        denominator = neighbourhood(found.similarity)
        return Neighbours(found.similarity[:, :k] / denominator, found.index[:, :k])

    def similarity(self, query: Tensor, index: Tensor) -> Tensor:
        """Similarity [B] of each query [B, D] to the row it is paired with by index [B]; differentiable in the query.

        The denominator of the normalised distance is taken as a constant.
        """
        self._check_queries(query)
        rows = self.embeddings[index.to(self.embeddings.device)].to(query.device, query.dtype)
        if self.metric == "cosine":
            return (query * rows).sum(1)
        distances: Tensor = torch.linalg.vector_norm(query - rows, dim=1)
        return -distances / self.denominator(query)

    def denominator(self, queries: Tensor) -> Tensor:
        """0.5 * mean l2 [B] of each query [B, D] to its 50 nearest rows, without gradient."""
        on_device = queries.detach().to(self.embeddings.device, torch.float32)
        found = self._nearest(on_device, NEIGHBOURHOOD, _negative_l2)
        return neighbourhood(found.similarity)[:, 0].to(queries.device, queries.dtype)

    @torch.no_grad()
    def _nearest(self, queries: Tensor, k: int, measure: Callable[[Tensor, Tensor], Tensor]) -> Neighbours:
        """Top k of ``measure(queries [B, D], rows [n, D])``, a chunk of rows after the other."""
        batch, width = queries.shape
        k = min(k, len(self))
        step = max(k, CHUNK_ELEMENTS // max(batch, width))
        values, index = queries.new_empty(batch, 0), torch.empty(batch, 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self), step):
            rows = self.embeddings[start : start + step].float()
            fresh, place = measure(queries, rows).topk(min(k, len(rows)), dim=1)
            place, order = place.sort(dim=1)
            # Rows in the order of the set, so that a stable sort leaves equals in that order.
            values, index = torch.cat([values, fresh.gather(1, order)], 1), torch.cat([index, place + start], 1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            values, index = values[:, :k], index.gather(1, order)[:, :k]
        return Neighbours(values, index)

    def _check_queries(self, queries: Tensor) -> None:
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"queries must be rows [B, {self.embeddings.shape[1]}] of the features {self.features!r}, "
                f"not of the shape {tuple(queries.shape)}"
            )
        if not torch.isfinite(queries).all():
            raise ValueError("a query holds NaN or infinity, so nothing is near to it: the image or network is broken")

    # ------------------------------------------------------------------------------------ file

    def save(self, path: Path) -> None:
        """Writes NAME.safetensors and NAME.json; ``path`` may name either, or have no ending.

        Raises ValueError where an embedding is not finite, or the files cannot be written.
        """
        tensors_file, text_file = files_of(path)
        rows = self.embeddings.detach().cpu().float().contiguous()
        kept = self.thumbnails if isinstance(self.thumbnails, Thumbnails) else Thumbnails.of(self.thumbnails)
        text, fingerprint = self._text_rows(), self.fingerprint
        head = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "features": self.features,
            "metric": self.metric,
            "images": len(self),
            "fingerprint": fingerprint,
            "near_threshold": self.near_threshold,
            "details": self.details,
        }
        tensors = {
            "embeddings": rows,
            "duplicates": self.duplicates.cpu().contiguous(),
            "near_duplicates": self.near_duplicates.cpu().contiguous(),
            "thumbnails": kept.data.contiguous(),
            "thumbnail_ends": kept.ends.contiguous(),
        }
        # One image a line: readable, and small differences show as small differences.
        document = json_text(head, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(text) + "\n ]\n}\n"
        tensors_file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors_file, tensors, {FORMAT: fingerprint})
        write_text(text_file, document)

    @classmethod
    def load(cls, path: Path, features: Features | None = None) -> ReferenceSet:
        """Raises ValueError with a sentence for anything that is not a sound set made with ``features`` (if given)."""
        tensors_file, text_file = files_of(path)
        document = read_document(text_file)
        tensors, metadata = _read_tensors(tensors_file)
        if metadata.get(FORMAT) != document["fingerprint"]:
            raise ValueError(f"{tensors_file} and {text_file.name} are not of one reference set: build it again")
        try:
            rows = document["rows"]
            found = cls(
                tensors["embeddings"],
                tuple(_text(row["caption"]) for row in rows),
                tuple(_relative(row["name"]) for row in rows),
                _counts(tensors["duplicates"], 1),
                _counts(tensors["near_duplicates"], -1),
                _thumbnails(tensors["thumbnails"], tensors["thumbnail_ends"]),
                _features(document["features"]),
                document["metric"],
                document["near_threshold"],
                document["details"],
            )
            _check_rows(found)
            _check_details(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the reference set {text_file} is damaged ({_said(error)}): build it again") from error
        found.__dict__["fingerprint"] = document["fingerprint"]  # so that it need not be computed again
        if features is not None:
            found.check(features)
        return found


def neighbourhood(negative_l2: Tensor) -> Tensor:
    """0.5 * the mean of the 50 smallest distances, [B, 1], from negative distances [B, n], nearest first."""
    mean = -negative_l2[:, :NEIGHBOURHOOD].mean(1, keepdim=True)
    return (0.5 * mean).clamp_min(_DENOMINATOR_MINIMUM)


def _dot(queries: Tensor, rows: Tensor) -> Tensor:
    return queries @ rows.T


def _negative_l2(queries: Tensor, rows: Tensor) -> Tensor:
    """By differences: the shorter way, by products, loses the small distances to rounding."""
    return -torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist")


def files_of(path: Path) -> tuple[Path, Path]:
    """(safetensors, JSON) of a set named by either of them or without an ending."""
    base = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(base + ".safetensors"), path.with_name(base + ".json")


def read_document(text_file: Path) -> dict[str, Any]:
    """The JSON of a set. Raises ValueError with a sentence for anything else."""
    try:
        document = json_of(text_file)
    except Unreadable as error:
        raise ValueError(f"the reference set {text_file}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{text_file} is not a Déjà Vu reference set")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"the reference set {text_file} has schema version {version!r}, this program reads {SCHEMA_VERSION}: "
            "build it again"
        )
    if not isinstance(document.get("fingerprint"), str):
        raise ValueError(f"the reference set {text_file} is damaged (no fingerprint): build it again")
    if not isinstance(document.get("details"), dict):
        raise ValueError(f"the reference set {text_file} is damaged (no details): build it again")
    return document


def _read_tensors(tensors_file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not tensors_file.exists():
        raise ValueError(f"the reference set's file {tensors_file} is missing: keep it beside its JSON file")
    try:
        opened(tensors_file).close()
        with safe_open(tensors_file, framework="pt") as file:
            metadata = file.metadata() or {}
            missing = set(_TENSORS) - set(file.keys())
            tensors = {} if missing else {name: file.get_tensor(name) for name in _TENSORS}
    except Exception as error:  # the library's own type, and torch's for values that it does not know
        raise ValueError(
            f"{tensors_file} is not a sound safetensors file ({one_line(error)}): build the set again"
        ) from error
    if missing:
        raise ValueError(f"{tensors_file} is not a reference set: it lacks {', '.join(sorted(missing))}")
    return tensors, metadata


def _fingerprint(rows: Tensor, text: Sequence[str]) -> str:
    return digest_of([rows.numpy().data, *text], 32, "blake2b")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not text")
    value.encode()  # raises ValueError for halves of characters
    return check_caption(value)


def _features(value: Any) -> str:
    if not (name := _text(value)).strip():
        raise ValueError("its features have no name")
    return name


def _said(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else one_line(error)


def _check_rows(found: ReferenceSet) -> None:
    """Raises ValueError for rows whose similarity would be no similarity."""
    for part in found.embeddings.split(1 << 16):
        if not is_finite(part):
            raise ValueError("embeddings hold NaN or infinity")
        if found.metric == "cosine":
            length = torch.linalg.vector_norm(part.float(), dim=1)
            if bool(((length - 1).abs().minimum(length) > _UNIT_TOLERANCE).any()):  # an image of one grey has length 0
                raise ValueError("embeddings are not of unit length")
        elif bool((part.abs() > _LARGEST).any()):
            raise ValueError(f"embeddings hold values beyond {_LARGEST:g}")


def _check_details(found: ReferenceSet) -> None:
    """Raises ValueError, KeyError or TypeError where the details are not of the shape in which a build leaves them."""
    names = set(found.names)
    for copy in _list(found.details, "copies"):
        _relative(copy["name"])
        _text(copy["caption"])
        if copy["of"] not in names:
            raise ValueError(f"a copy of {copy['of']!r:.40}, which it does not hold")
    for left in _list(found.details, "skipped"):
        _text(left["name"])
        _text(left["reason"])
        _text(left.get("kind", ""))
    for said in _list(found.details, "notes"):
        _text(said["name"])
        _text(said["note"])
    for name, kind in (("source", str), ("made_with", dict)):
        if not isinstance(found.details.get(name, kind()), kind):
            raise ValueError(f"{name} is {found.details[name]!r:.40}")


def _list(details: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = details.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{name} is no list of entries")
    return found


def _relative(name: Any) -> str:
    """A name that stays inside the folder it is joined to, whoever wrote the file."""
    text = _text(name)
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or PureWindowsPath(text).drive:
        raise ValueError(f"the name {text!r:.80} is not relative")
    return text


def _counts(values: Tensor, least: int) -> Tensor:
    if values.dtype != torch.int64 or values.ndim != 1 or bool(((values < least) | (values > _MOST_TIMES)).any()):
        raise ValueError("the duplicate counts are not counts")
    return values


def _thumbnails(data: Tensor, ends: Tensor) -> Thumbnails:
    sound = data.dtype == torch.uint8 and data.ndim == 1 and ends.dtype == torch.int64 and ends.ndim == 1
    if not sound or len(ends) == 0 or int(ends[-1]) != len(data) or bool((ends.diff() < 0).any()) or int(ends[0]) < 0:
        raise ValueError("the thumbnails are not whole")
    return Thumbnails(data, ends)
