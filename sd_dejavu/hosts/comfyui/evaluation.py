"""What the host's guider and its functions after guidance tell of one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...core.conditioning import Conditioning
from .api import Entry, GuidanceArguments, Guider
from .model import ComfyModel, HostStep, as_images


def negative_of(guider: Guider) -> list[Entry]:
    """The host's conditioning that guidance measures the prompt against; empty where it has none."""
    conds = guider.conds
    return conds.get("empty_negative_prompt", conds.get("negative")) or []  # the first with perpendicular guidance


def unconditional_of(arguments: GuidanceArguments, negative: list[Entry]) -> Tensor | None:
    """The prediction without the prompt in what a post-cfg function is given; None where it tells none.

    Guidance leaves zeros for what it did not evaluate, and guiders of other kinds hand over other conditionings.
    """
    name = "empty_cond" if "empty_cond_denoised" in arguments else "uncond"
    return arguments[f"{name}_denoised"] if negative and arguments.get(name) is negative else None  # type: ignore[literal-required]


def level_of(conds: Mapping[str, list[Entry]], sigma: Tensor) -> float | None:
    """The noise level, where the prompt or the negative prompt acts in a part of the steps only; read from the device.

    None where it does not matter, so that nothing is waited for.
    """
    names = ("positive", "negative", "empty_negative_prompt")
    entries = (entry for name in names for entry in conds.get(name) or ())
    return float(sigma[0]) if any("timestep_start" in e or "timestep_end" in e for e in entries) else None


def covers(entries: Sequence[Entry], level: float | None) -> bool:
    """Whether some conditioning acts on the whole image at this level (see :func:`level_of`): the host leaves zeros
    where none does.
    """
    whole = [e for e in entries if "area" not in e and "mask" not in e]
    if any("timestep_start" not in e and "timestep_end" not in e for e in whole):
        return True
    return level is not None and any(
        e.get("timestep_end", 0.0) <= level <= e.get("timestep_start", float("inf")) for e in whole
    )


def guided_step(
    arguments: GuidanceArguments, guider: Guider, level: float | None, number: int, make_model: Callable[[], ComfyModel]
) -> HostStep | None:
    """The step of a guidance rule, from what a post-cfg function is given; None where it is no guidance of the prompt.

    Without guidance (cfg 1) both predictions are the one with the prompt. ``number`` counts the run's evaluations.
    """
    positive, negative = guider.conds.get("positive"), negative_of(guider)
    if positive is None or arguments.get("cond") is not positive or not covers(positive, level):
        return None
    with_prompt = as_images(arguments["cond_denoised"])
    found = unconditional_of(arguments, negative) if covers(negative, level) else None
    if found is not None:
        unconditional = as_images(found)
    elif arguments.get("uncond") is None:
        unconditional = with_prompt
    else:
        return None
    x, sigma, model = as_images(arguments["input"]), arguments["sigma"], make_model()

    def predict(conditioning: Conditioning) -> Tensor:
        with torch.no_grad():
            return model(x, sigma, conditioning)

    scale, host = float(arguments["cond_scale"]), as_images(arguments["denoised"])
    return HostStep(x, sigma, with_prompt, unconditional, scale, number, predict, host)
