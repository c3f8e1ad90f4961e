"""Reference images in ComfyUI: features by networks that the host has loaded, sets built and asked under its rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ...demo.reference import bundled_reference
from ...demo.world import SIZE
from ...mitigations.guard import Guard
from ...reference.build import BuildSettings, build, embed
from ...reference.features import (
    KINDS,
    SSCD,
    FeatureError,
    Features,
    Grey,
    HostVision,
    Latents,
    Pixels,
    centre,
    normalised,
    short_side,
    weights_digest,
)
from ...reference.nearest import Answer, answer
from ...reference.parts import PartIndex, PartMatch, part_index
from ...reference.reference_set import ReferenceSet
from .api import ClipVision, ModelPatcher
from .demo import load_demo_model

CLIP_VISION = "the linked CLIP Vision model"
_HOST_VISION = "host"  # first word of HostVision's names
_SSCD_SIZES: tuple[Literal[288, 320], ...] = (288, 320)


@dataclass(frozen=True)
class HostFeatures:
    """Features, and the host's networks (its model patchers) that must be loaded before they are asked."""

    features: Features
    patchers: tuple[ModelPatcher, ...] = ()

    def load(self) -> None:
        """To be called in inference mode: weights that the host moves outside of it cannot be used again."""
        if self.patchers:
            comfy.model_management.load_models_gpu(list(self.patchers))


@dataclass(frozen=True)
class HostReferences(Guard):
    """A reference set with what its features need of the host."""

    references: ReferenceSet
    networks: HostFeatures = field(kw_only=True)

    @classmethod
    def of(cls, references: ReferenceSet, networks: HostFeatures) -> HostReferences:
        """Raises ValueError where the set was made with other features."""
        references.check(networks.features)
        return cls(networks.features, references, references.captions, networks=networks)


# ---------------------------------------------------------------------------------------- features


def feature_choices(sscd_files: Sequence[str]) -> list[str]:
    """Everything that needs no download, the linked CLIP Vision model, and the SSCD files that are there."""
    plain = [name for name, kind in KINDS.items() if not kind.needs_weights]
    return [*plain, CLIP_VISION, *(f"sscd {size}: {file}" for file in sscd_files for size in _SSCD_SIZES)]


def chosen_features(choice: str, clip_vision: ClipVision | None, sscd_files: Mapping[str, Path]) -> HostFeatures:
    """What one of :func:`feature_choices` stands for. Raises ValueError with a sentence where it cannot be had."""
    if choice == CLIP_VISION:
        if clip_vision is None:
            raise FeatureError("link a CLIP Vision model (Load CLIP Vision), or choose other features")
        return _clip_vision(clip_vision)
    for file, path in sscd_files.items():
        for size in _SSCD_SIZES:
            if choice == f"sscd {size}: {file}":
                return _sscd(path, size)
    plain: dict[str, Callable[[], HostFeatures]] = {
        "pixels": lambda: HostFeatures(Pixels()),
        "grey": lambda: HostFeatures(Grey()),
        "latents": _latents,
    }
    if choice not in plain:
        raise FeatureError(f"there are no features {choice!r} here: choose others")
    return plain[choice]()


def features_of(
    reference: ReferenceSet, clip_vision: ClipVision | None, sscd_files: Mapping[str, Path]
) -> HostFeatures:
    """The features that a set was made with. Raises ValueError with a sentence where they are not at hand."""
    name = reference.features
    kind, *details = name.split()
    if kind == _HOST_VISION:
        if clip_vision is None:
            raise FeatureError(f"the set was made with a CLIP Vision model ({name}): link that model")
        return _clip_vision(clip_vision)
    if kind == "sscd":
        return _sscd_named(name, sscd_files)
    if kind == "pixels":
        return HostFeatures(Pixels(int(details[0])))
    if kind in ("grey", "latents"):
        return chosen_features(kind, None, {})
    raise FeatureError(
        f"the set was made with features that are not at hand here ({name}): build it again with a CLIP Vision model"
    )


