"""Prompts: encoding that keeps its words, and the published perturbations."""

from __future__ import annotations

from typing import get_args

from comfy_api.latest import io

from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import CLIP
from ..sd_dejavu.mitigations.perturb_prompt import Perturbation, Settings, perturb
from . import sockets


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuTextEncode",
            display_name="Text Encode (Déjà Vu)",
            category=sockets.CATEGORY,
            description="Like CLIP Text Encode, and keeps the words with the conditioning, so that the verdict can name them.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
            ],
            outputs=[io.Conditioning.Output(tooltip="The conditioning, for any node that takes one.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the host would share what it keeps with a like node of another id
        )

    @classmethod
    def execute(cls, clip: CLIP, text: str) -> io.NodeOutput:
        return io.NodeOutput(comfyui.encode_text(clip, text, str(cls.hidden.unique_id)))


class PerturbPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuPerturbPrompt",
            display_name="Perturb Prompt (Déjà Vu)",
            category=sockets.CATEGORY,
            description="The published baselines against memorised prompts: random words, random numbers or repeated words.",
            inputs=[
                io.String.Input("text", multiline=True, tooltip="The prompt."),
                io.Combo.Input("kind", options=list(get_args(Perturbation)), tooltip="What is put into the prompt."),
                *sockets.inputs_of(Settings),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=sockets.SEED_LIMIT,
                    control_after_generate=True,
                    tooltip="The same seed gives the same prompt.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The changed prompt.")],
        )

    @classmethod
    def execute(cls, text: str, kind: Perturbation, insertions: int, seed: int) -> io.NodeOutput:
        return io.NodeOutput(perturb(text, kind, insertions, seed))


NODES = [TextEncode, PerturbPrompt]
