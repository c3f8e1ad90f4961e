"""The audit of a training set in ComfyUI: each piece of work is done in a run of the host's own.

What is finished is kept below one folder, each audit in a folder of its own, so an interrupted one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...core.conditioning import Conditioning
from ...core.progress import Stopwatch
from ...reference.features import Metric
from ...run.measure import Measurement
from ...training.audit import Audit, AuditSettings, Subject, audit, entries_of, identity, ordinary_for, sampled
from ...training.ledger import Ledger, Progress
from ...training.tasks import Task, Trained, Variant, Work, nothing_apart
from .api import CLIP, VAE, ModelPatcher
from .model import ComfyModel, fingerprint, with_model
from .model import ordinary_for as prompts_for
from .reference import HostReferences, image_device
from .text import as_typed, encode_text

BATCH = 8
Values = list[dict[str, Any]]  # of a task's prompts


@dataclass(frozen=True)
class Loaded:
    """A model with its text encoder, as the host's loaders give them."""

    patcher: ModelPatcher
    clip: CLIP


@dataclass(frozen=True)
class Start:
    """What a run begins with: its latent, noise and sigmas."""

    latent: Tensor
    noise: Tensor
    sigmas: Tensor


class TrainedModel(ComfyModel):
    """A model with both ends of its autoencoder; it reads captions as they are, without weights."""

    def __init__(self, vae: VAE, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._vae = vae

    @property
    def image_size(self) -> tuple[int, int]:
        scale = self._vae.spacial_compression_encode()
        return self.latent_shape[-2] * scale, self.latent_shape[-1] * scale

    def encode(self, prompt: str) -> Conditioning:
        return super().encode(as_typed(prompt))

    def decode(self, latents: Tensor) -> Tensor:
        with self._elsewhere():
            images = self._vae.decode(self._inner.process_latent_out(latents))
        return images.movedim(-1, 1).float().cpu()

    def latents_of(self, images: Tensor) -> Tensor:
        with self._elsewhere():
            latents = self._vae.encode(images.movedim(1, -1))
        return self._inner.process_latent_in(latents.to(self._device)).float()

    @contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """The host may move the model out for the autoencoder: afterwards it is where the run needs it."""
        yield
        comfy.model_management.load_models_gpu([self._patcher])


class SetFeatures:
    """Those of a reference set, by networks that the host may have moved out."""

    def __init__(self, guard: HostReferences) -> None:
        self._guard = guard

    @property
    def name(self) -> str:
        return self._guard.features.name

    @property
    def metric(self) -> Metric:
        return self._guard.features.metric

    def __call__(self, images: Tensor) -> Tensor:
        self._guard.networks.load()
        return self._guard.features(images.to(image_device()))


def audit_lora(
    trained: Loaded,
    base: Loaded | None,
    vae: VAE,
    guard: HostReferences,
    start: Start,
    wanted: AuditSettings,
    measurement: Measurement,
    folder: Path,
    tell: Callable[[str], None],
) -> tuple[Audit, Subject]:
    """Which captions of a reference set bring their images back. With a ``base`` it is the gain over it that counts.

    ``tell`` is told how far it is.

    Raises ValueError where there is nothing to measure.
    """
    check(vae, start)
    entries = sampled(entries_of(guard.references), wanted.sample, measurement.seed)
    subject = Subject(entries, guard.references, SetFeatures(guard))
    ordinary = ordinary_for(entries, wanted.nulls, partial(prompts_for, trained.patcher))
    begun = identity(
        subject,
        ordinary,
        measurement,
        partition=wanted.partition,
        base=_name(base) if base is not None else "",
        **identity_of(trained, vae, start),
    )

    def engine(tasks: Sequence[Task], load: Callable[[Variant], Trained], work: Work) -> Iterator[tuple[Task, Values]]:
        for task in tasks:
            asked = base if task.variant.base and base is not None else trained
            yield task, done(asked, vae, start, work, task)

    found = audit(
        subject,
        [],
        ordinary,
        nothing_apart,
        Work(measurement, BATCH),
        Ledger.below(folder, begun),
        wanted,
        engine,
        shown(tell),
        base is not None,
    )
    return found, subject


def shown(tell: Callable[[str], None]) -> Progress:
    """On the host's own bar, and told in words."""
    bar, watch = comfy.utils.ProgressBar(1), Stopwatch()

    def show(stage: str, done: int, total: int) -> None:
        bar.update_absolute(done, total)
        tell(watch(stage, done, total).sentence)

    return show


def check(vae: VAE | None, start: Start) -> None:
    """Raises ValueError for an autoencoder, or a model, that an audit cannot use."""
    if vae is None:
        raise ValueError("the VAE input is empty: the checkpoint that was loaded may hold no autoencoder")
    vae.throw_exception_if_invalid()
    if vae.latent_dim != 2 or start.latent.ndim != 4:
        raise ValueError(
            "this model's autoencoder works on frames along a time axis, and the audit needs one of single images"
        )


def done(asked: Loaded, vae: VAE, start: Start, work: Work, task: Task) -> Values:
    """The values of one piece of work, in a run of the host's own."""
    asked.clip.load_model()  # a base model may share its text encoder: the LoRA's patches must be on it, or off
    return with_model(
        asked.patcher,
        encode_text(asked.clip, ""),
        start.latent,
        start.noise,
        start.sigmas,
        lambda model, x, sigma: work(model, task),
        partial(TrainedModel, vae),
    )


def identity_of(loaded: Loaded, vae: VAE, start: Start) -> dict[str, object]:
    """What is measured there, for the ledger."""
    return {
        "model": _name(loaded),
        "vae": fingerprint(vae.patcher, ""),
        "latent": list(start.latent.shape[1:]),
    }


def _name(loaded: Loaded) -> list[object]:
    clip = loaded.clip
    return [fingerprint(loaded.patcher), fingerprint(clip.patcher, ""), clip.layer_idx]
