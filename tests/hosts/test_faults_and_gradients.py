"""What goes wrong in a real ComfyUI costs no image; gradients are right, and nothing is left behind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import graphs
import miniature
import numpy as np
import pytest
from comfyui_server import ComfyServer, make_home
from graphs import node
from PIL import Image
from watched import RAW, demo, report, scores, watched

from sd_dejavu.demo import bundled

NODES = '''
import collections
import dataclasses
import gc
import sys

import comfy.controlnet
import comfy.model_management
import torch


def adapter():
    return next(m for name, m in sys.modules.items() if name.endswith("sd_dejavu.hosts.comfyui"))


class Sabotage:
    """Makes one step of the monitor raise."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "monitor": ("DEJAVU_MONITOR",), "step": ("STRING", {}), "error": ("STRING", {})}}

    def do(self, model, monitor, step, error):
        kinds = {
            "fault": RuntimeError("broken on purpose"),
            "memory": comfy.model_management.OOM_EXCEPTION("no memory, on purpose"),
            "interrupt": comfy.model_management.InterruptProcessingException(),
        }

        def raising(*args, **kwargs):
            raise kinds[error]

        known = monitor.runs_as.words

        def broken(*args):  # in the midst of an optimisation
            found = known(*args)
            return dataclasses.replace(found, reencoding=dataclasses.replace(found.reencoding, encode=raising))

        changed = {"words": broken} if step == "remedy" else {step: raising}
        monitor.runs_as = type("Sabotaged", (monitor.runs_as,), changed)
        return (model,)


class Broken:
    """A model whose predictions are not numbers."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "do", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def do(self, model):
        model = model.clone()
        model.set_model_unet_function_wrapper(lambda f, a: f(a["input"], a["timestep"], **a["c"]) * float("nan"))
        return (model,)


class FiniteDifference:
    """The loss's slope along one direction: by the gradient, and by differences. In the host's inference mode."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",), "positive": ("CONDITIONING",), "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",), "step": ("FLOAT", {}), "checkpointing": ("BOOLEAN", {}),
            }
        }

    def do(self, model, positive, negative, latent_image, step, checkpointing):
        comfyui = adapter()
        latent = latent_image["samples"]
        torch.manual_seed(3)
        noise = torch.randn(latent.shape)
        sigmas = torch.tensor([14.6146, 0.0])
        assert torch.is_inference_mode_enabled()

        def work(dejavu, x, sigma):
            given = comfyui.conditioning_of(positive[0][0], positive[0][1])
            base = comfyui.conditioning_of(negative[0][0], negative[0][1])
            direction = torch.randn(given.rows.shape, generator=torch.Generator().manual_seed(1))

            def loss(rows):
                d = dejavu(x, sigma, given.with_rows(rows)) - without
                return (d / sigma[0]).flatten(1).norm(dim=1).mean()

            with torch.no_grad():
                without = dejavu(x, sigma, base)
            with dejavu.differentiable(checkpointing):
                x, sigma, without = x.clone(), sigma.clone(), without.clone()
                start = given.rows.clone().float()
                rows = start.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(loss(rows), [rows])
                by_gradient = float((gradient * direction).sum())
                with torch.no_grad():
                    high, low = loss(start + step * direction), loss(start - step * direction)
            return by_gradient, float(high - low) / (2 * step)

        found = comfyui.with_model(model, positive, latent, noise, sigmas, work)
        weights = [p.is_inference() for p in model.model.diffusion_model.parameters()]
        return {"ui": {"slopes": list(found), "dtype": [str(model.model.diffusion_model.time_embed[0].weight.dtype)],
                       "inference": [all(weights)]}}


class Control(comfy.controlnet.ControlBase):
    """A control net that adds a constant to what the network's input blocks pass on."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"input": [torch.full((1, 1, 1, 1), 0.1).to(x_noisy)]}

    def copy(self):
        copied = Control()
        self.copy_to(copied)
        return copied

    def get_models(self):
        return []


class EachItsOwn(comfy.controlnet.ControlBase):
    """A control net with a hint for each image of the batch, kept as the host's own keep theirs."""

    def __init__(self, hints):
        super().__init__()
        self.cond_hint_original = hints

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        wanted = x_noisy.shape[0] // batched_number
        if self.cond_hint is None or self.cond_hint.shape[0] != wanted:
            self.cond_hint = (self.cond_hint if self.cond_hint is not None else self.cond_hint_original)[:wanted]
        return {"input": [self.cond_hint.repeat(batched_number, 1, 1, 1).to(x_noisy)]}

    def copy(self):
        copied = EachItsOwn(self.cond_hint_original)
        self.copy_to(copied)
        return copied

    def get_models(self):
        return []


