"""The bundled model's own training images as a reference set: nothing to download."""

from __future__ import annotations

from ..reference.build import THUMBNAIL_SIDE, from_images
from ..reference.features import Features, Grey
from ..reference.reference_set import ReferenceSet
from . import bundled


def bundled_reference(
    features: Features | None = None, near_threshold: float | None = None, thumbnail_side: int = THUMBNAIL_SIDE
) -> ReferenceSet:
    """Its memorised pairs, counted as often as an epoch showed them; by the metric of its copies, or by ``features``."""
    pairs = bundled.pairs()
    return from_images(
        bundled.training_images(),
        [pair.caption for pair in pairs],
        [f"pair-{number:03d}" for number in range(1, len(pairs) + 1)],
        features or Grey(),
        [pair.repetitions for pair in pairs],
        near_threshold,
        thumbnail_side,
    )
