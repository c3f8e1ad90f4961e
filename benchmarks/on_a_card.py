"""What the pack and the command line do on a card: correctness, cost and memory, at full size.

Builds Stable Diffusion 1.5 and XL with random weights (times and memory are real, verdicts mean nothing), runs the
command line on them, and a real ComfyUI found as the tests find it ($DEJAVU_COMFYUI; the newest of several), once with
dynamic VRAM and once without. Needs no network and at most four minutes on a card. Writes three tables:

    A  the pack in ComfyUI: are images the plain ones, are gradients those of finite differences, what is left behind
    B  the wall ratio of a watched run to a plain one, page closed and open: of the whole workflow, and of the sampling
       alone with our hooks' part in it
    C  peak memory allocated by the command line

    python benchmarks/on_a_card.py [--out benchmarks/results/on_a_card] [--parts ABC] [--small]

Tables that are not asked for stay as they are in the file.

``--small`` runs the same on the CPU with miniatures; its figures say nothing about cards, and memory is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hosts"), str(ROOT / "tests" / "core")]

import comfyui_server  # noqa: E402
import graphs  # noqa: E402
import miniature  # noqa: E402
import miniatures  # noqa: E402
from comfyui_server import ComfyServer, ExecutionFailed, PromptRejected, make_home  # noqa: E402
from graphs import Graph, node  # noqa: E402
from watched import watched  # noqa: E402

Row = dict[str, Any]
PROMPT, NEGATIVE = "a watercolour of an old harbour with three red boats at dawn", "blurry"
SD15, SDXL = "sd15", "sdxl"
MEBI = 2**20

# ------------------------------------------------------------------------------------- nodes in the host

HOOK_CLOCK = (ROOT / "tests" / "hosts" / "hook_clock.py").read_text(encoding="utf-8")
NODES = '''
import hashlib
import sys
import time

import comfy.model_management
import nodes
import torch

from comfy_api.latest import io  # a host too old for this pack says so here

ANY = float("nan")


def adapter():
    return next(m for name, m in sys.modules.items() if name.endswith("sd_dejavu.hosts.comfyui"))


def on_card():
    return torch.cuda.is_available() and not comfy.model_management.cpu_mode()


class Reset:
    """Counts memory from here on."""
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "number": ("INT", {"default": 0})}}

    def do(self, model, number):
        if on_card():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return (model,)


class Told:
    """The latent's digest, what was allocated, and what lies about on the model."""
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",), "number": ("INT", {"default": 0})}}

    def do(self, model, samples, number):
        found = samples["samples"].detach().float().cpu().contiguous()
        modules = list(model.model.modules())
        weights = hashlib.sha256()
        for key, value in sorted(model.model.diffusion_model.state_dict().items())[::7]:
            weights.update(key.encode() + value.detach().float().cpu().reshape(-1)[:4096].contiguous().numpy().tobytes())
        return {"ui": {
            "digest": [hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16]],
            "finite": [bool(found.isfinite().all())],
            "peak": [torch.cuda.max_memory_allocated() if on_card() else 0],
            "streamed": [int(model.loaded_size()) if on_card() and dynamic(model) else 0],
            "dynamic": [dynamic(model)],
            "patched": [sum("forward" in vars(m) or hasattr(m, "_prefetch") for m in modules)],
            "weights": [weights.hexdigest()[:16]],
            "fingerprint": [adapter().model.fingerprint(model) if hasattr(adapter(), "model") else ""],
        }}


def dynamic(model):
    return bool(getattr(model, "is_dynamic", lambda: False)())


class Slopes:
    """The slope of the first step's magnitude along its own gradient, by gradient and by finite differences."""
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",),
                             "latent": ("LATENT",), "number": ("INT", {"default": 0})}}

    def do(self, model, positive, negative, latent, number):
        comfyui = adapter()
        noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(3))
        sigmas = torch.tensor([14.6146, 0.0])

        def work(dejavu, x, sigma):
            given = comfyui.conditioning_of(positive[0][0], positive[0][1])
            base = comfyui.conditioning_of(negative[0][0], negative[0][1])

            def loss(rows):
                d = dejavu(x, sigma, given.with_rows(rows)) - without
                return (d / sigma[0]).flatten(1).norm(dim=1).mean()

            with torch.no_grad():
                without = dejavu(x, sigma, base)
            with dejavu.differentiable():
                x, sigma, without = x.clone(), sigma.clone(), without.clone()
                start = given.rows.clone().float().to(x.device)
                rows = start.clone().requires_grad_(True)
                scale = 1024.0
                value = loss(rows)
                (gradient,) = torch.autograd.grad(value * scale, [rows])
                gradient = gradient / scale
                slope = gradient.norm()
                step = 0.02 * value.detach() / slope
                direction = gradient / slope
                with torch.no_grad():
                    high, low = loss(start + step * direction), loss(start - step * direction)
            return float(slope), float((high - low) / (2 * step))

        if on_card():
            torch.cuda.reset_peak_memory_stats()
        found = comfyui.with_model(model, positive, latent["samples"], noise, sigmas, work)
        return {"ui": {"slopes": list(found), "peak": [torch.cuda.max_memory_allocated() if on_card() else 0]}}