class Apart:
    """Two images with control hints and masks of their own, evaluated together and one by one."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"model": "MODEL", "positive": "CONDITIONING", "latent": "LATENT"}
        return {"required": {name: (kind,) for name, kind in kinds.items()}}

    def do(self, model, positive, latent):
        comfyui = adapter()
        hints = torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1)
        positive = [[rows, {**options, "control": EachItsOwn(hints)}] for rows, options in positive]
        latent = latent["samples"].repeat(2, 1, 1, 1)
        noise = torch.randn(latent[:1].shape, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)

        def work(dejavu, x, sigma):
            given = comfyui.conditioning_of(positive[0][0], positive[0][1])
            both = dejavu(x, sigma, given)
            apart = [dejavu(x[i : i + 1], sigma[i : i + 1], given.of_images(i, i + 1, 2)) for i in (0, 1)]
            again = dejavu(x, sigma, given)
            gap = float((torch.cat(apart) - both).norm() / both.norm())
            return gap, float((both[0] - both[1]).norm() / both.norm()), float((again - both).abs().max())

        return {"ui": {"gaps": list(comfyui.with_model(model, positive, latent, noise, torch.tensor([14.6, 0.0]), work))}}


class OtherPacks:
    """What other packs do to a model and a prompt: attention patch, block patch, guidance, control net."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CONDITIONING"), "do", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",)}}

    def do(self, model, positive):
        model = model.clone()
        model.set_model_attn2_output_patch(lambda out, extra: out * 2)
        model.set_model_input_block_patch(lambda h, options: h * 0.98)
        model.set_model_sampler_cfg_function(lambda a: a["uncond"] + 5 * (a["cond"] - a["uncond"]))
        model.set_model_sampler_post_cfg_function(lambda a: a["denoised"] * 0.99)
        control = Control()
        return (model, [[rows, {**options, "control": control, "control_apply_to_uncond": True}] for rows, options in positive])


