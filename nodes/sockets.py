"""What the node files share: our own sockets, and inputs made from the core's settings."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from ..sd_dejavu.core.settings import Option, options_of
from ..sd_dejavu.hosts.comfyui.api import Latent, ModelPatcher
from ..sd_dejavu.hosts.comfyui.audit import Start
from ..sd_dejavu.mitigations import Mitigation, available
from ..sd_dejavu.run.measure import Measurement

CATEGORY = "Déjà Vu"
# What people search for who do not know our names; older hosts have no such words.
_WORDS = ["memorisation", "memorization", "memorised", "memorized", "replay", "plagiarism", "copied training image"]
FOUND_BY = {"search_aliases": _WORDS} if "search_aliases" in getattr(io.Schema, "__dataclass_fields__", {}) else {}
Monitor = io.Custom("DEJAVU_MONITOR")
Calibration = io.Custom("DEJAVU_CALIBRATION")
References = io.Custom("DEJAVU_REFERENCES")

SEED_LIMIT = 0xFFFFFFFFFFFFFFFF
FLOAT_LIMIT = 1e9  # of numbers that a method leaves unbounded
DOWNSCALE_RATIOS = (
    "downscale_ratio_spacial",
    "downscale_ratio_temporal",
)  # kept with a latent, where the host has them


def inputs_of(settings: type, leave_out: tuple[str, ...] = (), optional: bool = False) -> list[io.Input]:
    """One input for each option of a settings class, with its help, range and default."""
    return [_input(known, optional) for known in options_of(settings) if known.name not in leave_out]


def inputs_of_methods(*touches: str, beside: type | None = None, optional: bool = False) -> list[io.Input]:
    """The options of all mitigations that touch one of these, method by method; methods may share their settings.

    ``beside`` are settings that have inputs already.
    """
    classes = dict.fromkeys(method.settings for method in methods(*touches).values())
    return [known for settings in classes if settings is not beside for known in inputs_of(settings, (), optional)]


def methods(*touches: str) -> dict[str, Mitigation]:
    """The core's mitigations that touch one of these and need no reference images, by name."""
    return {
        name: method
        for name, method in available().items()
        if method.touches in touches and not method.needs_references
    }


def settings_of(settings: type, values: dict[str, object]) -> Any:
    """A method's own settings out of those of all methods; what is missing has its default."""
    given = {known.name: values.get(known.id, known.default) for known in options_of(settings)}
    left_open = {known.name for known in options_of(settings) if known.default is None and not given[known.name]}
    return settings(**{name: value for name, value in given.items() if name not in left_open})


def _input(known: Option, optional: bool = False) -> io.Input:
    shown: dict[str, Any] = {"display_name": known.name.replace("_", " "), "tooltip": known.help}
    shown["optional"] = optional or known.later
    if known.choices:
        return io.Combo.Input(known.id, options=list(known.choices), default=known.default, **shown)
    if known.kind is bool:
        return io.Boolean.Input(known.id, default=known.default, **shown)
    if known.kind is int:
        least = -SEED_LIMIT if known.minimum is None else int(known.minimum)
        most = SEED_LIMIT if known.maximum is None else int(known.maximum)
        if known.id == "seed":  # the page adds such a choice to every seed; another seed would begin the work anew
            shown["control_after_generate"] = "fixed"
        return io.Int.Input(known.id, default=known.default, min=least, max=most, **shown)
    if known.kind is float:
        low, high = (
            limit if bound is None else bound
            for bound, limit in ((known.minimum, -FLOAT_LIMIT), (known.maximum, FLOAT_LIMIT))
        )
        step = 0.001 if high <= 1 else 0.01
        # A float without a default is left to the method: shown as 0.
        default = 0.0 if known.default is None else known.default
        return io.Float.Input(known.id, default=default, min=low, max=high, step=step, round=False, **shown)
    return io.String.Input(known.id, default=known.default, multiline=True, **shown)


def target_inputs(target: str) -> list[io.Input]:
    """What a mitigation comes down to; ``target`` is the help of its number."""
    return [
        Calibration.Input("calibration", optional=True, tooltip="Scores of ordinary prompts."),
        io.Float.Input("target", default=0.0, min=0.0, max=1000.0, step=0.01, tooltip=target),
    ]


def run_inputs() -> list[io.Input]:
    """The settings of a sampler that decide where its run begins."""
    return [
        io.Latent.Input("latent_image", tooltip="The latent that the sampler will get: its size counts."),
        io.Int.Input(
            "seed", default=0, min=0, max=SEED_LIMIT, control_after_generate=True, tooltip="The sampler's seed."
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The sampler's steps."),
        io.Combo.Input("sampler_name", options=comfy.samplers.SAMPLER_NAMES, tooltip="The sampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.SCHEDULER_NAMES, tooltip="The sampler's scheduler."),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="The sampler's denoise."),
    ]


def training_set_inputs() -> list[io.Input]:
    """What an audit and a repair measure a model with, beside it and its text encoder."""
    return [
        io.Vae.Input("vae", tooltip="Its autoencoder."),
        References.Input(
            "references", tooltip="The training set, with its captions: from Build or Load Reference Set."
        ),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size that was trained on."),
    ]


def measuring_inputs() -> list[io.Input]:
    """How an audit and a repair measure."""
    return inputs_of(Measurement, leave_out=("score", "negative", "baseline", "alpha"))


def measuring_start(model: ModelPatcher, latent_image: Latent, measurement: Measurement) -> Start:
    """Where the runs of an audit and a repair begin: one latent, from full noise."""
    latent, noise, sigmas = start_of(
        model, latent_image, measurement.seed, measurement.steps, "euler", "normal", denoise=1.0
    )
    return Start(latent[:1], noise[:1], sigmas)


def start_of(
    model: ModelPatcher, latent_image: Latent, seed: int, steps: int, sampler_name: str, scheduler: str, denoise: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latent, noise, sigmas) as the KSampler node would begin with them."""
    known = signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent_image.get(name) for name in DOWNSCALE_RATIOS if name in known}
    latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], **ratios)
    noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
    sampler = comfy.samplers.KSampler(
        model, steps=steps, device=model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise
    )
    return latent, noise, sampler.sigmas


def user_folder() -> Path:
    """Where calibrations are kept."""
    return Path(folder_paths.get_user_directory()) / "dejavu" / "calibration"


def kept_folder(name: str) -> Path:
    """Beside it: where reference sets are kept, or what audits or repairs have measured, so that a stopped one goes on."""
    return user_folder().parent / name


def image_of(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> the host's IMAGE [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float()[None] / 255
