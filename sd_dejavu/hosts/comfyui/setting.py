"""What a run's scores depend on besides the prompt, and the calibration that was made for it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...calibration import store
from ...calibration.profile import Profile, Setting
from ...core.conditioning import Unconditional
from ...run.monitoring import Monitoring
from ...weights import digest, named, sampled
from .api import CLIP, Entry
from .model import ComfyModel, text_encoder_of
from .text import SOURCE, empty_prompt


def setting_of(
    model: ComfyModel,
    baseline: Unconditional,
    negative: list[Entry],
    scale: float,
    from_image: bool = False,
    sampler: str = "",
    kind: Unconditional = "empty prompt",
) -> Setting:
    """``kind`` is what the negative conditioning is: whole runs depend on it whatever they are measured against."""
    return Setting(
        model=model.fingerprint,
        prediction_type=model.prediction_type,
        latent_shape=model.latent_shape,
        steps=len(model.sigmas(0)) - 1,
        sigma=model.sigmas(0)[0],
        guidance_scale=scale,
        baseline=baseline,
        negative_prompt="" if "negative prompt" not in (baseline, kind) else negative_name(negative),
        begins_with="an image" if from_image else "noise",
        sampler=sampler,
        patches=model.patches,
        text_encoder=model.text_encoder,
    )


def profile_for(setting: Setting, model: ComfyModel, monitoring: Monitoring, folder: Path | None) -> Profile | None:
    return store.find_for_monitor(setting, monitoring.score, model.brought_along, folder)


def kind_of(negative: list[Entry], clip: CLIP | None = None) -> Unconditional:
    """The empty prompt where the host's negative conditioning comes from one, or equals what ``clip`` makes of it.

    Conditionings that no text encodes to are told apart: those without rows, and those of zeros. Asked before the
    sampling loop, it reads the encoder's digits too, for which the loop would have to wait for the device.
    """
    if clip is not None:
        text_encoder_of(clip)
    if negative and all(entry.get("cross_attn") is None for entry in negative):
        return "prompt left out"
    if negative and all(_is_zeroed(entry) for entry in negative):
        return "zeroed prompt"
    for entry in negative:
        source, rows = entry.get(SOURCE), entry.get("cross_attn")
        if source is not None and not _is_zeroed(entry):
            is_empty = not source.text.strip()
        else:
            is_empty = clip is not None and rows is not None and _equals_empty(rows, clip)
        if not is_empty:
            return "negative prompt"
    return "empty prompt"


def _is_zeroed(entry: Entry) -> bool:
    """A conditioning that ConditioningZeroOut gave: it keeps the dict of the prompt, its text included."""
    rows = entry.get("cross_attn")
    return rows is not None and not bool(torch.count_nonzero(rows))


def _equals_empty(rows: Tensor, clip: CLIP) -> bool:
    empty = empty_prompt(clip).rows
    return empty.shape == rows.shape and torch.allclose(empty.to(rows), rows, atol=1e-3, rtol=1e-3)


def negative_name(negative: list[Entry]) -> str:
    """The negative prompt as typed, or a digest of its rows where the text is unknown: read from them once."""
    names = []
    for entry in negative or ():
        source, rows = entry.get(SOURCE), entry.get("cross_attn")
        if rows is None:
            names.append("")
        else:
            names.append(source.text if source is not None and not _is_zeroed(entry) else _row_name(rows))
    return " | ".join(names)


_row_names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _row_name(rows: Tensor) -> str:
    if rows not in _row_names:
        _row_names[rows] = f"conditioning {digest(named(sampled([('rows', rows, None)])))[:12]}"
    return str(_row_names[rows])
