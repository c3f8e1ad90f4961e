"""The repair of a LoRA in ComfyUI: each candidate is put on the model as Load LoRA does, and drawn in the host's own runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import comfy.lora
import comfy.sd
import comfy.utils
import torch

from ...run.measure import Measurement
from ...training.audit import Subject, entries_of, ordinary_for
from ...training.lora_files import Contents
from ...training.repair import Repaired, RepairSettings, repair
from ...training.spectral import HostPart, Place, places_by_keys
from ...training.tasks import Task, Trained, Variant, Work, nothing_apart
from .api import VAE
from .audit import BATCH, Loaded, SetFeatures, Start, Values, check, done, identity_of, shown
from .model import ordinary_for as prompts_for
from .reference import HostReferences


def repair_lora(
    base: Loaded,
    vae: VAE,
    guard: HostReferences,
    start: Start,
    lora: Path,
    out: Path,
    wanted: RepairSettings,
    measurement: Measurement,
    folder: Path,
    tell: Callable[[str], None],
) -> Repaired:
    """Writes what is left of a LoRA that was trained on the base model with the images of a reference set.

    What is measured is kept below ``folder`` until then. ``tell`` is told how far it is. Raises ValueError where the file or the set cannot be used, or ``out`` is there already.
    """
    check(vae, start)
    entries = entries_of(guard.references)
    ordinary = ordinary_for(entries, wanted.ordinary, partial(prompts_for, base.patcher))

    def engine(tasks: Sequence[Task], load: Callable[[Variant], Trained], work: Work) -> Iterator[tuple[Task, Values]]:
        asked, variant = base, Variant(base=True)
        for task in tasks:
            if task.variant != variant:
                asked, variant = _with_lora(base, task.variant), task.variant
            yield task, done(asked, vae, start, work, task)

    return repair(
        Subject(entries, guard.references, SetFeatures(guard)),
        lora,
        out,
        ordinary,
        nothing_apart,
        partial(_places_of, base),
        Work(measurement, BATCH),
        folder,
        wanted,
        engine,
        shown(tell),
        **identity_of(base, vae, start),
    )


def _with_lora(base: Loaded, variant: Variant) -> Loaded:
    if variant.base or variant.lora is None:
        return base
    tensors = comfy.utils.load_torch_file(variant.lora, safe_load=True)
    return Loaded(*comfy.sd.load_lora_for_models(base.patcher, base.clip, tensors, variant.strength, variant.strength))


def _places_of(base: Loaded, contents: Contents) -> tuple[Contents, Mapping[str, Place]]:
    """The place of each module of a file that the host would put on this model, by name."""
    network, encoders = base.patcher.model, base.clip.cond_stage_model
    parts = (
        HostPart("unet", comfy.lora.model_lora_keys_unet(network, {}), partial(_tensor, network)),
        HostPart("text_encoder", comfy.lora.model_lora_keys_clip(encoders, {}), partial(_tensor, encoders)),
    )
    return contents, places_by_keys(contents, parts)


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    place, _, last = name.rpartition(".")
    found: torch.Tensor | None = getattr(comfy.utils.get_attr(model, place), last, None)
    return found
