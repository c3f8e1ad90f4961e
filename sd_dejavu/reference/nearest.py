"""Is this image a copy? The nearest reference images of one image, and the answer they give."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..kept.foreign import is_number
from .features import KINDS, Features, FeatureSettings, load
from .reference_set import NEIGHBOURHOOD, Neighbours, ReferenceSet


@dataclass(frozen=True)
class Neighbour:
    """One reference image near to a query."""

    name: str
    caption: str
    similarity: float
    duplicates: int
    near_duplicates: int


@dataclass(frozen=True)
class Answer:
    """``copy`` is None where it cannot be said, and ``why`` says why; ``threshold`` is the similarity of a copy."""

    copy: bool | None
    threshold: float | None
    why: str
    neighbours: tuple[Neighbour, ...]
    indices: tuple[int, ...]
    features: str
    metric: str

    @property
    def similarity(self) -> float:
        """Of the nearest."""
        return self.neighbours[0].similarity

    @property
    def sentence(self) -> str:
        heading = {True: "a copy", False: "no copy found", None: "not judged"}[self.copy]
        nearest = self.neighbours[0]
        return f"{heading}: similarity {nearest.similarity:.3f} to {nearest.name}" + (
            f" ({self.why})" if self.why else ""
        )

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["indices"]
        return {**document, "neighbours": list(document["neighbours"])}


def copy_threshold(features: str) -> float | None:
    """Similarity from which an image is called a copy; None where none is established for these features."""
    kind = KINDS.get(features.split()[0])
    return kind.copy if kind is not None else None


def threshold_of(reference: ReferenceSet) -> float | None:
    """The same of a set; None too where it is too small for the distance of its features."""
    small = reference.metric == "normalised L2" and len(reference) < NEIGHBOURHOOD
    return None if small else copy_threshold(reference.features)


def answer(reference: ReferenceSet, found: Neighbours, row: int, threshold: float | None = None) -> Answer:
    """On the query that is this row of ``found``; the threshold is that of its kind of features, if none is given.

    Raises ValueError for a threshold that is no finite number.
    """
    if threshold is None:
        threshold = copy_threshold(reference.features)
    elif not is_number(threshold):
        raise ValueError(f"the threshold of a copy must be a finite number, not {threshold}")
    indices = tuple(found.index[row].tolist())
    neighbours = tuple(
        Neighbour(
            reference.names[index],
            reference.captions[index],
            similarity,
            int(reference.duplicates[index]),
            int(reference.near_duplicates[index]),
        )
        for similarity, index in zip(found.similarity[row].tolist(), indices, strict=True)
    )
    copy: bool | None = None
    why = ""
    if threshold is None:
        why = f"no threshold is established for {reference.features}: give one"
    elif reference.metric == "normalised L2" and len(reference) < NEIGHBOURHOOD:
        why = f"a set of {len(reference)} images is too small for the normalised distance, which needs {NEIGHBOURHOOD}"
    elif not is_number(neighbours[0].similarity):
        why = "the similarity is not a finite number"
    else:
        copy = neighbours[0].similarity >= threshold
    return Answer(copy, threshold, why, neighbours, indices, reference.features, reference.metric)


def same_features(reference: ReferenceSet, weights: str, device: str = "cpu") -> Features:
    """The features that the set was made with; ``weights`` is the user's word for where those of a network lie.

    Raises ValueError where they are others, or a host's own.
    """
    made_with = reference.details.get("made_with")
    if not isinstance(made_with, dict) or not made_with:
        raise ValueError(f"the reference set does not say how to make its features {reference.features!r} again")
    try:
        chosen = FeatureSettings(**{**made_with, "weights": weights})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the reference set is damaged (made with: {error}): build it again") from error
    features = load(chosen, device)
    reference.check(features)
    return features