def _clip_vision(clip_vision: ClipVision) -> HostFeatures:
    """The embedding of the host's network. Its own preprocessing rounds to 8 bits, through which no gradient goes."""
    network, side = clip_vision.model, clip_vision.image_size
    mean, std = clip_vision.image_mean, clip_vision.image_std

    def encode(images: Tensor) -> Tensor:
        images = images.to(clip_vision.load_device).float()
        prepared = normalised(centre(short_side(images, side, "bicubic").clamp(0, 1), side), mean, std)
        found = network(pixel_values=prepared, intermediate_output=-2)[2]
        return found.float() if found.ndim == 2 else found.float().mean(1)  # SigLIP's gives all its tokens

    name = f"{type(network).__name__} {side} {weights_digest(network)}"
    return HostFeatures(HostVision(encode, name), (clip_vision.patcher,))


def _latents() -> HostFeatures:
    """Latents of the bundled model's autoencoder, as the command line makes them."""
    _, _, vae = load_demo_model()
    network = vae.first_stage_model

    def encode(images: Tensor) -> Tensor:
        return network.encode(vae.process_input(images).to(vae.device, vae.vae_dtype)).float()

    return HostFeatures(Latents(encode, weights_digest(network), SIZE), (vae.patcher,))


def _sscd(path: Path, size: Literal[288, 320]) -> HostFeatures:
    with torch.inference_mode(False):  # so that gradients can be taken through its weights
        return HostFeatures(SSCD(path, size, str(image_device())))


def _sscd_named(name: str, files: Mapping[str, Path]) -> HostFeatures:
    size = next((size for size in _SSCD_SIZES if name.startswith(f"sscd {size} ")), _SSCD_SIZES[0])
    for path in files.values():
        found = _sscd(path, size)
        if found.features.name == name:
            return found
    raise FeatureError(f"the set was made with an SSCD file ({name}) that is not in models/sscd: put it there")


def image_device() -> torch.device:
    """Where images go into feature networks."""
    return comfy.model_management.get_torch_device()


# -------------------------------------------------------------------------------------------- sets


def build_set(
    source: Path, out: Path, networks: HostFeatures, restart: bool, reading: BuildSettings = BuildSettings()
) -> HostReferences:
    """See :func:`sd_dejavu.reference.build.build`: stopped by the host's interruption, it goes on when run again."""
    bar = comfy.utils.ProgressBar(1)

    def show(stage: str, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    networks.load()
    made = build(
        source,
        out,
        networks.features,
        reading,
        _made_with(networks.features),
        device=str(image_device()),
        restart=restart,
        on_progress=show,
    )
    return HostReferences.of(made, networks)


def load_set(path: Path, clip_vision: ClipVision | None, sscd_files: Mapping[str, Path]) -> HostReferences:
    references = ReferenceSet.load(path)
    return HostReferences.of(references, features_of(references, clip_vision, sscd_files))


def bundled_set() -> HostReferences:
    """The bundled model's own training images, by the metric that judges its copies."""
    return HostReferences.of(bundled_reference(), HostFeatures(Grey()))


def nearest(guard: HostReferences, images: Tensor, count: int) -> list[Answer]:
    """For each of the host's images [B, H, W, C] its nearest reference images."""
    guard.networks.load()
    queries = [image[None, ..., :3].movedim(-1, 1) for image in images]
    found = guard.references.search(embed(guard.features, queries, device=str(image_device())), count)
    return [answer(guard.references, found, row) for row in range(len(queries))]


def parts(guard: HostReferences, images: Tensor) -> list[PartMatch]:
    """For each of the host's images [B, H, W, C] the part that is likest to one of a reference image.

    Raises ValueError with a sentence for a set that parts are not compared with.
    """
    guard.networks.load()
    return _index(guard).search([image[None, ..., :3].movedim(-1, 1) for image in images])


@lru_cache(maxsize=1)
def _index(guard: HostReferences) -> PartIndex:
    """Of a whole set, kept until another is asked about."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return part_index(guard.references, guard.features, device=str(image_device()), on_progress=show)


def _made_with(features: Features) -> dict[str, object]:
    """What the command line needs to make the same features; nothing where only a host can."""
    kind, *details = features.name.split()
    if kind not in KINDS:
        return {}
    sized = {"side": int(details[0])} if kind == "pixels" else {}
    return {"features": kind, **sized, **({"sscd_size": details[0]} if kind == "sscd" else {})}
