"""The repair of a LoRA in ComfyUI: each candidate is put on the model as Load LoRA does, and drawn in the host's own runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import comfy.lora
import comfy.sd
import comfy.utils

from ...run.measure import Measurement
from ...training.audit import Subject, entries_of, ordinary_for
from ...training.lora_files import Contents, fits
from ...training.repair import Repaired, RepairSettings, repair
from ...training.spectral import Place
from ...training.tasks import Task, Trained, Variant, Work, nothing_apart
from .api import VAE
from .audit import BATCH, Loaded, SetFeatures, Start, Values, check, done
from .model import ordinary_for as prompts_for
from .reference import HostReferences

_WEIGHT, _NETWORK = ".weight", "diffusion_model."


def repair_lora(
    base: Loaded,
    vae: VAE,
    guard: HostReferences,
    start: Start,
    lora: Path,
    out: Path,
    wanted: RepairSettings,
    measurement: Measurement,
) -> Repaired:
    """Writes what is left of a LoRA that was trained on the base model with the images of a reference set.

    Raises ValueError where the file or the set cannot be used, or ``out`` is there already.
    """
    check(vae, start)
    entries = entries_of(guard.references)
    ordinary = ordinary_for(entries, wanted.ordinary, partial(prompts_for, base.patcher))
    bar = comfy.utils.ProgressBar(1)

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
        wanted,
        engine,
        lambda stage, count, total: bar.update_absolute(count, total),
    )


def _with_lora(base: Loaded, variant: Variant) -> Loaded:
    if variant.base or variant.lora is None:
        return base
    tensors = comfy.utils.load_torch_file(variant.lora, safe_load=True)
    return Loaded(*comfy.sd.load_lora_for_models(base.patcher, base.clip, tensors, variant.strength, variant.strength))


def _places_of(base: Loaded, contents: Contents) -> tuple[Contents, Mapping[str, Place]]:
    """The place of each module of a file that the host would put on this model, by name."""
    network, encoders = base.patcher.model, base.clip.cond_stage_model
    of_network = comfy.lora.model_lora_keys_unet(network, {})
    of_encoders = comfy.lora.model_lora_keys_clip(encoders, {})
    found: dict[str, Place] = {}
    for module in contents.modules:
        for part, model, keys in (("unet", network, of_network), ("text_encoder", encoders, of_encoders)):
            if (key := keys.get(module.name)) is None:
                continue
            name, cut = (key, None) if isinstance(key, str) else key[:2]  # a part of one that holds several
            weight = comfy.utils.get_attr(model, name).detach()
            weight = weight if cut is None else weight.narrow(*cut)
            bias = getattr(comfy.utils.get_attr(model, name.rpartition(".")[0]), "bias", None)
            if fits(weight, module, bias):
                found[module.name] = Place(part, name.removesuffix(_WEIGHT).removeprefix(_NETWORK), weight.cpu())
                break
    return contents, found