class Census:
    """What is alive: the tensors, and the objects of the pack by their kind."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {"max": 10000})}}

    def do(self, number):
        gc.collect()
        kinds = collections.Counter(type(thing) for thing in gc.get_objects())
        tensors = sum(count for kind, count in kinds.items() if issubclass(kind, torch.Tensor))
        ours = {kind.__qualname__: count for kind, count in kinds.items() if ".sd_dejavu." in str(kind.__module__)}
        return {"ui": {"tensors": [tensors], "ours": [ours]}}


NODE_CLASS_MAPPINGS = {"Apart": Apart, "Census": Census, "OtherPacks": OtherPacks, "RawDifference": RawDifference, "RawReport": RawReport, "Sabotage": Sabotage, "Broken": Broken, "FiniteDifference": FiniteDifference}
'''


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "faults.py").write_text(RAW.rsplit("NODE_CLASS_MAPPINGS")[0] + NODES)
    return folder / "faults.py"


@pytest.fixture(scope="module")
def faulty(
    comfyui: Path, comfy_home: Path, nodes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    pack = comfy_home / "custom_nodes" / "sd-dejavu"
    home = make_home(tmp_path_factory.mktemp("comfyui-faults"), pack, [nodes], comfy_home / "models")
    with ComfyServer(comfyui, home) as server:
        yield server


@pytest.fixture(scope="module")
def memorised() -> str:
    return bundled.held_out_memorised(("hard",))[0]


def pixels(server: ComfyServer, outputs: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(outputs["save"]["images"][0]))))


STEPS = ("read", "model", "identity", "words", "unconditional", "remedy")


@pytest.mark.parametrize("step", STEPS)
def test_a_raising_hook_costs_no_image(faulty: ComfyServer, memorised: str, step: str) -> None:
    plain = pixels(faulty, faulty.run(demo(memorised, steps=2)))
    # Where the hook cannot read guidance, the step is measured apart, so a mitigation would go on as it should.
    graph = watched(demo(memorised, steps=2), when_flagged="report" if step == "read" else "mitigate", alpha=0.02)
    sabotage = node("Sabotage", monitor=["monitor", 1], step=step, error="fault")
    outputs = faulty.run(graphs.splice(graph, "sampler", "model", "sabotage", sabotage))
    assert (pixels(faulty, outputs) == plain).all()
    (document,) = outputs["verdict"]["dejavu"]
    assert "broken on purpose" in json.dumps(document["notes"])
    if step in ("model", "identity"):
        assert document["verdicts"][0]["sentence"].startswith("No verdict: ")


@pytest.mark.parametrize("step", STEPS)
def test_the_hosts_interruption_passes(faulty: ComfyServer, memorised: str, step: str) -> None:
    graph = watched(demo(memorised, steps=2, seed=2), when_flagged="mitigate", alpha=0.03)
    sabotage = node("Sabotage", monitor=["monitor", 1], step=step, error="interrupt")
    graphs.splice(graph, "sampler", "model", "sabotage", sabotage)
    entry = faulty.wait(faulty.post(graph), allow_error=True)
    assert "execution_interrupted" in json.dumps(entry["status"])


def test_no_memory_for_gradients_costs_no_image(faulty: ComfyServer, memorised: str) -> None:
    graph = watched(demo(memorised, steps=2, seed=3), when_flagged="mitigate", alpha=0.04)
    sabotage = node("Sabotage", monitor=["monitor", 1], step="remedy", error="memory")
    outputs = faulty.run(graphs.splice(graph, "sampler", "model", "sabotage", sabotage))
    assert outputs["save"]["images"]
    assert any("not enough memory" in note for note in outputs["verdict"]["dejavu"][0]["notes"])


def test_a_model_of_nans_gets_no_verdict(faulty: ComfyServer) -> None:
    graph = watched(graphs.text_to_image(seed=4, steps=2), explain="always")
    outputs = faulty.run(graphs.splice(graph, "monitor", "model", "broken", node("Broken")))
    (verdict,) = outputs["verdict"]["dejavu"][0]["verdicts"]
    assert verdict["flagged"] is None and "not finite" in verdict["sentence"]
    assert outputs["save"]["images"]


def test_a_calibration_for_another_setting_is_refused_with_a_sentence(faulty: ComfyServer) -> None:
    folder = faulty.home / "user" / "dejavu" / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "foreign.json").write_text(bundled.CALIBRATION.read_text(encoding="utf-8"), encoding="utf-8")
    graph = watched(graphs.text_to_image(seed=5, steps=2))
    graph["calibration"] = node("DejaVuLoadCalibration", name="foreign.json")
    graph["monitor"]["inputs"]["calibration"] = ["calibration", 0]
    (verdict,) = report(faulty, graph)["verdicts"]
    assert verdict["flagged"] is None and "another setting" in verdict["sentence"]


# ------------------------------------------------------------------------------------ gradients


def slopes(
    server: ComfyServer, step: float, checkpointing: bool = False, **options: object
) -> tuple[float, float, str]:
    graph = graphs.text_to_image(seed=1, steps=1, **options)  # type: ignore[arg-type]
    inputs = graph["sampler"]["inputs"]
    links = {name: inputs[name] for name in ("model", "positive", "negative", "latent_image")}
    graph["slopes"] = node("FiniteDifference", **links, step=step, checkpointing=checkpointing)
    found = server.run(graph)["slopes"]
    assert found["inference"] == [True]  # the host's own weights are back in their places
    return (*found["slopes"], found["dtype"][0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_finite_differences(faulty: ComfyServer, checkpointing: bool) -> None:
    by_gradient, by_difference, dtype = slopes(faulty, 1e-3, checkpointing)
    assert dtype == "torch.float32"
    assert by_gradient == pytest.approx(by_difference, rel=1e-2, abs=1e-5)


def test_gradients_through_fp8_weights(faulty: ComfyServer) -> None:
    by_gradient, by_difference, dtype = slopes(faulty, 1e-3, unet=miniature.UNET_FP8, weight_dtype="fp8_e4m3fn")
    assert dtype == "torch.float8_e4m3fn"
    assert by_gradient == pytest.approx(by_difference, rel=1e-2, abs=1e-5)


def test_gradients_through_fp16_weights(start_comfy: Callable[..., ComfyServer], nodes: Path) -> None:
    server = start_comfy(custom_nodes=[nodes], options=["--fp16-unet"])
    by_gradient, by_difference, dtype = slopes(server, 1e-2)
    assert dtype == "torch.float16"
    assert by_gradient == pytest.approx(by_difference, rel=5e-2, abs=1e-4)


def test_an_image_evaluated_alone_keeps_its_own_hint(faulty: ComfyServer) -> None:
    graph = graphs.text_to_image(seed=1, steps=1)
    inputs = graph["sampler"]["inputs"]
    graph["apart"] = node("Apart", model=inputs["model"], positive=inputs["positive"], latent=inputs["latent_image"])
    apart, between, afterwards = faulty.run(graph)["apart"]["gaps"]
    assert between > 1e-3  # the same noise and prompt: only the hints tell the two images apart
    assert apart < 1e-4 and afterwards == 0  # a batch of another size rounds otherwise


def test_other_packs_patches_are_measured_as_they_are(faulty: ComfyServer) -> None:
    graph = graphs.text_to_image(seed=12, negative="blurry")
    inputs = graph["sampler"]["inputs"]
    graph["packs"] = node("OtherPacks", model=inputs["model"], positive=inputs["positive"])
    inputs |= {"model": ["packs", 0], "positive": ["packs", 1]}
    plain = pixels(faulty, faulty.run(graph))
    watched(graph, explain="always", alpha=0.05)
    graph["raw"] = node("RawDifference", model=["packs", 0])
    graph["monitor"]["inputs"]["model"] = ["raw", 0]
    graph["told"] = node("RawReport", raw=["raw", 1], samples=["sampler", 0])
    outputs = faulty.run(graph)
    assert (pixels(faulty, outputs) == plain).all()
    document = outputs["verdict"]["dejavu"][0]
    assert scores(document) == pytest.approx(outputs["told"]["norms"], rel=2e-4)
    assert document["verdicts"][0]["words"]
    # They do reach the prediction: without the packs the same noise and prompt score otherwise.
    bare = scores(report(faulty, watched(graphs.text_to_image(seed=12, negative="blurry"))))
    assert bare != pytest.approx(scores(document), rel=3e-4)


def watch_runs(server: ComfyServer, prompt: str, first: int, count: int) -> None:
    """Every run takes gradients, every fifth many of them."""
    for seed in range(first, first + count):
        act = "mitigate" if seed % 5 == 0 else "report"
        graph = watched(demo(prompt, steps=1, seed=seed), when_flagged=act, explain="flagged")
        assert report(server, graph)["flagged"] is True


@pytest.mark.newest
def test_after_its_runs_nothing_of_the_pack_is_left(faulty: ComfyServer, memorised: str) -> None:
    """Counted: every tensor and every object of ours that is alive in the host."""
    plain = pixels(faulty, faulty.run(demo(memorised, steps=2, seed=77)))
    found = []
    for first, count in ((1000, 5), (2000, 10)):
        watch_runs(faulty, memorised, first, count)
        found.append(faulty.run({"census": node("Census", number=first)})["census"])
    assert found[0]["tensors"][0] and found[0]["ours"][0]  # it does see them
    assert found[1] == found[0]
    faulty.free()
    assert (pixels(faulty, faulty.run(demo(memorised, steps=2, seed=77))) == plain).all()
    assert scores(report(faulty, watched(demo(memorised, steps=2, seed=78))))[0] > 0


@pytest.mark.figures
def test_after_two_hundred_runs_memory_has_not_grown(faulty: ComfyServer, memorised: str) -> None:
    """What no count of Python objects shows."""
    watch_runs(faulty, memorised, 1000, 20)
    begun = faulty.rss_mb()
    watch_runs(faulty, memorised, 2000, 200)
    ended = faulty.rss_mb()
    print(f"resident memory after 20 runs {begun:.0f} MB, after 220 runs {ended:.0f} MB")
    assert ended - begun < 60  # one leaked run holds more than 0.3 MB of weights' aliases and traces
