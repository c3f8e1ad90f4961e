"""Repair: from a LoRA that copies its training set, one that does not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import CLIP, VAE, Latent, ModelPatcher
from ..sd_dejavu.hosts.comfyui.audit import Loaded
from ..sd_dejavu.hosts.comfyui.reference import HostReferences
from ..sd_dejavu.report.repair_rows import as_markdown, sentence
from ..sd_dejavu.run.measure import Measurement
from ..sd_dejavu.training.repair import RepairSettings, file_called
from . import sockets

FOLDER = "loras"


class RepairLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuRepairLora",
            display_name="Repair LoRA (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="Makes of a LoRA that copies its training set one that does not, without training it anew, and tells what that costs in likeness to the set's style.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder, without the LoRA."),
                *sockets.training_set_inputs(),
                io.Combo.Input(
                    "lora_name", options=folder_paths.get_filename_list(FOLDER), tooltip="The LoRA to repair."
                ),
                io.String.Input(
                    "name", default="repaired", tooltip="The name of the new file, beside the other LoRAs."
                ),
                *sockets.inputs_of(RepairSettings),
                *sockets.measuring_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="table", tooltip="Copies and likeness of all that was tried, as Markdown."
                ),
                io.String.Output(display_name="lora", tooltip="The new LoRA's name, as Load LoRA lists it."),
                io.String.Output(display_name="report", tooltip="The same as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        if name is None:  # linked: the host does not know yet what will come
            return True
        try:
            file_called(name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        references: HostReferences,
        latent_image: Latent,
        lora_name: str,
        name: str,
        **settings: object,
    ) -> io.NodeOutput:
        file = file_called(name)
        measurement = sockets.settings_of(Measurement, settings)
        found = comfyui.repair_lora(
            Loaded(model, clip),
            vae,
            references,
            sockets.measuring_start(model, latent_image, measurement),
            Path(folder_paths.get_full_path_or_raise(FOLDER, lora_name)),
            Path(folder_paths.get_folder_paths(FOLDER)[0], file),
            sockets.settings_of(RepairSettings, settings),
            measurement,
            sockets.kept_folder("repairs"),
            partial(comfyui.tell, str(cls.hidden.unique_id)),
        )
        return io.NodeOutput(
            as_markdown(found),
            file,
            json.dumps(found.as_json(), ensure_ascii=False),
            ui={"text": [sentence(found)]},
        )


NODES = [RepairLora]
