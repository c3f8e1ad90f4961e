"""The pack's nodes, in the order of the menu."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..sd_dejavu.hosts import comfyui
from . import audit, calibration, conditioning, demo, guidance, monitor, reference, repair, sockets, text, training


class DejaVuExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *monitor.NODES,
            *text.NODES,
            *conditioning.NODES,
            *guidance.NODES,
            *calibration.NODES,
            *reference.NODES,
            *training.NODES,
            *audit.NODES,
            *repair.NODES,
            *demo.NODES,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    comfyui.add_routes(sockets.user_folder())
    comfyui.link_encoders_of_prompts()
    return DejaVuExtension()
