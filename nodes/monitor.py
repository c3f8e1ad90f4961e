"""Watching a sampler, and reading what was found."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..sd_dejavu.calibration.profile import Profile
from ..sd_dejavu.hosts import comfyui
from ..sd_dejavu.hosts.comfyui.api import CLIP, Latent, ModelPatcher
from ..sd_dejavu.run.monitoring import Monitoring
from ..sd_dejavu.run.report import flagged
from . import sockets


class MonitorNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuMonitor",
            display_name="Monitor (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="Watches the guidance of any sampler that uses the model it gives out. Read it with Verdict.",
            inputs=[
                io.Model.Input("model", tooltip="The model to watch, with its LoRAs and other patches."),
                sockets.Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="Scores of ordinary prompts. Left open, one made earlier for this model is found by itself.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For prompts that do not come from Text Encode (Déjà Vu): to measure them against the empty prompt, and to name their words surely.",
                ),
                *sockets.inputs_of(Monitoring),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, watched."),
                sockets.Monitor.Output(display_name="monitor", tooltip="For the Verdict node."),
            ],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # the host would share what it keeps with a like node of another id
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, calibration: Profile | None = None, clip: CLIP | None = None, **settings: object
    ) -> io.NodeOutput:
        if clip is not None:
            comfyui.encode_text(clip, "")  # while nothing is sampled, with its LoRAs: runs measure against it
        shown = comfyui.LiveReport(str(cls.hidden.unique_id))
        monitor = comfyui.Monitor(
            sockets.settings_of(Monitoring, settings), calibration, sockets.user_folder(), clip, shown
        )
        return io.NodeOutput(monitor.attach(model), monitor)


class VerdictNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuVerdict",
            display_name="Verdict (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="Says whether the images of this run are likely memorised, and writes it into saved PNGs.",
            inputs=[
                sockets.Monitor.Input("monitor", tooltip="From the Monitor node."),
                io.Latent.Input("samples", tooltip="The sampler's latent; it is passed through unchanged."),
            ],
            outputs=[
                io.Latent.Output(tooltip="The same latent."),
                io.Boolean.Output(display_name="flagged", tooltip="Whether any image is flagged."),
                io.Float.Output(
                    display_name="score", tooltip="The highest score of the batch; NaN where not measured."
                ),
                io.Float.Output(display_name="p-value", tooltip="The lowest p-value of the batch; NaN without one."),
                io.Image.Output(
                    display_name="overlay", tooltip="The prompt, with each word shaded by how much it counts."
                ),
                io.Mask.Output(display_name="where", tooltip="Where in the image the prompt acts, one mask an image."),
                io.String.Output(display_name="report", tooltip="All of it as JSON."),
            ],
            hidden=[io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            not_idempotent=True,  # as in Monitor
            is_output_node=True,
        )

    @classmethod
    def execute(cls, monitor: comfyui.Monitor, samples: Latent) -> io.NodeOutput:
        from ..sd_dejavu.report.word_image import word_image
        from ..sd_dejavu.report.wording import sentence

        latent = samples["samples"]
        report = monitor.report_of(latent)
        comfyui.wait_until_told()
        verdicts = report.verdicts
        scores = [v.score for v in verdicts if v.score is not None]
        p_values = [v.p_value for v in verdicts if v.p_value is not None]
        document = report.as_json()
        if cls.hidden.extra_pnginfo is not None:
            comfyui.keep_in_image(cls.hidden.extra_pnginfo, str(cls.hidden.unique_id), document)
        scale = report.state.pixels_a_cell
        text = "\n".join(sentence(v) for v in verdicts)
        return io.NodeOutput(
            samples,
            bool(flagged(verdicts)),
            max(scores, default=float("nan")),
            min(p_values, default=float("nan")),
            sockets.image_of(word_image(report.highest, report.state.notes)),
            report.where(latent.shape[-2] * scale, latent.shape[-1] * scale, latent.shape[0]),
            json.dumps(document, ensure_ascii=False),
            ui={"text": [text], "dejavu": [document]},
        )


NODES = [MonitorNode, VerdictNode]
