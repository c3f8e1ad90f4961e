"""The pack's nodes put into a graph, and what they report."""

from __future__ import annotations

import json
from typing import Any

import graphs
from comfyui_server import ComfyServer
from graphs import Graph, node

# How a test sees the network's own outputs: a wrapper round the diffusion model itself, below every guidance.
RAW = """
import torch
import comfy.patcher_extension

class RawDifference:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "RAW"), "watch", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def watch(self, model):
        seen, model = [], model.clone()

        def wrapper(executor, x, *args, **kwargs):
            out = executor(x, *args, **kwargs)
            options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "cond_or_uncond" in a)
            seen.append((options["cond_or_uncond"], out.detach().float().clone(), options["sigmas"].clone()))
            return out

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "raw", wrapper)
        return (model, seen)

class RawReport:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "tell", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"raw": ("RAW",), "samples": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **kwargs):
        return float("nan")

    def tell(self, raw, samples):
        which, out, sigma = raw[0]
        parts = dict(zip(which, out.chunk(len(which))))
        gap = (parts[0] - parts[1]).flatten(1).norm(dim=1)
        raw.clear()  # the node above is cached and goes on to fill the same list
        return {"ui": {"norms": gap.tolist(), "sigma": [float(sigma[0])]}}

NODE_CLASS_MAPPINGS = {"RawDifference": RawDifference, "RawReport": RawReport}
"""


def watched(graph: Graph, *, words: bool = True, **monitor: Any) -> Graph:
    """Monitor before 'sampler', Verdict behind it; with ``words`` the prompts come from our Text Encode."""
    if words:
        for name in ("positive", "negative"):
            graph[name]["class_type"] = "DejaVuTextEncode"
    settings = {
        "without": "negative prompt",
        "when_flagged": "report",
        "remedy": "optimise",
        "explain": "never",
        "score": "first step",
        "alpha": 0.01,
        **monitor,
    }
    consumer = "guider" if "guider" in graph else "sampler"
    graphs.splice(graph, consumer, "model", "monitor", node("DejaVuMonitor", **settings))
    graphs.splice(graph, "decode", "samples", "verdict", node("DejaVuVerdict", monitor=["monitor", 1]))
    return graph


def demo(prompt: str, negative: str = "", *, batch: int = 1, **sampler: Any) -> Graph:
    """An image of the bundled model."""
    graph = graphs.text_to_image(prompt, negative, **sampler)
    graph["checkpoint"] = node("DejaVuDemoModel", batch_size=batch)
    graph["sampler"]["inputs"]["latent_image"] = ["checkpoint", 3]
    del graph["latent"]
    return graph


def report(comfy: ComfyServer, graph: Graph, **options: Any) -> dict[str, Any]:
    (document,) = comfy.run(graph, **options)["verdict"]["dejavu"]
    json.dumps(document, allow_nan=False)  # what goes into a PNG must be JSON that everybody reads
    return document


def scores(document: dict[str, Any]) -> list[float]:
    return [verdict["score"] for verdict in document["verdicts"]]
