"""Mitigations that a sampler carries out: away from training images, guidance that begins late, another noise."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..sd_dejavu.calibration.profile import Profile
from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import CLIP, VAE, HostConditioning, Latent, ModelPatcher
from ..sd_dejavu.hosts.comfyui.reference import HostReferences
from ..sd_dejavu.mitigations import anti_memorization_guidance, guidance_transition
from . import sockets


class AMG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuAMG",
            display_name="Anti-Memorization Guidance (Déjà Vu)",
            category=sockets.CATEGORY,
            description="Steers every run away from the nearest training image, but only while the image is near it.",
            inputs=[
                io.Model.Input("model", tooltip="The model, with its LoRAs and other patches."),
                io.Vae.Input("vae", tooltip="Its autoencoder: images are compared."),
                sockets.References.Input("references", tooltip="From Build or Load Reference Set."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Its text encoder, for the captions of training images; not needed with Text Encode (Déjà Vu).",
                ),
                *sockets.inputs_of(anti_memorization_guidance.Settings),
            ],
            outputs=[io.Model.Output(tooltip="The same model, steered.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the host would share what it keeps with a like node of another id
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, vae: VAE, references: HostReferences, clip: CLIP | None = None, **settings: Any
    ) -> io.NodeOutput:
        wanted = anti_memorization_guidance.Settings(**settings)
        tell = partial(comfyui.tell, str(cls.hidden.unique_id))
        return io.NodeOutput(comfyui.anti_memorization(references, vae, clip, wanted, tell).attach(model))


class GuidanceTransition(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuGuidanceTransition",
            display_name="Guidance Transition (Déjà Vu)",
            category=sockets.CATEGORY,
            description="No guidance until the prompt's pull has passed its first minimum; for prompts known to be memorised.",
            inputs=[
                io.Model.Input("model", tooltip="The model, with its LoRAs and other patches."),
                *sockets.inputs_of(guidance_transition.Settings),
            ],
            outputs=[io.Model.Output(tooltip="The same model, guided late.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # as above
        )

    @classmethod
    def execute(cls, model: ModelPatcher, **settings: Any) -> io.NodeOutput:
        wanted = guidance_transition.Settings(**settings)
        tell = partial(comfyui.tell, str(cls.hidden.unique_id))
        return io.NodeOutput(comfyui.transition(wanted, tell).attach(model))


class InitialNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuInitialNoise",
            display_name="Initial Noise (Déjà Vu)",
            category=sockets.CATEGORY,
            description="Gives another starting noise for a memorised prompt, for SamplerCustomAdvanced. The prompt stays as it is.",
            inputs=[
                io.Model.Input("model", tooltip="The model."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The guider's negative prompt. It is the baseline if there is no text encoder for the empty prompt.",
                ),
                *sockets.run_inputs(),
                *sockets.target_inputs("The score that counts as ordinary; 0 takes it from the calibration."),
                io.Combo.Input(
                    "method", options=list(sockets.methods("noise")), tooltip="How the noise is changed; see the help."
                ),
                *sockets.inputs_of_methods("noise"),
            ],
            outputs=[
                io.Noise.Output(tooltip="What to start from instead."),
                io.Model.Output(tooltip="The model, with guidance that begins late where the method has it so."),
                io.String.Output(display_name="report", tooltip="The score before and after, as JSON."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: HostConditioning,
        negative: HostConditioning,
        latent_image: Latent,
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        target: float,
        method: str,
        calibration: Profile | None = None,
        **settings: object,
    ) -> io.NodeOutput:
        chosen = sockets.methods("noise")[method]
        noise, guided, document = comfyui.adjust_noise(
            model,
            positive,
            negative,
            sockets.start_of(model, latent_image, seed, steps, sampler_name, scheduler, denoise),
            seed,
            target,
            chosen,
            sockets.settings_of(chosen.settings, settings),
            calibration,
            sockets.user_folder(),
        )
        return io.NodeOutput(noise, guided, json.dumps(document, ensure_ascii=False))


NODES = [AMG, GuidanceTransition, InitialNoise]
