"""The bundled model: a flagged image in seconds, without a download."""

from __future__ import annotations

from comfy_api.latest import io

from . import sockets


class DemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DejaVuDemoModel",
            display_name="Load Demo Model (Déjà Vu)",
            category=sockets.CATEGORY,
            **sockets.FOUND_BY,
            description="A small model that really memorises (64 x 64 images). It comes with the pack.",
            inputs=[io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many images the latent holds.")],
            outputs=[
                io.Model.Output(tooltip="The model; images of 64 x 64 suit it."),
                io.Clip.Output(tooltip="Its text encoder."),
                io.Vae.Output(tooltip="Its autoencoder."),
                io.Latent.Output(tooltip="An empty latent of the size it was trained on."),
            ],
        )

    @classmethod
    def execute(cls, batch_size: int) -> io.NodeOutput:
        from ..sd_dejavu.hosts.comfyui.demo import empty_latent, load_demo_model

        model, clip, vae = load_demo_model()
        return io.NodeOutput(model, clip, vae, {"samples": empty_latent(batch_size)})


NODES = [DemoModel]