class Ballast:
    """Takes all of the card's memory but so much."""
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True
    held = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"left_mib": ("INT", {"default": 0, "max": 10**6}), "number": ("INT", {"default": 0})}}

    def do(self, left_mib, number):
        Ballast.held.clear()
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        free = 0
        if on_card():
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if left_mib:
                Ballast.held.append(torch.empty(free - left_mib * 2**20, dtype=torch.uint8, device="cuda"))
                free = torch.cuda.mem_get_info()[0]
        return {"ui": {"free": [free]}}


class Rounds:
    """Seconds of sampling as KSampler does it, plain and watched, our hooks' part in it, and whether all are equal."""
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"plain": ("MODEL",), "watched": ("MODEL",), "monitor": ("DEJAVU_MONITOR",),
                             "positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "latent": ("LATENT",),
                             "steps": ("INT", {"default": 20}), "rounds": ("INT", {"default": 1}),
                             "number": ("INT", {"default": 0})}}

    def do(self, plain, watched, monitor, positive, negative, latent, steps, rounds, number):
        models = {"plain": plain, "watched": watched}
        seconds, hooks, in_steps, images = {"plain": [], "watched": []}, [], [], {}

        def draw(name, seed):
            began = time.perf_counter()
            (found,) = nodes.common_ksampler(
                models[name], seed, steps, 7.0, "euler", "normal", positive, negative, latent, denoise=1.0
            )
            if on_card():
                torch.cuda.synchronize()
            images.setdefault(seed, []).append(found["samples"])
            return time.perf_counter() - began

        for turn in range(rounds):
            for name in sorted(models, reverse=turn % 2 == 1):
                draw(name, 0)  # the host loads another clone of the model
                for again in range(3):
                    clock = HookClock(wall=True)
                    if name == "watched":
                        clock.watch(monitor)
                    seconds[name].append(draw(name, 1 + again))
                    if name == "watched":
                        clock.leave(monitor)
                        hooks.append(clock.hooks)
                        in_steps += clock.steps
        equal = all(torch.equal(found[0], one) for found in images.values() for one in found)
        return {"ui": {"seconds": [seconds], "hooks": hooks, "in_steps": in_steps, "equal": [equal]}}


