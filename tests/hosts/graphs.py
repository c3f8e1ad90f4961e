"""Graphs in ComfyUI's API format, with nodes under names that say what they do, to be extended by the tests.

Every function returns a new dictionary: {name: {"class_type": ..., "inputs": {...}}}; a link is [name, output].
"""

from __future__ import annotations

from typing import Any

import miniature

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def conditioned_model(
    prompt: str = "a red fox at dawn",
    negative: str = "",
    *,
    checkpoint: str = miniature.SD15,
    unet: str | None = None,
    weight_dtype: str = "default",
    lora: str | None = None,
    lora_strength: float = 1.0,
    size: int = 64,
    batch: int = 1,
) -> Graph:
    """What every run starts from: 'checkpoint', 'positive', 'negative', 'latent', and 'unet' and 'lora' if asked for.

    ``unet`` takes the checkpoint's place as the model. On a CPU the host turns fp16 and fp8 files to fp32 when
    it loads them, unless ``weight_dtype`` is 'fp8_e4m3fn' or the server runs with --fp16-unet.
    """
    graph = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    clip = ["checkpoint", 1]
    if unet is not None:
        graph["unet"] = node("UNETLoader", unet_name=unet, weight_dtype=weight_dtype)
    if lora is not None:
        source = ["unet" if unet is not None else "checkpoint", 0]
        strengths = {"strength_model": lora_strength, "strength_clip": lora_strength}
        graph["lora"] = node("LoraLoader", model=source, clip=clip, lora_name=lora, **strengths)
        clip = ["lora", 1]
    empty = "EmptySD3LatentImage" if checkpoint == miniature.SD3 else "EmptyLatentImage"
    graph["positive"] = node("CLIPTextEncode", clip=clip, text=prompt)
    graph["negative"] = node("CLIPTextEncode", clip=clip, text=negative)
    graph["latent"] = node(empty, width=size, height=size, batch_size=batch)
    return graph


def model_link(graph: Graph) -> list[Any]:
    """The model as it leaves the loaders: of the LoRA, the UNet's file or the checkpoint."""
    return [next(name for name in ("lora", "unet", "checkpoint") if name in graph), 0]


def text_to_image(
    prompt: str = "a red fox at dawn",
    negative: str = "",
    *,
    seed: int = 0,
    steps: int = 4,
    cfg: float = 7.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    denoise: float = 1.0,
    **model: Any,
) -> Graph:
    """KSampler as 'sampler', then 'decode' and 'save'; further options as in :func:`conditioned_model`."""
    graph = conditioned_model(prompt, negative, **model)
    graph["sampler"] = node(
        "KSampler",
        model=model_link(graph),
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name=sampler,
        scheduler=scheduler,
        denoise=denoise,
    )
    return _saved(graph)


def custom_sampling(
    prompt: str = "a red fox at dawn",
    negative: str = "",
    *,
    seed: int = 0,
    steps: int = 4,
    cfg: float = 7.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    **model: Any,
) -> Graph:
    """The same image from single parts: 'noise', 'guider', 'method', 'sigmas', joined in 'sampler'."""
    graph = conditioned_model(prompt, negative, **model)
    source = model_link(graph)
    graph["noise"] = node("RandomNoise", noise_seed=seed)
    graph["guider"] = node("CFGGuider", model=source, positive=["positive", 0], negative=["negative", 0], cfg=cfg)
    graph["method"] = node("KSamplerSelect", sampler_name=sampler)
    graph["sigmas"] = node("BasicScheduler", model=source, scheduler=scheduler, steps=steps, denoise=1.0)
    links = {"noise": "noise", "guider": "guider", "sampler": "method", "sigmas": "sigmas", "latent_image": "latent"}
    graph["sampler"] = node("SamplerCustomAdvanced", **{socket: [name, 0] for socket, name in links.items()})
    return _saved(graph)


def splice(
    graph: Graph,
    consumer: str,
    socket: str,
    name: str,
    new: dict[str, Any],
    *,
    via: str | None = None,
    output: int = 0,
) -> Graph:
    """Put the node ``new`` under ``name`` on the way to ``graph[consumer]``'s input ``socket``; returns ``graph``.

    It takes what arrived there at its own input ``via`` (of the same name if left out), and its ``output`` goes on.
    """
    new["inputs"][via or socket] = graph[consumer]["inputs"][socket]
    graph[consumer]["inputs"][socket] = [name, output]
    graph[name] = new
    return graph


def _saved(graph: Graph) -> Graph:
    graph["decode"] = node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2])
    graph["save"] = node("SaveImage", images=["decode", 0], filename_prefix="image")
    return graph
