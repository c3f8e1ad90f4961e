"""Feature networks: what makes two images near to each other.

* ``sscd``: Self-Supervised Copy Detection (Pizzi et al., CVPR 2022), a file named by the user (TorchScript, safetensors
  or ONNX), at its authors' preprocessing: ImageNet normalisation, short side 288 or 320 x 320.
* ``clip``, ``dinov2``: a vision model through transformers, a local folder or a hub id named by the user; ``dinov2`` also
  as one file (safetensors, TorchScript or ONNX).
* ``pixels``, ``latents``: no network; the pixels, or an autoencoder's latents, of images reduced to one side, with
  the normalised L2 distance of Carlini et al. (USENIX Security 2023).
* ``grey``: the structural metric by which copies of the bundled model are judged (:mod:`sd_dejavu.core.similarity`).
* :class:`HostVision`: the vision model that a host has loaded.

All but ONNX files are differentiable in the images. Nothing here reaches the network but a hub id given by the user.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.settings import Checked, option
from ..core.similarity import COPY_THRESHOLD, structure
from ..kept.foreign import json_of, one_line
from ..quiet import quiet
from ..weights import digest, named, of_module, sampled
from . import dinov2, sscd
from .network_files import FeatureError as FeatureError
from .network_files import digest_of_network, is_weights, open_network, tensors_of

Metric = Literal["cosine", "normalised L2"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_PIXELS_SIDE, _LATENTS_SIDE = 32, 512


class Features(Protocol):
    """Images [B, 3, H, W] in 0..1 -> rows [B, D] in fp32; differentiable; unit rows for cosine."""

    @property
    def name(self) -> str:
        """Stored with a reference set: rows of two networks compare only where their names agree."""
        ...

    @property
    def metric(self) -> Metric: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Staged(Protocol):
    """Features in two steps, so that images of many sizes are reduced one by one and embedded together."""

    def prepare(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> what the network takes in, [B, 3, h, w]."""
        ...

    def embed(self, prepared: Tensor) -> Tensor:
        """[B, 3, h, w] -> rows [B, D]."""
        ...


@dataclass(frozen=True)
class Published:
    """A similarity from which an image is called a copy, and by whom."""

    similarity: float
    source: str


@dataclass(frozen=True)
class Kind:
    """One choice of features.

    ``near``: two training images more similar than this count as near duplicates. ``published``: similarities of a
    copy with who set them; the first is the one that counts here. Empty where no threshold is established.
    """

    help: str
    needs_weights: bool
    near: float
    published: tuple[Published, ...] = ()

    @property
    def copy(self) -> float | None:
        """A generated image at least this similar to a training image is called its copy; None where none is known."""
        return self.published[0].similarity if self.published else None


_CARLINI = (Published(-1.4, "Chen et al., CVPR 2024, after Carlini et al., USENIX Security 2023, for CIFAR-10"),)
_SSCD = (
    Published(0.5, "Somepalli et al., CVPR 2023, for images of Stable Diffusion; so do Chen et al., CVPR 2024"),
    Published(0.7, "Wen et al., ICLR 2024, for the memorised prompts of Webster (2023) that are sure"),
    Published(0.75, "Pizzi et al., CVPR 2022: 90% of such pairs of DISC are copies, for sscd_disc_mixup"),
)

KINDS: dict[str, Kind] = {
    "pixels": Kind("pixels of the reduced image, normalised L2", False, -0.5, _CARLINI),
    "latents": Kind("latents of an autoencoder, normalised L2", False, -0.5, _CARLINI),
    "grey": Kind(
        "structure: grey values at 32 x 32, correlation",
        False,
        0.95,
        (Published(COPY_THRESHOLD, "this project, for the copies of its bundled model"),),
    ),
    "sscd": Kind("SSCD copy detection, a TorchScript, safetensors or ONNX file", True, 0.75, _SSCD),
    "clip": Kind("a CLIP vision model through transformers", True, 0.95),
    "dinov2": Kind("a DINOv2 model: through transformers, or a safetensors, TorchScript or ONNX file", True, 0.9),
}


