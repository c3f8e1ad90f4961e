"""Calibration: what ordinary prompts score with a model, measured once and found again."""

from __future__ import annotations

from pathlib import Path

import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ..sd_dejavu.calibration import store
from ..sd_dejavu.calibration.profile import Profile
from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import CLIP, Latent, ModelPatcher
from ..sd_dejavu.report.wording import calibrated
from . import sockets


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuCalibrate",
            display_name="Calibrate (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="Measures ordinary prompts once, one evaluation each. From then on every Monitor gives p-values.",
            inputs=[
                io.Model.Input("model", tooltip="The model as it will be sampled, with its LoRAs."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                *(i for i in sockets.run_inputs() if i.id != "seed"),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="The negative prompt that the Monitor measures against; leave it empty for the empty prompt.",
                ),
                io.Int.Input("count", default=1000, min=20, max=100_000, tooltip="How many ordinary prompts."),
                io.Int.Input(
                    "whole_runs",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="How many of them to sample to the end: for the band under the curve, and for p-values of "
                    "scores over more than the first step. Each takes as long as an image.",
                ),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="The sampler's cfg, for whole runs."
                ),
                io.Boolean.Input(
                    "replace",
                    default=False,
                    optional=True,
                    tooltip="Replace the calibration for the same settings even if it holds more than this one.",
                ),
                io.String.Input(
                    "like",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts like those that will be judged, one a line: ordinary ones are recombined from their "
                    "words. Leave it empty for general ones, which a specialised model does not know.",
                ),
            ],
            outputs=[
                sockets.Calibration.Output(display_name="calibration", tooltip="For the Monitor node."),
                io.String.Output(display_name="report", tooltip="What was measured, and where it is kept."),
            ],
            is_output_node=True,  # its profile is kept whether or not it is wired to a Monitor
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        latent_image: Latent,
        steps: int,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        negative: str,
        count: int,
        whole_runs: int,
        cfg: float,
        replace: bool = False,
        like: str = "",
    ) -> io.NodeOutput:
        latent, noise, sigmas = sockets.start_of(model, latent_image, 0, steps, sampler_name, scheduler, denoise)
        bar = comfy.utils.ProgressBar(count + whole_runs)
        profile = comfyui.calibrate(
            model,
            clip,
            latent[:1],
            noise[:1],
            sigmas,
            negative,
            count,
            lambda stage: bar.update(1),
            whole_runs,
            comfy.samplers.sampler_object(sampler_name),
            cfg,
            [line for line in like.splitlines() if line.strip()],
        )
        path = store.path_for(profile.setting, sockets.user_folder())
        try:
            store.keep(profile, path, replace)
            kept = f"Kept as {path.name}."
        except store.HoldsMore as error:  # this run's monitor may have it all the same
            kept = f"Not kept: {error}."
        text = f"{calibrated(profile)} {kept}"
        return io.NodeOutput(profile, text, ui={"text": [text]})


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuLoadCalibration",
            display_name="Load Calibration (Déjà Vu)",
            category=sockets.CATEGORY,
            description="A calibration made earlier, from the folder where Calibrate keeps them.",
            inputs=[io.Combo.Input("name", options=_names(), tooltip="The file.")],
            outputs=[sockets.Calibration.Output(display_name="calibration", tooltip="For the Monitor node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> float:
        path = _path(name)
        return path.stat().st_mtime if path is not None else 0.0

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        if name is None:  # linked: the host does not know yet what will come
            return True
        return True if _path(name) is not None else _absent(name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        path = _path(name)
        if path is None:
            raise ValueError(_absent(name))
        return io.NodeOutput(Profile.load(path))


def _absent(name: str) -> str:
    return f"there is no calibration named {name!r}: make one with Calibrate"


def _names() -> list[str]:
    return sorted(path.name for path in sockets.user_folder().glob("*.json"))


def _path(name: str) -> Path | None:
    """The file of this very name in our folder; nothing outside it can be named."""
    return sockets.user_folder() / name if name in _names() else None


NODES = [Calibrate, LoadCalibration]
