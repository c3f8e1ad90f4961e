"""A training set in the form that fine-tuning wants: captions, repeats, and every image's latent, made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kept import is_finite, write_tensors
from ..reference.images import ImageError, open_image
from ..reference.left_out import Kind
from ..reference.records import Record, Source

_CHUNK = 8  # images encoded at a time


@dataclass(frozen=True)
class LatentSet:
    """``latents`` [N, C, H, W] on the CPU, with the samples' names, captions and times an epoch shows each.

    ``skipped`` holds the name of each record that was left out, why, and as what.
    """

    latents: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...]
    repeats: tuple[int, ...]
    skipped: tuple[tuple[str, str, Kind], ...]

    def epoch(self) -> list[int]:
        """Sample numbers of one epoch, in the source's order."""
        return [number for number, count in enumerate(self.repeats) for _ in range(count)]


def latents_of(
    source: Source,
    vae: Any,
    size: tuple[int, int],
    cache: Path,
    key: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentSet:
    """All images of a source at ``size`` (height, width), from the file ``cache`` where it was made under this key.

    An image is scaled until it covers the size and cut to its middle. Of an autoencoder with a distribution the mean
    is taken. Raises ValueError where no image can be used.
    """
    found = _cached(cache, key)
    if found is not None:
        return found
    total = source.count()
    kept: list[tuple[Record, Tensor]] = []
    skipped: list[tuple[str, str, Kind]] = []
    waiting: list[tuple[Record, Tensor]] = []

    def encode() -> None:
        for (record, _), latent in zip(waiting, _encoded(vae, [fitted for _, fitted in waiting]), strict=True):
            if is_finite(latent):
                kept.append((record, latent))
            else:
                skipped.append((record.name, "the autoencoder gives NaN or infinity for it", "unreadable"))
        waiting.clear()

    for number, record in enumerate(source.records()):
        try:
            if record.fault:
                raise ImageError(record.fault)
            waiting.append((replace(record, data=b""), _fitted(record.data, size)))
        except ImageError as error:
            skipped.append((record.name, str(error), record.kind))
        if len(waiting) == _CHUNK:
            encode()
        on_progress(number + 1, total)
    if waiting:
        encode()
    if not kept:
        first = f"; the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise ValueError(f"no image of the training set can be used{first}")
    made = LatentSet(
        torch.stack([latent for _, latent in kept]),
        tuple(record.name for record, _ in kept),
        tuple(record.caption for record, _ in kept),
        tuple(record.repeats for record, _ in kept),
        tuple(skipped),
    )
    about = {"key": key, "names": made.names, "captions": made.captions, "repeats": made.repeats, "skipped": skipped}
    # One entry, as the library writes several in any order: equal sets make equal files.
    write_tensors(cache, {"latents": made.latents}, {"samples": json.dumps(about)})
    return made


def _cached(path: Path, key: str) -> LatentSet | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("samples", "{}"))
            if about.get("key") != key:
                return None
            latents = file.get_tensor("latents")
        skipped = tuple((name, why, kind) for name, why, kind in about["skipped"])
        return LatentSet(latents, tuple(about["names"]), tuple(about["captions"]), tuple(about["repeats"]), skipped)
    # Not whole: made again.
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _fitted(data: bytes, size: tuple[int, int]) -> Tensor:
    """[3, height, width] in -1..1."""
    from PIL import Image, ImageOps

    height, width = size
    fitted = ImageOps.fit(open_image(data), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def _encoded(vae: Any, images: Sequence[Tensor]) -> Tensor:
    """[N, C, H, W] in the UNet's scale, fp32 on the CPU."""
    encoded = vae.encode(torch.stack(list(images)).to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: Tensor = (latents - shift) * getattr(vae.config, "scaling_factor", 1.0)
    return scaled.float().cpu()