@dataclass(frozen=True)
class FeatureSettings(Checked):
    """Which features, and what they are made from."""

    features: str = option("pixels", "; ".join(f"{n}: {k.help}" for n, k in KINDS.items()), choices=tuple(KINDS))
    weights: str = option(
        "",
        "sscd, dinov2: a file, .safetensors, .onnx (with onnxruntime), or TorchScript, which can hold code that runs when "
        "it is loaded, so only one from authors you trust; clip, dinov2: a folder in transformers' layout, or a hub id, "
        "which is fetched from the network; latents: a diffusers folder with an autoencoder (default: the bundled model's)",
    )
    side: int | None = option(
        None,
        f"pixels, latents: side in pixels that images are reduced to (default: {_PIXELS_SIDE}, or the autoencoder's)",
        kind=int,
        minimum=4,
        maximum=2048,
    )
    sscd_size: str = option("288", "sscd: short side 288, or 320 x 320 without regard to shape", choices=("288", "320"))


# ------------------------------------------------------------------------------------- without a network


class _InTwoSteps(ABC):
    """``__call__`` from ``prepare`` and ``embed``."""

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def embed(self, prepared: Tensor) -> Tensor: ...

    def __call__(self, images: Tensor) -> Tensor:
        return self.embed(self.prepare(images))


class Pixels(_InTwoSteps):
    """Pixels of the image reduced to ``side`` x ``side``: [B, 3 * side * side], for the normalised L2 distance."""

    metric: Metric = "normalised L2"

    def __init__(self, side: int = _PIXELS_SIDE) -> None:
        self.side = side
        self.name = f"pixels {side}"

    def prepare(self, images: Tensor) -> Tensor:
        return resized(images.float(), self.side, self.side)

    def embed(self, prepared: Tensor) -> Tensor:
        return prepared.flatten(1)


class Latents(Pixels):
    """Latents of the image reduced to ``side`` x ``side``, for the normalised L2 distance.

    ``encode`` takes images [B, 3, side, side] in 0..1 and gives latents [B, C, h, w]; ``name`` tells encoders apart.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], name: str, side: int = _LATENTS_SIDE) -> None:
        super().__init__(side)
        self._encode = encode
        self.name = f"latents {side} {name}"

    def embed(self, prepared: Tensor) -> Tensor:
        return self._encode(prepared).float().flatten(1)


class Grey(_InTwoSteps):
    """Centred grey values at 32 x 32 as unit rows: their cosine is :func:`sd_dejavu.core.similarity.grey_correlation`."""

    metric: Metric = "cosine"
    name = "grey 32"

    def prepare(self, images: Tensor) -> Tensor:
        return structure(images)

    def embed(self, prepared: Tensor) -> Tensor:
        return F.normalize(prepared, dim=1)


class HostVision:
    """A vision model that a host has loaded, for cosine.

    ``encode`` takes images [B, 3, H, W] in 0..1, does the host's own preprocessing and gives [B, D] or [B, 1, D];
    it must not switch gradients off where they are wanted. ``name`` tells models apart.
    """

    metric: Metric = "cosine"

    def __init__(self, encode: Callable[[Tensor], Tensor], name: str) -> None:
        self._encode = encode
        self.name = f"host {name}"

    def __call__(self, images: Tensor) -> Tensor:
        return F.normalize(self._encode(images).float().flatten(1), dim=1)


# ---------------------------------------------------------------------------------------- with a network


class SSCD(_InTwoSteps):
    """A file of the SSCD authors, or its weights as safetensors or ONNX; ``size`` 288 is the short side, 320 the side of a
    square."""

    metric: Metric = "cosine"

    def __init__(self, path: Path, size: Literal[288, 320] = 288, device: str = "cpu") -> None:
        if not path.is_file():
            raise FeatureError(
                f"there is no file {path}: name the file of SSCD, such as sscd_disc_mixup.torchscript.pt"
            )
        self._network, only = _sscd_network(path, device)
        if only not in (None, size if size == 320 else None):
            raise FeatureError(
                f"{path} takes images of {only} x {only} only: {'choose 320' if only == 320 else 'export it for any size'}"
            )
        self._size, self._device = size, device
        self.name = f"sscd {size} {digest_of_network(path)}"
        _check_rows(self, str(path), device)

    def prepare(self, images: Tensor) -> Tensor:
        if self._size == 320:
            return resized(images.float(), 320, 320)
        return short_side(images.float(), 288)

    def embed(self, prepared: Tensor) -> Tensor:
        return F.normalize(self._network(normalised(prepared.to(self._device), *IMAGENET)).float(), dim=1)


@dataclass(frozen=True)
class Preprocessing:
    """Short side (or both, where ``square``) to ``side``, the middle ``crop`` x ``crop`` of it, then mean and std."""

    side: int
    crop: int
    mean: Sequence[float]
    std: Sequence[float]
    square: bool = False


class Transformers(_InTwoSteps):
    """A CLIP or DINOv2 vision model: CLIP's projected image embedding, or DINOv2's class token.

    ``weights`` is a folder in transformers' layout or a hub id; for DINOv2 also a file. What transformers computes has the
    same name from a folder and from a safetensors file, whichever names its tensors bear.
    """

    metric: Metric = "cosine"

    def __init__(self, kind: Literal["clip", "dinov2"], weights: str, device: str = "cpu") -> None:
        self._rows, self.preprocessing, digits = _vision_model(kind, weights, device)
        self._device = device
        self.name = f"{kind} {self.preprocessing.crop} {digits}"
        _check_rows(self, weights, device)

    def prepare(self, images: Tensor) -> Tensor:
        wanted, images = self.preprocessing, images.float()
        if wanted.square:
            reduced = resized(images, wanted.side, wanted.side, "bicubic")
        else:
            reduced = short_side(images, wanted.side, "bicubic")
        return centre(reduced.clamp(0, 1), wanted.crop)

    def embed(self, prepared: Tensor) -> Tensor:
        inputs = normalised(prepared.to(self._device), self.preprocessing.mean, self.preprocessing.std)
        return F.normalize(self._rows(inputs).float(), dim=1)


def load(settings: FeatureSettings, device: str = "cpu") -> Features:
    """The features a user asked for. Raises FeatureError with a sentence where they cannot be had."""
    kind = settings.features
    if KINDS[kind].needs_weights and not settings.weights:
        raise FeatureError(f"the features {kind!r} need weights ({KINDS[kind].help}): name them with --weights")
    if settings.weights and kind in ("pixels", "grey"):
        raise FeatureError(f"the features {kind!r} take no weights: leave {settings.weights!r} out")
    if settings.side is not None and kind not in ("pixels", "latents"):
        raise FeatureError(f"the features {kind!r} have a size of their own: leave the side {settings.side} out")
    if kind == "pixels":
        return Pixels(settings.side or _PIXELS_SIDE)
    if kind == "grey":
        return Grey()
    if kind == "latents":
        return _autoencoder(settings.weights, settings.side, device)
    if kind == "sscd":
        return SSCD(Path(settings.weights), 320 if settings.sscd_size == "320" else 288, device)
    return Transformers("clip" if kind == "clip" else "dinov2", settings.weights, device)


# ------------------------------------------------------------------------------------------- preprocessing


def resized(images: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """[B, C, H, W] -> [B, C, height, width], smoothed where it gets smaller, as Pillow and torchvision do it."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, align_corners=False, antialias=True)


