"""Training: the host's LoRA training without the samples that the model is memorising."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import HostConditioning, ModelPatcher
from ..sd_dejavu.training.filter import FilterSettings
from . import sockets


class TrainingFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuTrainingFilter",
            display_name="Training Filter (Déjà Vu)",
            category=sockets.CATEGORY,
            description="For Train LoRA: keeps samples that the model is memorising out of the loss.",
            inputs=[
                io.Model.Input("model", tooltip="The model for Train LoRA to train."),
                io.Conditioning.Input("empty", tooltip="The empty prompt, from a CLIP Text Encode without text."),
                *sockets.inputs_of(FilterSettings),
            ],
            outputs=[io.Model.Output(tooltip="The same model, for Train LoRA.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the host would share what it keeps with a like node of another id
        )

    @classmethod
    def execute(cls, model: ModelPatcher, empty: HostConditioning, **settings: Any) -> io.NodeOutput:
        wanted = FilterSettings(**settings)
        if wanted.filter == "none":
            return io.NodeOutput(model)
        tell = partial(comfyui.tell, str(cls.hidden.unique_id))
        return io.NodeOutput(comfyui.HostFilter(wanted, empty, tell).attach(model))


NODES = [TrainingFilter]
