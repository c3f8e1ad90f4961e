"""Before sampling: which words of a prompt bring the score about, and a conditioning that is not memorised."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..sd_dejavu.calibration.profile import Profile
from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import HostConditioning, Latent, ModelPatcher
from ..sd_dejavu.mitigations.optimise_conditioning import Settings
from ..sd_dejavu.run.monitoring import OPTIMISE, Monitoring
from . import sockets

_NEGATIVE = io.Conditioning.Input(
    "negative",
    tooltip="The sampler's negative prompt. It is the baseline if there is no text encoder for the empty prompt.",
)


class Explain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuExplain",
            display_name="Explain (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="Tells before sampling whether a prompt is likely memorised, and which words make it so.",
            inputs=[
                io.Model.Input("model", tooltip="The model."),
                io.Conditioning.Input("positive", tooltip="The prompt, from Text Encode (Déjà Vu)."),
                _NEGATIVE,
                *sockets.run_inputs(),
                sockets.Calibration.Input("calibration", optional=True, tooltip="Scores of ordinary prompts."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="overlay", tooltip="The prompt, with each word shaded by how much it counts."
                ),
                io.String.Output(display_name="report", tooltip="Verdict and words as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the host would share what it keeps with a like node of another id
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: HostConditioning,
        negative: HostConditioning,
        calibration: Profile | None = None,
        **run: Any,
    ) -> io.NodeOutput:
        from ..sd_dejavu.report.word_image import word_image
        from ..sd_dejavu.report.wording import sentence

        monitoring = Monitoring(explain="always")
        report = comfyui.examine(
            model,
            positive,
            negative,
            sockets.start_of(model, **run),
            monitoring,
            calibration,
            sockets.user_folder(),
            comfyui.LiveReport(str(cls.hidden.unique_id)),
        )
        document = report.as_json()
        comfyui.wait_until_told()
        return io.NodeOutput(
            sockets.image_of(word_image(report.highest, report.state.notes)),
            json.dumps(document, ensure_ascii=False),
            ui={"text": [sentence(report.verdicts[0])], "dejavu": [document]},
        )


class MitigateConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuMitigate",
            display_name="Mitigate Conditioning (Déjà Vu)",
            category=sockets.CATEGORY,
            description="Gives another conditioning for a memorised prompt, by the method you choose; for any sampler with this noise.",
            inputs=[
                io.Model.Input("model", tooltip="The model."),
                io.Conditioning.Input("positive", tooltip="The prompt; from Text Encode (Déjà Vu) it works best."),
                _NEGATIVE,
                *sockets.run_inputs(),
                *sockets.target_inputs(
                    "The score to come down to; 0 takes the median of ordinary prompts from the calibration."
                ),
                *sockets.inputs_of(Settings),
                # Optional, as all below: workflows that were made before they came go on as they were.
                io.Combo.Input(
                    "method",
                    options=[OPTIMISE, *sockets.methods("prompt", "conditioning", "attention")],
                    default=OPTIMISE,
                    optional=True,
                    tooltip="What is changed about the prompt; see the help.",
                ),
                *sockets.inputs_of_methods("prompt", "conditioning", "attention", beside=Settings, optional=True),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="What to sample with instead."),
                io.String.Output(
                    display_name="report", tooltip="The score before and after, and what was done, as JSON."
                ),
                io.Model.Output(
                    tooltip="The model to sample it with: start-token and attenuate-tokens change its attention."
                ),
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
        calibration: Profile | None = None,
        method: str = OPTIMISE,
        **settings: object,
    ) -> io.NodeOutput:
        chosen = (
            Settings if method == OPTIMISE else sockets.methods("prompt", "conditioning", "attention")[method].settings
        )
        changed, guided, document = comfyui.mitigate(
            model,
            positive,
            negative,
            sockets.start_of(model, latent_image, seed, steps, sampler_name, scheduler, denoise),
            seed,
            target,
            method,
            sockets.settings_of(chosen, settings),
            calibration,
            sockets.user_folder(),
        )
        return io.NodeOutput(changed, json.dumps(document, ensure_ascii=False), guided)


NODES = [Explain, MitigateConditioning]