NODE_CLASS_MAPPINGS = {
    "CardReset": Reset, "CardTold": Told, "CardSlopes": Slopes, "CardBallast": Ballast, "CardRounds": Rounds,
}
'''


class CardServer(ComfyServer):
    """ComfyUI as a user starts it, on the card where there is one."""

    def __init__(self, *arguments: Any, small: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._small = small

    def _command(self) -> list[str]:
        return [part for part in super()._command() if self._small or part != "--cpu"]


# ------------------------------------------------------------------------------------- models


def full_size(folder: Path, xl: bool, device: str) -> Path:
    """A diffusers folder of Stable Diffusion 1.5 or XL with random weights in fp16, and the bundled tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    with torch.device(device):
        if xl:
            unet = UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=[5, 10, 20],
                cross_attention_dim=2048,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                use_linear_projection=True,
            )
        else:
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        wide = (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=wide,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024 if xl else 512,
            scaling_factor=0.13025 if xl else 0.18215,
        )
        parts: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(_clip_l(CLIPTextConfig))}
        if xl:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_clip_g(CLIPTextConfig))
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
        if name.startswith("text_encoder"):
            miniatures.name_as_published(folder / name / "model.safetensors")
    tokenizer = ROOT / "sd_dejavu" / "demo" / "model" / "tokenizer"
    for name in ("tokenizer", *(["tokenizer_2"] if xl else [])):
        (folder / name).mkdir(parents=True)
        for file in tokenizer.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    index = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **({"tokenizer_2": ["transformers", "CLIPTokenizer"]} if xl else {"safety_checker": [None, None]}),
        **{name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def _clip_l(config: Any) -> Any:
    return config(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, **_TOKENS)


def _clip_g(config: Any) -> Any:
    wide = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "hidden_act": "gelu"}
    return config(num_attention_heads=20, num_hidden_layers=32, **wide, **_TOKENS)


_TOKENS = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}


def lora(unet: dict[str, Tensor], rank: int = 4) -> dict[str, Tensor]:
    """A LoRA in kohya's layout on every attention projection of a UNet in diffusers' names, large enough to be seen."""
    generator, found = torch.Generator().manual_seed(5), {}
    for key, weight in unet.items():
        if ".attn" in key and key.endswith((".to_q.weight", ".to_k.weight", ".to_v.weight")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            out, into = weight.shape
            found[f"{name}.lora_down.weight"] = torch.randn(rank, into, generator=generator).half() / into**0.5
            found[f"{name}.lora_up.weight"] = 0.1 * torch.randn(out, rank, generator=generator).half()
            found[f"{name}.alpha"] = torch.tensor(float(rank))
    return found


def make_models(folder: Path, small: bool, device: str) -> dict[str, Path]:
    """Diffusers folders by name, and below ``folder / 'models'`` the same weights where ComfyUI's loaders look."""
    if small:
        miniature.write_all(folder / "models")
        return {SD15: miniatures.write_sd1(folder / SD15), SDXL: miniatures.write_sdxl(folder / SDXL)}
    places = {
        "unet": "diffusion_models",
        "vae": "vae",
        "text_encoder": "text_encoders",
        "text_encoder_2": "text_encoders",
    }
    for path in (folder / "models" / name for name in (*set(places.values()), "loras")):
        path.mkdir(parents=True)
    made = {SD15: full_size(folder / SD15, False, device), SDXL: full_size(folder / SDXL, True, device)}
    for name, source in made.items():
        for part, place in places.items():
            for file in (source / part).glob("*.safetensors"):
                (folder / "models" / place / f"{name}-{part}.safetensors").symlink_to(file)
    unet = load_file(made[SD15] / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(lora(unet), folder / "models" / "loras" / "lora.safetensors")
    bf16 = {key: value.to(torch.bfloat16) for key, value in unet.items()}
    save_file(bf16, folder / "models" / "diffusion_models" / "bf16.safetensors")
    return made


# ------------------------------------------------------------------------------------- A and B: ComfyUI


class Bench:
    """Graphs of one size on one server."""

    def __init__(self, server: ComfyServer, small: bool) -> None:
        self.server, self.small, self._number = server, small, 0

    def graph(
        self,
        name: str = SD15,
        steps: int = 20,
        seed: int = 1,
        batch: int = 1,
        unet: str = "",
        lora: bool = False,
        weight_dtype: str = "default",
    ) -> Graph:
        """Prompt to image; ``unet`` names other weights of the same network, ``weight_dtype`` what to hold them in."""
        run: Row = {"seed": seed, "batch": batch, "steps": min(steps, 3) if self.small else steps}
        if self.small:
            run |= {"size": 64, "lora": miniature.LORA if lora else None}
            run |= {"unet": miniature.UNET_FP16, "weight_dtype": weight_dtype} if weight_dtype != "default" else {}
        else:
            run |= {"size": 1024 if name == SDXL else 512, "lora": "lora.safetensors" if lora else None}
            run |= {"unet": f"{unet or f'{name}-unet'}.safetensors", "weight_dtype": weight_dtype}
        graph = graphs.text_to_image(PROMPT, NEGATIVE, **run)
        for text in ("positive", "negative"):
            graph[text]["class_type"] = "DejaVuTextEncode"
        if not self.small:  # the parts from files of their own
            del graph["checkpoint"]
            encoder = f"{name}-text_encoder"
            if name == SDXL:
                files = {"clip_name1": f"{encoder}.safetensors", "clip_name2": f"{encoder}_2.safetensors"}
                graph["clip"] = node("DualCLIPLoader", **files, type="sdxl")
            else:
                graph["clip"] = node("CLIPLoader", clip_name=f"{encoder}.safetensors", type="stable_diffusion")
            graph["vae"] = node("VAELoader", vae_name=f"{name}-vae.safetensors")
            own = {("checkpoint", 1): ["clip", 0], ("checkpoint", 2): ["vae", 0]}
            for one in graph.values():
                one["inputs"] = {
                    key: own.get(tuple(value), value) if isinstance(value, list) else value
                    for key, value in one["inputs"].items()
                }
        return graph

    def calibrate(self) -> None:
        """Ordinary prompts at the first step of the graph's run, so that watched runs get a p-value."""
        count = 20 if self.small else 100
        graph = self.graph()
        sampler = graph["sampler"]["inputs"]
        run = {key: sampler[key] for key in ("model", "latent_image", "steps", "sampler_name", "scheduler", "denoise")}
        run |= {"clip": graph["positive"]["inputs"]["clip"], "negative": NEGATIVE, "cfg": 7.0}
        graph = {key: one for key, one in graph.items() if key not in ("sampler", "decode", "save")}
        graph["made"] = node("DejaVuCalibrate", **run, count=count, whole_runs=0)
        graph["shown"] = node("PreviewAny", source=["made", 1])
        self.server.run(graph, timeout=600)

    def told(self, graph: Graph) -> Row:
        """Run it to its latent: what our own node says of it, and what else the nodes showed; faults as a sentence."""
        self._number += 1
        for name in ("decode", "save"):
            graph.pop(name, None)
        source = graphs.model_link(graph)
        graph["reset"] = node("CardReset", model=source, number=self._number)
        first = graph["monitor"] if "monitor" in graph else graph["sampler"]
        first["inputs"]["model"] = ["reset", 0]
        samples = ["verdict", 0] if "verdict" in graph else ["sampler", 0]
        graph["told"] = node("CardTold", model=["reset", 0], samples=samples, number=self._number)
        try:
            outputs = self.server.run(graph, timeout=600)
        except (ExecutionFailed, PromptRejected) as failed:
            return {"fault": str(failed).splitlines()[0]}
        found = {key: value[0] for key, value in outputs["told"].items()}
        if "dejavu" in outputs.get("verdict", {}):
            (found["report"],) = outputs["verdict"]["dejavu"]
        return found

    def watched(self, graph: Graph, **monitor: Any) -> Row:
        graph = watched(graph, words=False, **monitor)
        graph["verdict"]["inputs"]["samples"] = ["sampler", 0]
        return self.told(graph)

    def alone(self, graph: Graph, class_type: str, **inputs: Any) -> Row:
        """One of the nodes before sampling, at the start of the graph's run."""
        sampler = graph["sampler"]["inputs"]
        run = {key: sampler[key] for key in ("model", "positive", "negative", "latent_image", "seed", "steps")}
        run |= {key: sampler[key] for key in ("sampler_name", "scheduler", "denoise")}
        graph["alone"] = node(class_type, **run, **inputs)
        graph["shown"] = node("PreviewAny", source=["alone", 1])
        for name in ("sampler", "decode", "save"):
            del graph[name]
        began = time.perf_counter()
        try:
            outputs = self.server.run(graph, timeout=600)
        except (ExecutionFailed, PromptRejected) as failed:
            return {"fault": str(failed).splitlines()[0]}
        return {"seconds": time.perf_counter() - began, **json.loads(outputs["shown"]["text"][0])}

    def slopes(self, graph: Graph) -> Row:
        self._number += 1
        inputs = graph["sampler"]["inputs"]
        links = {"model": inputs["model"], "positive": inputs["positive"], "negative": inputs["negative"]}
        graph["slopes"] = node("CardSlopes", **links, latent=inputs["latent_image"], number=self._number)
        for name in ("sampler", "decode", "save"):
            del graph[name]
        try:
            found = self.server.run(graph, timeout=600)["slopes"]
        except (ExecutionFailed, PromptRejected) as failed:
            return {"fault": str(failed).splitlines()[0]}
        by_gradient, by_difference = found["slopes"]
        return {"gradient": by_gradient, "difference": by_difference, "ratio": by_gradient / by_difference}

    def ballast(self, left_mib: int) -> float:
        self._number += 1
        shown = self.server.run({"ballast": node("CardBallast", left_mib=left_mib, number=self._number)})
        return float(shown["ballast"]["free"][0])


STEPS = 6  # of the runs of table A
UPDATES = {"iterations": 4, "learning_rate": 0.0, "checkpointing": False}
WEIGHTS: dict[str, Row] = {
    "fp16": {},
    "fp16, LoRA": {"lora": True},
    "bf16": {"unet": "bf16"},
    "fp8_e4m3fn": {"weight_dtype": "fp8_e4m3fn"},
    "fp8_e4m3fn, LoRA": {"weight_dtype": "fp8_e4m3fn", "lora": True},
}


def in_comfyui(bench: Bench, mode: str, names: Sequence[str], report: Callable[[str], None]) -> list[Row]:
    """Table A's rows for one way of starting the host, for the weights of these names."""
    rows: list[Row] = []

    def add(check: str, weights: str, **found: Any) -> None:
        rows.append({"mode": mode, "check": check, "weights": weights, **found})
        report(f"A {mode}: {check}, {weights}: {found}")

    for name in names:
        graph = partial(bench.graph, steps=STEPS, **WEIGHTS[name])
        first, again = bench.told(graph()), bench.told(graph())
        add("plain, the first run and the next: equal", name, **compared(first, again))
        for explain in ("never", "always"):
            seen = bench.watched(graph(), explain=explain)
            add(f"watched, explain {explain}: equal to plain", name, **compared(again, seen), **words_of(seen))
        add("plain afterwards: equal", name, **compared(again, bench.told(graph())))
        add("gradient / finite difference", name, **bench.slopes(graph()))
    bench.calibrate()
    seen = bench.watched(bench.graph(), when_flagged="mitigate", explain="never", alpha=0.999)
    add("Monitor mitigates", "fp16", **mitigation_of(seen))
    explained = bench.alone(bench.graph(), "DejaVuExplain")
    add("Explain", "fp16", seconds=explained.get("seconds"), **words_of({"report": explained}, explained))
    mitigated = bench.alone(bench.graph(), "DejaVuMitigate", target=0.01, **UPDATES)
    kept = ("score_before", "score_after", "seconds", "fault")
    add("Mitigate Conditioning, 4 updates", "fp16", **{key: mitigated[key] for key in kept if key in mitigated})
    for name in (SD15, SDXL):
        for batch in (1, 4):
            seen = bench.watched(bench.graph(name, steps=2, batch=batch), explain="always")
            add(f"explained, {batch} x {name}: peak memory", "fp16", **memory_of(seen), **words_of(seen))
    return rows


def on_a_small_card(bench: Bench, left_mib: int, report: Callable[[str], None]) -> list[Row]:
    """The same where the network does not fit what is left of the card, so that weights are streamed in and out."""
    rows: list[Row] = []
    free = bench.ballast(left_mib) / MEBI
    for name in ("fp16", "fp16, LoRA"):
        graph = partial(bench.graph, steps=STEPS, **WEIGHTS[name])
        first, again = bench.told(graph()), bench.told(graph())
        checks = {"plain, the first run and the next: equal": compared(first, again)}
        seen = bench.watched(graph(), explain="always")
        checks["watched, explain always: equal to plain"] = {**compared(again, seen), **words_of(seen)}
        checks["plain afterwards: equal"] = compared(again, bench.told(graph()))
        checks["gradient / finite difference"] = bench.slopes(graph())
        rows += [{"mode": f"{free:.0f} MiB free", "check": key, "weights": name, **row} for key, row in checks.items()]
    for row in rows:
        report(f"A {row}")
    bench.ballast(0)
    return rows


def compared(expected: Row, found: Row) -> Row:
    for one in (expected, found):
        if "fault" in one:
            return {"equal": None, "fault": one["fault"]}
    same = expected["digest"] == found["digest"]
    left = {"patched": found["patched"], "weights_kept": expected["weights"] == found["weights"]}
    return {"equal": same, "finite": found["finite"], **left, "fingerprint": found["fingerprint"], **memory_of(found)}


def memory_of(found: Row) -> Row:
    if not found.get("peak"):
        return {}
    return {"peak_mib": round(found["peak"] / MEBI), "streamed_mib": round(found["streamed"] / MEBI)}


def mitigation_of(found: Row) -> Row:
    if "fault" in found:
        return {"fault": found["fault"]}
    done = found["report"]["mitigation"] or {}
    notes = found["report"]["notes"]
    return {key: done.get(key) for key in ("score_before", "score_after")} | ({"notes": notes} if notes else {})


def words_of(found: Row, explained: Row | None = None) -> Row:
    if "fault" in found or (explained or {}).get("fault"):
        return {"words": None, "fault": found.get("fault") or (explained or {})["fault"]}
    document = found["report"]
    verdict = document["verdicts"][0] if "verdicts" in document else document
    shown = verdict.get("words") or []
    notes = document.get("notes") or []
    return {"words": len(shown), "view": verdict.get("view"), **({"notes": notes} if notes else {})}


def cost(bench: Bench, rounds: int, open_page: bool, report: Callable[[str], None]) -> Row:
    """Table B. A round draws plain and watched images, in an order that changes from round to round.

    The first run after a change is not counted: the host loads another clone of the model for it, which costs the same
    either way, and nothing where all runs are watched. A machine shared with others only ever adds to a run's time, so
    the ratio of the fastest runs and that of the processor time of the host's process stand beside the median. Sampling
    alone is timed in the host. It knows nothing of HTTP, of decoding and of writing the PNG, so what we add weighs more
    in it; and the part of our hooks in it does not depend on what else the machine does.
    """
    server = bench.server

    def with_monitor(graph: Graph) -> Graph:
        return watched(graph, words=False, explain="flagged", alpha=0.005)  # below any p-value of so few nulls

    def run(seed: int, monitored: bool, client: str | None) -> tuple[float, float, float]:
        graph = bench.graph(seed=seed)
        if monitored:
            with_monitor(graph)
        began, computed = time.perf_counter(), cpu_seconds(server.pid)
        entry = server.wait(server.post(graph, client), timeout=600)
        took, computed = time.perf_counter() - began, cpu_seconds(server.pid) - computed
        stamps = {kind: data["timestamp"] for kind, data in entry["status"]["messages"] if "timestamp" in data}
        return took, (stamps["execution_success"] - stamps["execution_start"]) / 1000, computed

    def sampling(client: str | None) -> Row:
        graph = with_monitor(bench.graph())
        sampler = graph["sampler"]["inputs"]
        links = {name: sampler[name] for name in ("positive", "negative")} | {"latent": sampler["latent_image"]}
        links |= {"plain": graph["monitor"]["inputs"]["model"], "watched": sampler["model"], "monitor": ["monitor", 1]}
        count = {"steps": sampler["steps"], "rounds": rounds, "number": int(open_page)}
        graph = {name: one for name, one in graph.items() if name not in ("sampler", "decode", "save", "verdict")}
        graph["rounds"] = node("CardRounds", **links, **count)
        return dict(server.run(graph, timeout=600, client_id=client)["rounds"])

    def measured(client: str | None) -> Row:
        taken: dict[str, list[tuple[float, float, float]]] = {"plain": [], "watched": []}
        for turn in range(-1, rounds):
            for name in sorted(taken, reverse=turn % 2 == 1):
                run(1000 + turn, name == "watched", client)
                found = run(turn + 2, name == "watched", client)
                if turn >= 0:  # the first is to warm up
                    taken[name].append(found)
        walls, own, computed = (
            {name: [one[kind] for one in runs] for name, runs in taken.items()} for kind in range(3)
        )
        alone = sampling(client)
        seconds = alone["seconds"][0]
        return {
            "page": "open" if client else "closed",
            "wall": ratios(walls),
            "host": ratios(own),
            "processor": ratios(computed),
            "sampling": ratios(seconds),
            "hooks": {
                "ratio": 1 / (1 - float(np.median(np.divide(alone["hooks"], seconds["watched"])))),
                "ms_a_run": 1000 * float(np.median(alone["hooks"])),
                "ms_a_step": 1000 * float(np.median(alone["in_steps"])),
            },
            "equal": alone["equal"][0],
            "seconds": {"wall": walls, "sampling": seconds},
        }

    if open_page:
        with contextlib.closing(server.events("on-a-card")) as page:
            found = measured(page.client_id)
    else:
        found = measured(None)
    report(f"B { ({name: one for name, one in found.items() if name != 'seconds'}) }")
    return found


def ratios(seconds: dict[str, list[float]]) -> Row:
    """Watched to plain: the median and the quartiles of pairs, and the fastest to the fastest."""
    plain, watched = (np.maximum(seconds[name], 1e-3) for name in ("plain", "watched"))
    ratio = watched / plain
    return {
        "pairs": len(ratio),
        "ratio": float(np.median(ratio)),
        "quartiles": [float(q) for q in np.quantile(ratio, [0.25, 0.75])],
        "fastest": float(watched.min() / plain.min()),
        "plain": float(np.median(plain)),
    }


def cpu_seconds(pid: int) -> float:
    """Processor time of a process with all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------- C: the command line


def commands(models: dict[str, Path], folder: Path, small: bool) -> Iterator[tuple[str, str, list[str]]]:
    """(name, model, arguments) of each command that is measured."""
    prompts = [f"{PROMPT}, number {number}" for number in range(8)]
    for name, model in models.items():
        common = ["--model", str(model), "--json", *([] if small else ["--device", "cuda", "--dtype", "float16"])]
        one, four = ["--images", "1"], ["--images", "4"]
        for size in (32, 8, 1):
            yield (
                f"check, 8 prompts x 4 images, --batch-size {size}",
                name,
                ["check", *prompts, *common, *four, "--batch-size", str(size)],
            )
        yield "explain, 1 image", name, ["explain", PROMPT, *common, *one]
        yield "explain, 4 images", name, ["explain", PROMPT, *common, *four]
        target = ["--target", "0.01", "--iterations", "2"]
        yield "mitigate, 1 image", name, ["mitigate", PROMPT, *common, *one, *target]
        yield "mitigate, 4 images", name, ["mitigate", PROMPT, *common, *four, *target]
        noise = ["--method", "per-sample-noise", "--target", "0.01", "--noise-iterations", "2"]
        yield "mitigate by per-sample-noise, 4 images", name, ["mitigate", PROMPT, *common, *four, *noise]


def plain_sampling(model: Path, small: bool) -> None:
    """One image as diffusers draws it, two steps and the decoder: what `check` is compared with."""
    from sd_dejavu.hosts.diffusers.load import load

    loaded = load(str(model), *([] if small else ["cuda", "float16"]))
    with torch.no_grad():
        pipeline = loaded.pipeline
        pipeline.set_progress_bar_config(disable=True)
        pipeline("a boat", num_inference_steps=2, output_type="latent")


def command_line(models: dict[str, Path], folder: Path, small: bool, report: Callable[[str], None]) -> list[Row]:
    """Table C: one row a command and model."""
    from sd_dejavu.cli.main import main

    os.environ["SD_DEJAVU_HOME"] = str(folder / "home")
    rows: list[Row] = []

    def measured(name: str, model: str, work: Callable[[], Any]) -> None:
        if not small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            status = work()
        row: Row = {"command": name, "model": model, "status": status or 0, "seconds": time.perf_counter() - began}
        if not small:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if status:
            row["told"] = told.getvalue()[-400:]
        rows.append(row)
        report(f"C {row}")

    for name, model in models.items():
        measured("plain sampling, 1 image", name, lambda model=model: plain_sampling(model, small))
    for name, model, arguments in commands(models, folder, small):
        measured(name, model, lambda arguments=arguments: main(arguments))
    return rows


# ------------------------------------------------------------------------------------- all of it


TIMES = {
    "wall": "the whole workflow",
    "host": "the same, by the host's clock",
    "processor": "the same, of the processors",
    "sampling": "sampling alone",
}


def markdown(result: Row) -> str:
    """The three tables as a page."""
    lines = [
        "# On a card",
        "",
        f"{result['card']}, PyTorch {result['torch']}, ComfyUI {result['comfyui']}, {result['date']}. Random weights: "
        "times and memory are real, verdicts mean nothing. Made by `python benchmarks/on_a_card.py`.",
        "",
        "## A. The pack in ComfyUI",
        "",
        "| start | check | weights | found |",
        "| --- | --- | --- | --- |",
    ]
    hidden = ("mode", "check", "weights", "fingerprint")
    for row in result["A"]:
        found = ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in hidden)
        lines.append(f"| {row['mode']} | {row['check']} | {row['weights']} | {found} |")
    lines += ["", "## B. Watched against plain, 20 steps, 512 x 512", ""]
    lines += ["| page | time of | pairs | watched to plain (quartiles) | fastest to fastest | plain |"]
    lines += ["| --- |" + " --- |" * 5]
    for row in result["B"]:
        for kind, name in TIMES.items():
            found = row[kind]
            low, high = found["quartiles"]
            lines.append(
                f"| {row['page']} | {name} | {found['pairs']} | {found['ratio']:.3f} ({low:.3f} to {high:.3f}) | "
                f"{found['fastest']:.3f} | {found['plain']:.3f} s |"
            )
    for row in result["B"]:
        hooks = row["hooks"]
        lines += [
            "",
            f"Page {row['page']}: our hooks take {hooks['ms_a_step']:.2f} ms a step and {hooks['ms_a_run']:.1f} ms a run "
            f"of the sampling thread, {hooks['ratio']:.4f} times the rest.",
        ]
    lines += ["", "## C. Peak memory allocated by the command line, fp16", ""]
    lines += ["| command | " + " | ".join(_models(result)) + " |", "| --- |" + " --- |" * len(_models(result))]
    for command in dict.fromkeys(row["command"] for row in result["C"]):
        cells = []
        for model in _models(result):
            (row,) = (r for r in result["C"] if r["command"] == command and r["model"] == model)
            peak = f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "not measured"
            cells.append(peak if not row["status"] else f"failed ({peak})")
        lines.append(f"| {command} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def kept(out: Path, parts: str) -> Row:
    """The tables of an earlier run that this one does not make."""
    file = out.with_suffix(".json")
    known: Row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {part: known[part] for part in "ABC" if part in known and part not in parts}


def write(result: Row, out: Path) -> None:
    """JSON and Markdown beside each other."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def _models(result: Row) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in result["C"]))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "on_a_card")
    parser.add_argument("--small", action="store_true", help="miniatures on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in table B (default: 3)")
    parser.add_argument("--parts", default="ABC", help="which tables (default: ABC)")
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)  # C runs in a process of its own
    arguments = parser.parse_args()
    small = arguments.small
    if not small and not torch.cuda.is_available():
        raise SystemExit("no card is seen by this PyTorch: use --small on the CPU")
    began = time.perf_counter()

    def report(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    if arguments.models is not None:
        models = {name: arguments.models / name for name in (SD15, SDXL)}
        print(json.dumps(command_line(models, arguments.models, small, report)))
        return
    install = comfyui_server.find_install()
    if install is None:
        raise SystemExit("ComfyUI was not found: install it where $DEJAVU_COMFYUI says")
    result: Row = {
        "card": "CPU (miniatures)" if small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "comfyui": comfyui_server.version(install),
        "date": datetime.date.today().isoformat(),
    }
    result |= {part: [] for part in "ABC"} | kept(arguments.out, arguments.parts)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        for name in ("nodes", "models"):
            (folder / name).mkdir()
        (folder / "nodes" / "on_a_card_nodes.py").write_text(HOOK_CLOCK + NODES, encoding="utf-8")
        making = Thread(target=make_models, args=(folder, small, "cpu" if small else "cuda"))
        making.start()

        def started(number: int, options: list[str]) -> Bench:
            home = make_home(folder / f"home{number}", ROOT, [folder / "nodes" / "on_a_card_nodes.py"])
            (home / "models").rmdir()
            (home / "models").symlink_to(folder / "models", target_is_directory=True)
            server = stack.enter_context(CardServer(install, home, options, small=small))
            making.join()
            report(f"ComfyUI is ready with its models, {' '.join(options) or 'default'}")
            return Bench(server, small)

        bench = started(0, []) if set(arguments.parts) & set("AB") else None
        if bench is not None and "B" in arguments.parts:  # alone on the machine
            bench.calibrate()
            result["B"] = [cost(bench, arguments.rounds, page, report) for page in (False, True)]
        making.join()
        other = None
        if "C" in arguments.parts:
            command = [sys.executable, __file__, "--models", str(folder), *(["--small"] if small else [])]
            other = subprocess.Popen(command, stdout=subprocess.PIPE)
        if bench is not None and "A" in arguments.parts:
            rows: dict[str, list[Row]] = {}

            def static() -> None:
                known = started(1, [] if small else ["--disable-dynamic-vram"])
                rows["static"] = in_comfyui(
                    known, "--disable-dynamic-vram", ["fp8_e4m3fn"] if small else ["fp16, LoRA", "fp8_e4m3fn"], report
                )

            beside = Thread(target=static)
            beside.start()
            rows["default"] = in_comfyui(bench, "default", ["fp16, LoRA"] if small else list(WEIGHTS), report)
            beside.join()
            result["A"] = rows["default"] + rows.get("static", [])
        if other is not None:
            told, _ = other.communicate()
            result["C"] = json.loads(told)
        write(result, arguments.out)
        if bench is not None and "A" in arguments.parts and not small:  # now that nothing else needs the card
            result["A"] += on_a_small_card(bench, 1300, report)
    write(result, arguments.out)
    report(f"written to {arguments.out}.json and .md")


if __name__ == "__main__":
    main()
