"""A training set in the form that fine-tuning wants: captions, repeats, and every picture's latent, made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..reference.pictures import PictureError, open_picture
from ..reference.sources import Source

_CHUNK = 8  # pictures encoded at a time


@dataclass(frozen=True)
class LatentSet:
    """``latents`` [N, C, H, W] on the CPU, with the samples' names, captions and times an epoch shows each.

    ``skipped`` holds the name of each record that could not be used, and why.
    """

    latents: Tensor
    names: tuple[str, ...]
    captions: tuple[str, ...]
    repeats: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...]

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
    """All pictures of a source at ``size`` (height, width), from the file ``cache`` where it was made under this key.

    A picture is scaled until it covers the size and cut to its middle. Of an autoencoder with a distribution the mean
    is taken. Raises ValueError where no picture can be used.
    """
    found = _cached(cache, key)
    if found is not None:
        return found
    total = source.count()
    names, captions, repeats, skipped, latents, waiting = [], [], [], [], [], []
    for number, record in enumerate(source.records()):
        try:
            if record.fault:
                raise PictureError(record.fault)
            waiting.append(_fitted(record.data, size))
        except PictureError as error:
            skipped.append((record.name, str(error)))
        else:
            names.append(record.name)
            captions.append(record.caption)
            repeats.append(record.repeats)
        if len(waiting) == _CHUNK:
            latents.append(_encoded(vae, waiting))
            waiting = []
        on_progress(number + 1, total)
    if waiting:
        latents.append(_encoded(vae, waiting))
    if not latents:
        first = f": {skipped[0][0]} is {skipped[0][1]}" if skipped else ""
        raise ValueError(f"no picture of the training set can be used{first}")
    made = LatentSet(torch.cat(latents).contiguous(), tuple(names), tuple(captions), tuple(repeats), tuple(skipped))
    partial = cache.with_suffix(".partial")
    about = {"key": key, "names": names, "captions": captions, "repeats": repeats, "skipped": skipped}
    # One entry, as the library writes several in any order: equal sets make equal files.
    save_file({"latents": made.latents}, partial, {"samples": json.dumps(about)})
    partial.replace(cache)
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
    except SafetensorError:
        return None
    skipped = tuple((name, why) for name, why in about["skipped"])
    return LatentSet(latents, tuple(about["names"]), tuple(about["captions"]), tuple(about["repeats"]), skipped)


def _fitted(data: bytes, size: tuple[int, int]) -> Tensor:
    """[3, height, width] in -1..1."""
    from PIL import Image, ImageOps

    height, width = size
    fitted = ImageOps.fit(open_picture(data), (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def _encoded(vae: Any, pictures: Sequence[Tensor]) -> Tensor:
    """[N, C, H, W] in the UNet's scale, fp32 on the CPU."""
    encoded = vae.encode(torch.stack(list(pictures)).to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents - shift) * getattr(vae.config, "scaling_factor", 1.0)).float().cpu()
