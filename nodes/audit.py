"""Audit: does this LoRA copy the images it was trained with?"""

from __future__ import annotations

import json
from functools import partial

import torch
from comfy_api.latest import io

from ..sd_dejavu.calibration.first_step import PROMPTS_A_SEED
from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import CLIP, VAE, Latent, ModelPatcher
from ..sd_dejavu.hosts.comfyui.audit import Loaded
from ..sd_dejavu.hosts.comfyui.reference import HostReferences
from ..sd_dejavu.report.audit_image import audit_images
from ..sd_dejavu.report.audit_rows import as_markdown, ranked, row_as_json, sentence, thumbnails_of
from ..sd_dejavu.run.measure import Measurement
from ..sd_dejavu.training.audit import AuditSettings
from . import sockets


class AuditLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuAuditLora",
            display_name="Audit LoRA (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="Does my LoRA copy its training set? Measures every caption and draws the most suspicious ones again. If you stop it, it goes on when you run it again.",
            inputs=[
                io.Model.Input("model", tooltip="The model with the LoRA."),
                io.Clip.Input("clip", tooltip="Its text encoder, with the LoRA."),
                *sockets.training_set_inputs(),
                *sockets.inputs_of(AuditSettings, leave_out=("sweep", "strength_steps", "partition")),
                *sockets.measuring_inputs(),
                io.Model.Input(
                    "base_model",
                    optional=True,
                    tooltip="The model without the LoRA. With it, what counts is what the LoRA adds.",
                ),
                io.Clip.Input(
                    "base_clip",
                    optional=True,
                    tooltip="Its text encoder without the LoRA, where the LoRA changes it; left open, that of the model.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="All training images, worst first, as Markdown."),
                io.Image.Output(
                    display_name="worst images", tooltip="Each training image beside those drawn of its caption."
                ),
                io.String.Output(display_name="report", tooltip="The same rows as JSON, with all that was found."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        references: HostReferences,
        latent_image: Latent,
        base_model: ModelPatcher | None = None,
        base_clip: CLIP | None = None,
        **settings: object,
    ) -> io.NodeOutput:
        if base_model is None and base_clip is not None:
            raise ValueError("a base clip alone makes no base model: link the model without the LoRA too")
        # Results do not depend on the size of the pieces; small ones are shown and kept sooner.
        wanted = sockets.settings_of(AuditSettings, {**settings, "partition": PROMPTS_A_SEED})
        measurement = sockets.settings_of(Measurement, settings)
        found, subject = comfyui.audit_lora(
            Loaded(model, clip),
            Loaded(base_model, base_clip or clip) if base_model is not None else None,
            vae,
            references,
            sockets.measuring_start(model, latent_image, measurement),
            wanted,
            measurement,
            sockets.kept_folder("audits"),
            partial(comfyui.tell, str(cls.hidden.unique_id)),
        )
        images = audit_images(found, thumbnails_of(found, subject))
        return io.NodeOutput(
            as_markdown(found),
            torch.cat([sockets.image_of(image) for image in images]),
            json.dumps([row_as_json(row) for row in ranked(found)], ensure_ascii=False),
            ui={"text": [f"{sentence(found)}."]},
        )


NODES = [AuditLora]