def short_side(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """The short side becomes ``side``; the long side is rounded down, as torchvision's Resize does."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return resized(images, side * height // short, side * width // short, mode)


def centre(images: Tensor, side: int) -> Tensor:
    """The middle [B, C, side, side]."""
    top, left = ((have - side) // 2 for have in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, a channel each."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


# ------------------------------------------------------------------------------------------------- loading


Rows = Callable[[Tensor], Tensor]


def _sscd_network(path: Path, device: str) -> tuple[Rows, int | None]:
    """The network, and the side of the only images that it takes."""
    if not is_weights(path):
        network = open_network(path, device)
        return network, network.side
    try:
        return sscd.network(tensors_of(path)).to(device), None
    except ValueError as error:
        raise error if isinstance(error, FeatureError) else FeatureError(f"{path}: {error}") from error


def _vision_model(kind: Literal["clip", "dinov2"], weights: str, device: str) -> tuple[Rows, Preprocessing, str]:
    """The network with its preprocessing, and 8 digits of it."""
    path = Path(weights)
    if path.is_file() and kind == "clip":
        raise FeatureError(f"{weights} is a file: name a folder in transformers' layout, or a hub id")
    if path.is_file() and not is_weights(path):
        network = open_network(path, device)
        crop = network.side or _DINOV2.crop
        side = round(crop * _DINOV2.side / _DINOV2.crop)
        return network, Preprocessing(side, crop, *IMAGENET), digest_of_network(path)
    if path.is_file():
        try:
            module, preprocessing = dinov2.network(tensors_of(path)), _DINOV2
        except ValueError as error:
            raise error if isinstance(error, FeatureError) else FeatureError(f"{weights}: {error}") from error
    else:
        module, preprocessing = _transformers_model(kind, weights)
    module.to(device).eval().requires_grad_(False)
    output = "image_embeds" if kind == "clip" else "pooler_output"
    return lambda images: getattr(module(pixel_values=images), output), preprocessing, weights_digest(module)


_DINOV2 = Preprocessing(256, 224, *IMAGENET)  # its authors': bicubic to 256, and the middle 224 of it
_MODEL_TYPES = {
    "clip": ("clip", "clip_vision_model"),
    "dinov2": ("dinov2", "dinov2_with_registers"),
}


def _transformers_model(kind: str, weights: str) -> tuple[torch.nn.Module, Preprocessing]:
    """Only safetensors are read, and no code that a repository brings along is run."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

    local = Path(weights).is_dir()
    if not local and (Path(weights).is_absolute() or weights.startswith((".", "~")) or weights.count("/") > 1):
        raise FeatureError(f"there is no {weights}: name a folder in transformers' layout, or a hub id")
    try:
        config = AutoConfig.from_pretrained(weights, local_files_only=local)
        if config.model_type not in _MODEL_TYPES[kind]:
            raise FeatureError(f"{weights} holds a model of the type {config.model_type!r}, not {kind}")
        loader: Any = CLIPVisionModelWithProjection if kind == "clip" else AutoModel
        with quiet():
            module = loader.from_pretrained(weights, local_files_only=local, use_safetensors=True)
        preprocessing = _preprocessing(kind, weights, local, module.config)
    except FeatureError:
        raise
    except Exception as error:  # the loaders raise dozens of types; all mean that this is not a usable model
        raise FeatureError(f"{weights} cannot be loaded as a {kind} vision model: {one_line(error)}") from error
    return module, preprocessing


def _preprocessing(kind: str, weights: str, local: bool, config: Any) -> Preprocessing:
    """What the model's preprocessor_config.json says, else its authors' numbers."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        weights, "preprocessor_config.json", local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    said = {} if found is None else json_of(Path(found))
    mean, std = OPENAI_CLIP if kind == "clip" else IMAGENET
    size: Any = said.get("size", config.image_size if kind == "clip" else 256)
    square = isinstance(size, dict) and "shortest_edge" not in size
    side = int(size["height" if square else "shortest_edge"] if isinstance(size, dict) else size)
    crop: Any = said.get("crop_size", config.image_size if kind == "clip" else 224)
    crop = (
        side if square and not said.get("do_center_crop") else int(crop["height"] if isinstance(crop, dict) else crop)
    )
    if crop > side:
        raise FeatureError(f"{weights} asks for a crop of {crop} from images of {side}: its configuration is broken")
    return Preprocessing(side, crop, said.get("image_mean", mean), said.get("image_std", std), square)


def _autoencoder(weights: str, side: int | None, device: str) -> Latents:
    """The autoencoder of a diffusers folder (its subfolder ``vae``, or the folder itself)."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    from ..demo.bundled import FOLDER

    folder = Path(weights) if weights else FOLDER
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise FeatureError(f"there is no autoencoder in {weights}: name a diffusers folder, or its folder 'vae'")
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    try:
        config = json_of(folder / "config.json")
        chosen = classes[config["_class_name"]]
        with quiet():
            module = chosen.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # as above
        raise FeatureError(f"{folder} cannot be loaded as an autoencoder: {one_line(error)}") from error
    module = module.to(device).eval().requires_grad_(False)

    def encode(images: Tensor) -> Tensor:
        encoded = module.encode(images * 2 - 1)
        latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return latents

    own = config.get("sample_size") or (64 if not weights else _LATENTS_SIDE)
    return Latents(encode, weights_digest(module), side or int(own))


def weights_digest(module: torch.nn.Module) -> str:
    """8 hexadecimal digits of all weights under their names, which sets of release 0.1 go by too."""
    return digest(named(sampled(of_module(module))))[:8]


def _check_rows(features: Features, weights: str, device: str) -> None:
    """One image through the network: better now than after an hour. Raises FeatureError."""
    try:
        with torch.no_grad():
            rows = features(torch.linspace(0, 1, 3 * 48 * 64, device=device).view(1, 3, 48, 64))
    except Exception as error:  # whatever a network of another shape raises
        raise FeatureError(f"{weights} does not take an image: {one_line(error)}") from error
    if rows.ndim != 2 or rows.shape[0] != 1 or not torch.isfinite(rows).all():
        raise FeatureError(f"{weights} does not give one row of finite numbers for one image: it is not such a network")
