"""Reference sets, and the mitigations that a sampler carries out, in a real ComfyUI through its HTTP API."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import torch
from comfyui_server import ComfyServer, ExecutionFailed, PromptRejected, make_home
from graphs import Graph, node
from PIL import Image
from watched import demo, report, scores, watched

from sd_dejavu.core.settings import options_of
from sd_dejavu.demo import bundled
from sd_dejavu.mitigations import available
from sd_dejavu.mitigations.anti_memorization_guidance import Settings
from sd_dejavu.reference.features import FeatureSettings, load
from sd_dejavu.reference.reference_set import ReferenceSet

BUNDLED = "the bundled model's training pictures"
COPY = 0.8  # of the grey metric
DEFAULTS = {known.name: known.default for known in options_of(Settings)}
NOISE = {
    known.name: known.default
    for method in available().values()
    if method.touches == "noise"
    for known in options_of(method.settings)
}

NODES = '''
import dataclasses
import json
import pathlib
import sys
import tempfile

import comfy.clip_vision
import comfy.model_management
import torch

TINY = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_channels": 3, "image_size": 32, "patch_size": 8, "projection_dim": 16,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def module(name):
    return next(m for n, m in sys.modules.items() if n.endswith("sd_dejavu." + name))


class TinyVision:
    """A CLIP Vision model as the host's loader makes them, but small."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        path = pathlib.Path(tempfile.mkdtemp()) / "tiny.json"
        path.write_text(json.dumps(TINY))
        made = comfy.clip_vision.ClipVisionModel(str(path))
        torch.manual_seed(seed)
        weights = {name: torch.randn(value.shape) * 0.2 for name, value in made.get_sd().items() if value.is_floating_point()}
        made.load_sd(weights)
        return (made,)


class Sabotage:
    """References whose features raise."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("DEJAVU_REFERENCES",), "do", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"references": ("DEJAVU_REFERENCES",), "error": ("STRING", {})}}

    def do(self, references, error):
        kinds = {
            "fault": RuntimeError("broken on purpose"),
            "memory": comfy.model_management.OOM_EXCEPTION("no memory, on purpose"),
            "interrupt": comfy.model_management.InterruptProcessingException(),
        }

        class Raising:
            name, metric = references.features.name, references.features.metric

            def __call__(self, images):
                raise kinds[error]

        return (dataclasses.replace(references, features=Raising()),)


class Gradient:
    """The gradient of the similarity through decoder and features, in the host's inference mode, and differences."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "do", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "vae": ("VAE",), "references": ("DEJAVU_REFERENCES",)}}

    def do(self, model, vae, references):
        amg, host = module("mitigations.anti_memorization_guidance"), module("hosts.comfyui.guidance")
        assert torch.is_inference_mode_enabled()
        patchers = (vae.patcher, *references.networks.patchers)
        comfy.model_management.load_models_gpu(list(patchers))
        x = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1)) * 0.5
        aside = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

        def images(latents):
            return host._images(vae, model.model, latents)

        def similarity(latents):
            rows, known = references.features(images(latents)), references.references
            found = known.similarity(rows, torch.tensor([3]))
            if known.metric == "normalised L2":  # the gradient takes the neighbourhood as a constant
                found = found * known.denominator(rows) / known.denominator(references.features(images(x)))
            return float(found)

        before = [value for p in patchers for value in p.model.state_dict().values()]
        with host.differentiable([p.model for p in patchers]):
            slope = amg.similarity_gradient(references, images, x, torch.tensor([3]))
        after = [value for p in patchers for value in p.model.state_dict().values()]
        same = all(a.data_ptr() == b.data_ptr() and a.is_inference() == b.is_inference() for a, b in zip(before, after))
        way = slope / slope.norm() + aside / aside.norm()
        h = 5e-3
        differences = (similarity(x + h * way) - similarity(x - h * way)) / (2 * h)
        return {"ui": {"found": [float((slope * way).sum())], "wanted": [differences], "same": [same]}}


NODE_CLASS_MAPPINGS = {"TinyVision": TinyVision, "Sabotage": Sabotage, "Gradient": Gradient}
'''


@pytest.fixture(scope="module")
def server(comfyui: Path, comfy_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the test's own nodes beside the pack, and folders of its own."""
    folder = tmp_path_factory.mktemp("reference-nodes")
    (folder / "extra.py").write_text(NODES)
    home = make_home(
        tmp_path_factory.mktemp("comfyui-reference"), comfy_home / "custom_nodes" / "sd-dejavu", [folder / "extra.py"]
    )
    with ComfyServer(comfyui, home) as running:
        yield running


@pytest.fixture(scope="module")
def memorised() -> str:
    return bundled.held_out_memorised(("hard",))[0]


@pytest.fixture(scope="module")
def training_folder(server: ComfyServer) -> str:
    """Six training images with captions, one of them twice, and a file that is no image."""
    folder = server.home / "input" / "training" / "images"
    folder.mkdir(parents=True)
    for number in range(6):
        _image(number).save(folder / f"pair-{number}.png")
        (folder / f"pair-{number}.txt").write_text(bundled.pairs()[number].caption, encoding="utf-8")
    _image(2).save(folder / "the-same.png")
    (folder / "broken.png").write_bytes(b"no image")
    return "training/images"


def _image(number: int) -> Image.Image:
    pixels = (bundled.training_images()[number] * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def _built(folder: str, name: str, **inputs: Any) -> Graph:
    settings = {"features": "grey", "restart": False, **inputs}
    built = node("DejaVuBuildReferenceSet", folder=folder, name=name, **settings)
    return {"references": built, "shown": node("PreviewAny", source=["references", 1])}


def _loaded(name: str, **inputs: Any) -> Graph:
    return {"references": node("DejaVuLoadReferenceSet", name=name, **inputs)}


def _nearest(graph: Graph, image: list[Any], count: int = 3) -> Graph:
    graph["nearest"] = node("DejaVuNearestReference", image=image, references=["references", 0], count=count)
    for name, output in {"similarity": 1, "copy": 2, "report": 3}.items():
        graph[name] = node("PreviewAny", source=["nearest", output])
    graph["found"] = node("SaveImage", images=["nearest", 0], filename_prefix="nearest")
    return graph


def _drawn(prompt: str, *, seed: int = 0, batch: int = 1, steps: int = 10, **more: Any) -> Graph:
    """An image of the bundled model, and its nearest training images."""
    graph = demo(prompt, seed=seed, batch=batch, steps=steps, cfg=7.5, **more)
    return _nearest({**graph, **_loaded(BUNDLED)}, ["decode", 0])


def _guarded(graph: Graph, clip: bool = True, **settings: Any) -> Graph:
    inputs = {"vae": ["checkpoint", 2], "references": ["references", 0], **DEFAULTS, **settings}
    amg = node("DejaVuAMG", **inputs, **({"clip": ["checkpoint", 1]} if clip else {}))
    return graphs.splice(graph, "sampler", "model", "amg", amg)


def _answers(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    return json.loads(outputs["report"]["text"][0])


def _similarities(outputs: dict[str, Any]) -> list[float]:
    return [answer["neighbours"][0]["similarity"] for answer in _answers(outputs)]


def _pixels(server: ComfyServer, outputs: dict[str, Any]) -> bytes:
    images = outputs["save"]["images"]
    return b"".join(Image.open(io.BytesIO(server.view(image))).tobytes() for image in images)


def _grey_correlation(one: Image.Image, other: Image.Image) -> float:
    """By numpy: Pearson's correlation of luma, means of 2 x 2 pixels of 64 x 64."""
    grey = [np.asarray(image, float) @ [0.299, 0.587, 0.114] for image in (one, other)]
    small = [g.reshape(32, 2, 32, 2).mean((1, 3)).ravel() for g in grey]
    return float(np.corrcoef(*small)[0, 1])


# ---------------------------------------------------------------------------------- reference sets


def test_a_set_is_built_loaded_and_finds_the_right_image(server: ComfyServer, training_folder: str) -> None:
    text = server.run(_built(training_folder, "six images"))["references"]["text"][0]
    assert "6 different images, 6 with a caption, 7 shown in an epoch" in text
    assert "Left out: 1 image that could not be read" in text and "broken.png: not an image" in text
    darker = Image.fromarray((np.asarray(_image(2), float) * 0.8).astype(np.uint8))
    darker.save(server.home / "input" / "darker.png")
    graph = _loaded("six images") | {"image": node("LoadImage", image="darker.png")}
    outputs = server.run(_nearest(graph, ["image", 0]))
    (answer,) = _answers(outputs)
    order = sorted(range(6), key=lambda n: -_grey_correlation(darker, _image(n)))
    assert [n["name"] for n in answer["neighbours"]] == [f"pair-{n}.png" for n in order[:3]] and order[0] == 2
    assert [n["similarity"] for n in answer["neighbours"]] == pytest.approx(
        [_grey_correlation(darker, _image(n)) for n in order[:3]], abs=1e-4
    )
    assert answer["neighbours"][0]["caption"] == bundled.pairs()[2].caption
    assert answer["neighbours"][0]["duplicates"] == 2 and answer["copy"] is True and answer["threshold"] == COPY
    assert outputs["copy"]["text"] == ["True"]
    assert float(outputs["similarity"]["text"][0]) == answer["neighbours"][0]["similarity"]
    image = Image.open(io.BytesIO(server.view(outputs["found"]["images"][0]))).convert("RGB")
    # Side by side: the query first, then the training image that is nearest.
    tiles = [image.crop((left, 16, left + 256, 272)).resize((64, 64), Image.Resampling.BOX) for left in (16, 288)]
    assert _grey_correlation(tiles[0], darker) > 0.999
    assert _grey_correlation(tiles[1], _image(order[0])) > 0.98  # a JPEG


def test_a_copied_part_is_found_framed_and_told(server: ComfyServer, training_folder: str) -> None:
    """A training image in a mirror, whose whole is like none; a set of six images cannot tell."""
    mirrored = _image(20).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(server.home / "input" / "mirrored.png")
    shown = {}
    for parts in (False, True):
        graph = _nearest(_loaded(BUNDLED) | {"image": node("LoadImage", image="mirrored.png")}, ["image", 0])
        graph["nearest"]["inputs"]["parts"] = parts
        outputs = server.run(graph)
        (answer,) = _answers(outputs)
        shown[parts] = Image.open(io.BytesIO(server.view(outputs["found"]["images"][0]))).size
        assert answer["copy"] is False and outputs["copy"]["text"] == ["False"] and ("part" in answer) is parts
    part = answer["part"]
    assert (part["copy"], part["name"], part["mirrored"]) == (True, "pair-021", True)
    left, top, right, bottom = part["box"]
    assert part["of_box"] == [1 - right, top, 1 - left, bottom]
    assert shown[True][0] == shown[False][0] + 272  # one more tile
    assert "A copy of a part: " in outputs["nearest"]["text"][0]
    server.run(_built(training_folder, "six for parts"))
    graph = _nearest(_loaded("six for parts") | {"image": node("LoadImage", image="mirrored.png")}, ["image", 0])
    graph["nearest"]["inputs"]["parts"] = True
    with pytest.raises(ExecutionFailed, match="a set of 6 images is too small to compare parts with"):
        server.run(graph)


def test_a_folder_is_read_as_its_trainer_reads_it(server: ComfyServer, tmp_path: Path) -> None:
    top = server.home / "input" / "kohya"
    (top / "4_red fox").mkdir(parents=True)
    _image(0).save(top / "4_red fox" / "a.png")
    _image(1).save(top / "cover.png")
    text = server.run(_built("kohya", "as kohya"))["references"]["text"][0]
    assert "read as kohya's trainer reads it (guessed from its numbered folders)" in text
    assert "1 different images, 1 with a caption, 4 shown in an epoch" in text
    assert "Left out: 1 image beside the numbered folders:\n  cover.png: kohya's trainer" in text
    made = ReferenceSet.load(server.home / "user" / "dejavu" / "references" / "as kohya")
    assert made.captions == ("red fox",)
    text = server.run(_built("kohya", "plainly", trainer="plain"))["references"]["text"][0]
    assert "2 different images, 0 with a caption, 2 shown in an epoch" in text
    subset = "[[datasets.subsets]]\nimage_dir = '/train/4_red fox'\nclass_tokens = 'a {blue|red} fox'\n"
    (top / "dataset.toml").write_text(f"[[datasets]]\nenable_wildcard = true\n{subset}", encoding="utf-8")
    text = server.run(_built("kohya", "configured", trainer_config="kohya/dataset.toml"))["references"]["text"][0]
    assert "1 different images, 1 with a caption, 1 shown in an epoch" in text and "as dataset.toml says" in text
    (tmp_path / "secret.toml").write_text("x")
    for name in ("gone.toml", str(tmp_path / "secret.toml"), "../input/../user"):
        with pytest.raises(PromptRejected, match="no configuration"):
            server.post(_built("kohya", "outside", trainer_config=name))


def test_another_image_is_no_copy(server: ComfyServer, training_folder: str) -> None:
    server.run(_built(training_folder, "six images"))
    _image(20).save(server.home / "input" / "other.png")
    wanted = max(_grey_correlation(_image(20), _image(n)) for n in range(6))
    graph = _loaded("six images") | {"image": node("LoadImage", image="other.png")}
    outputs = server.run(_nearest(graph, ["image", 0]))
    assert wanted < COPY and outputs["copy"]["text"] == ["False"]
    assert float(outputs["similarity"]["text"][0]) == pytest.approx(wanted, abs=1e-4)


def test_sets_are_those_of_the_command_line(server: ComfyServer, training_folder: str) -> None:
    for features in ("pixels", "latents"):
        server.run(_built(training_folder, features, features=features))
        file = server.home / "user" / "dejavu" / "references" / f"{features}.safetensors"
        known = load(FeatureSettings(features))
        made = ReferenceSet.load(file, known)
        with torch.no_grad():
            wanted = known(torch.stack([bundled.training_images()[n] for n in range(6)]))
        torch.testing.assert_close(made.embeddings, wanted, atol=1e-4, rtol=0)
        outputs = server.run(
            _nearest(_loaded(features) | {"image": node("LoadImage", image=_kept(server))}, ["image", 0])
        )
        (answer,) = _answers(outputs)
        assert answer["neighbours"][0]["name"] == "pair-1.png" and answer["copy"] is None
        assert "too small" in answer["why"] and outputs["copy"]["text"] == ["False"]


def _kept(server: ComfyServer) -> str:
    _image(1).save(server.home / "input" / "one.png")
    return "one.png"


def test_nothing_outside_of_its_folders_can_be_named(server: ComfyServer, training_folder: str) -> None:
    (server.home / "secret").mkdir(exist_ok=True)
    for folder in ("../secret", str(server.home / "secret"), ".", ""):
        with pytest.raises(PromptRejected, match="no folder"):
            server.post(_built(folder, "outside"))
    for name in ("../outside", "a/b", "", ".hidden", "a\\b"):
        with pytest.raises(PromptRejected, match="cannot be kept as"):
            server.post(_built(training_folder, name))
    graph = _loaded("../references/six images") | {"image": node("LoadImage", image=_kept(server))}
    with pytest.raises(PromptRejected, match="no reference set"):
        server.post(_nearest(graph, ["image", 0]))


def test_a_build_that_was_interrupted_goes_on(server: ComfyServer) -> None:
    folder = server.home / "input" / "many"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(300):
        Image.fromarray(generator.integers(0, 256, (400, 400, 3), np.uint8)).save(folder / f"{number:03d}.bmp")
    work = server.home / "user" / "dejavu" / "references" / "many.refset-unfinished"
    with server.events("builder") as events:
        number = server.post(_built("many", "many", features="pixels"), client_id="builder")
        events.wait_for("progress", where=lambda data: data["value"] >= 128)
        server.interrupt()
        entry = server.wait(number, allow_error=True)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    pieces = [file.name for file in work.glob("*.safetensors")]
    assert "00000000.safetensors" in pieces and len(pieces) < 3
    before = (work / "00000000.safetensors").stat().st_mtime_ns
    server.run(_built("many", "many", features="pixels"))
    assert not work.exists() and before > 0
    made = ReferenceSet.load(work.with_name("many.safetensors"))
    assert made.names == tuple(f"{number:03d}.bmp" for number in range(300))


def test_sscd_files_are_found(server: ComfyServer, training_folder: str) -> None:
    folder = server.home / "models" / "sscd"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "averages.torchscript.pt"
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), str(file))
    (known, *_) = server.object_info("DejaVuBuildReferenceSet")["DejaVuBuildReferenceSet"]["input"]["required"][
        "features"
    ][1:]
    assert f"sscd 320: {file.name}" in known["options"]
    server.run(_built(training_folder, "by sscd", features=f"sscd 320: {file.name}"))
    made = ReferenceSet.load(server.home / "user" / "dejavu" / "references" / "by sscd")
    assert made.features == f"sscd 320 {hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    graph = _loaded("by sscd") | {"image": node("LoadImage", image=_kept(server))}
    (answer,) = _answers(server.run(_nearest(graph, ["image", 0])))
    assert answer["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5) and answer["copy"] is True
    file.unlink()
    made.save(server.home / "user" / "dejavu" / "references" / "without its file")
    graph["references"]["inputs"]["name"] = "without its file"
    with pytest.raises(ExecutionFailed, match="not in models/sscd"):
        server.run(graph)


def test_the_hosts_clip_vision_makes_features(server: ComfyServer, training_folder: str) -> None:
    linked = "the linked CLIP Vision model"
    with pytest.raises(ExecutionFailed, match="link a CLIP Vision model"):
        server.run(_built(training_folder, "by vision", features=linked))
    graph = _built(training_folder, "by vision", features=linked, clip_vision=["vision", 0])
    server.run(graph | {"vision": node("TinyVision", seed=0)})
    asked = _loaded("by vision") | {"image": node("LoadImage", image=_kept(server))}
    with pytest.raises(ExecutionFailed, match="link that model"):
        server.run(_nearest(asked, ["image", 0]))
    asked["references"]["inputs"]["clip_vision"] = ["vision", 0]
    with pytest.raises(ExecutionFailed, match="use the same features"):
        server.run(asked | {"vision": node("TinyVision", seed=1)})
    (answer,) = _answers(server.run(asked | {"vision": node("TinyVision", seed=0)}))
    assert answer["neighbours"][0]["name"] == "pair-1.png" and answer["copy"] is None
    assert answer["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-5) and "no threshold" in answer["why"]


@pytest.mark.parametrize("features", ["grey", "latents", "the linked CLIP Vision model"])
def test_gradients_are_those_of_finite_differences(server: ComfyServer, training_folder: str, features: str) -> None:
    graph = _built(training_folder, f"gradients {len(features)}", features=features)
    if features.startswith("the"):
        graph["vision"] = node("TinyVision", seed=0)
        graph["references"]["inputs"]["clip_vision"] = ["vision", 0]
    graph["model"] = node("DejaVuDemoModel", batch_size=1)
    graph["gradient"] = node("Gradient", model=["model", 0], vae=["model", 2], references=["references", 0])
    found = server.run(graph)["gradient"]
    assert abs(found["wanted"][0]) > 1e-4 and found["same"] == [True]
    assert found["found"][0] == pytest.approx(found["wanted"][0], rel=0.03)


# ------------------------------------------------------------------ anti-memorization guidance


def test_a_copy_is_none_any_more(server: ComfyServer, memorised: str) -> None:
    plain = server.run(_drawn(memorised, batch=2))
    assert min(_similarities(plain)) >= COPY and plain["copy"]["text"] == ["True"]
    # What the node says of them is what two other implementations say: the metric of the copies, by numpy.
    (first, *_) = plain["save"]["images"]
    drawn = Image.open(io.BytesIO(server.view(first))).convert("RGB")
    wanted = max(_grey_correlation(drawn, _image(n)) for n in range(len(bundled.pairs())))
    assert _similarities(plain)[0] == pytest.approx(wanted, abs=5e-3)
    guarded = server.run(_guarded(_drawn(memorised, batch=2)))
    assert max(_similarities(guarded)) < 0.6 and guarded["copy"]["text"] == ["False"]


@pytest.mark.newest
def test_an_ordinary_prompt_is_untouched_bit_for_bit(server: ComfyServer) -> None:
    untouched, strict = 0, {"threshold": 0.7, "threshold_rise": 0.0}
    for prompt in bundled.held_out_ordinary(6, seed=11):
        plain = _pixels(server, server.run(_drawn(prompt, seed=3)))
        with server.events("told") as events:
            found = _pixels(server, server.run(_guarded(_drawn(prompt, seed=3), **strict), client_id="told"))
            steered = "steered 0 of 10" not in _told(events)
        assert (found != plain) is steered  # the node says itself whether any step found an image near
        untouched += not steered
    assert untouched


def _told(events: Any) -> str:
    """The lines on the nodes: messages of the kind 3 with the node's name before them."""
    with events._changed:
        pieces = [m["data"] for m in events.messages if m["type"] == "binary" and m["data"][:4] == b"\0\0\0\3"]
    return " ".join(piece[8 + int.from_bytes(piece[4:8], "big") :].decode() for piece in pieces)


@pytest.mark.newest
def test_each_term_can_be_switched_off(server: ComfyServer, memorised: str) -> None:
    off = {"despecification": 0.0, "deduplication": 0.0, "dissimilarity": 0.0}

    def drawn(**terms: float) -> np.ndarray:
        pixels = _pixels(server, server.run(_guarded(_drawn(memorised), **{**off, **terms})))
        return np.frombuffer(pixels, np.uint8).astype(int)

    def apart(one: np.ndarray, other: np.ndarray) -> int:
        return int(np.abs(one - other).max())

    plain = np.frombuffer(_pixels(server, server.run(_drawn(memorised))), np.uint8)
    assert (drawn() == plain).all()
    weaker, stronger = drawn(despecification=2.0), drawn(despecification=4.0)
    further = drawn(dissimilarity=DEFAULTS["dissimilarity"])
    assert min(apart(*pair) for pair in combinations([plain, weaker, stronger, further], 2)) > 20
    # So steered, the nearest image's caption is this prompt at every step: D_n = D_c, and of one strength the first
    # two terms are one. By default both take all that leaves a guidance of 1, and draw the same image too.
    assert apart(drawn(deduplication=4.0), stronger) <= 1


def test_nothing_is_left_behind(server: ComfyServer, memorised: str) -> None:
    plain = _pixels(server, server.run(_drawn(memorised, seed=5)))
    assert _pixels(server, server.run(_guarded(_drawn(memorised, seed=5)))) != plain
    # The host keeps results: a denoise that means 1 too makes it draw again, with the same model.
    again = _drawn(memorised, seed=5, denoise=0.99995)
    assert _pixels(server, server.run(again)) == plain


@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_monitor_sees_the_same_and_changes_nothing(
    server: ComfyServer, memorised: str, monitor_first: bool
) -> None:
    alone = scores(report(server, watched(_drawn(memorised, seed=6))))
    guarded = _pixels(server, server.run(_guarded(_drawn(memorised, seed=6))))
    steps = (watched, _guarded) if monitor_first else (_guarded, watched)
    graph = _drawn(memorised, seed=6)
    for step in steps:
        graph = step(graph)
    assert scores(report(server, graph)) == pytest.approx(alone, rel=1e-6)
    assert _pixels(server, server.run(graph)) == guarded


def test_other_packs_guidance_stays_in_force(server: ComfyServer, memorised: str) -> None:
    def rescaled(**more: Any) -> Graph:
        graph = _drawn(memorised, seed=7)
        return graphs.splice(graph, "sampler", "model", "rescale", node("RescaleCFG", multiplier=0.7), **more)

    plain = _pixels(server, server.run(_drawn(memorised, seed=7)))
    other = server.run(rescaled())
    never = {"threshold": 1.0, "threshold_rise": 0.0}
    assert _pixels(server, other) != plain
    assert _pixels(server, server.run(_guarded(rescaled(), **never))) == _pixels(server, other)
    assert max(_similarities(server.run(_guarded(rescaled())))) < COPY


@pytest.mark.parametrize(("error", "said"), [("fault", "broken on purpose"), ("memory", "not enough memory")])
def test_a_fault_of_ours_costs_no_image(server: ComfyServer, memorised: str, error: str, said: str) -> None:
    plain = _pixels(server, server.run(_drawn(memorised, seed=8)))
    graph = _guarded(_drawn(memorised, seed=8))
    graph["sabotage"] = node("Sabotage", references=["references", 0], error=error)
    graph["amg"]["inputs"]["references"] = ["sabotage", 0]
    before = len(server.log())
    with server.events("told") as events:
        outputs = server.run(graph, client_id="told")
        told = _told(events)
    assert _pixels(server, outputs) == plain
    assert said in told and "nothing is mitigated" in told
    assert server.log()[before:].count("nothing is mitigated") == 1


def test_the_hosts_interruption_passes(server: ComfyServer, memorised: str) -> None:
    graph = _guarded(_drawn(memorised, seed=9))
    graph["sabotage"] = node("Sabotage", references=["references", 0], error="interrupt")
    graph["amg"]["inputs"]["references"] = ["sabotage", 0]
    entry = server.wait(server.post(graph), allow_error=True)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])


def test_a_threshold_that_never_acts_is_refused(server: ComfyServer, memorised: str, training_folder: str) -> None:
    server.run(_built(training_folder, "six pixels", features="pixels"))
    graph = _guarded(_drawn(memorised))
    graph["references"] = _loaded("six pixels")["references"]
    with pytest.raises(ExecutionFailed, match="never acts"):
        server.run(graph)


# ----------------------------------------------------------------- transition and initial noise


def test_before_the_transition_there_is_no_guidance(server: ComfyServer, memorised: str) -> None:
    # A run of one step ends before any minimum: D_u, which is what a cfg of 0 draws.
    unguided = demo(memorised, seed=12, steps=1, cfg=0.0)
    graph = demo(memorised, seed=12, steps=1, cfg=7.5)
    late = node("DejaVuGuidanceTransition", before_transition="off")
    graphs.splice(graph, "sampler", "model", "late", late)
    assert _pixels(server, server.run(watched(graph))) == _pixels(server, server.run(unguided))
    assert _pixels(server, server.run(demo(memorised, seed=12, steps=1, cfg=7.5))) != _pixels(
        server, server.run(unguided)
    )


def test_guidance_begins_at_the_transition(server: ComfyServer, memorised: str) -> None:
    graph = watched(_drawn(memorised, seed=13, steps=10))
    graphs.splice(graph, "sampler", "model", "late", node("DejaVuGuidanceTransition", before_transition="off"))
    with server.events("told") as events:
        outputs = server.run(graph, client_id="told")
        assert "guidance began in 1 of 1 images" in _told(events)
    # The monitor tells where the magnitude first rose; the host's own nodes draw the same in two parts.
    values = outputs["verdict"]["dejavu"][0]["verdicts"][0]["score_per_step"]
    first = next(number for number in range(1, 10) if values[number] > values[number - 1])
    parts = demo(memorised, seed=13, steps=10)
    del parts["sampler"]["inputs"]["seed"], parts["sampler"]["inputs"]["denoise"]
    parts["sampler"]["class_type"] = "KSamplerAdvanced"
    parts["sampler"]["inputs"] |= {
        "noise_seed": 13,
        "cfg": 0.0,
        "add_noise": "enable",
        "start_at_step": 0,
        "end_at_step": first,
        "return_with_leftover_noise": "enable",
    }
    rest = {**parts["sampler"]["inputs"], "cfg": 7.5, "add_noise": "disable", "start_at_step": first}
    rest |= {"end_at_step": 10, "return_with_leftover_noise": "disable", "latent_image": ["sampler", 0]}
    parts["rest"] = node("KSamplerAdvanced", **rest)
    parts["decode"]["inputs"]["samples"] = ["rest", 0]
    assert _pixels(server, outputs) == _pixels(server, server.run(parts))


@pytest.mark.parametrize("method", ["batch-wise-noise", "per-sample-noise"])
def test_the_initial_noise_is_what_the_sampler_starts_from(
    server: ComfyServer, newest: bool, memorised: str, method: str
) -> None:
    if method == "per-sample-noise" and not newest:
        pytest.skip("takes long, and is tried on the newest host")
    outputs = server.run(_from_noise(memorised, method, batch=2))
    document = json.loads(outputs["told"]["text"][0])
    assert document["changed"] is True and document["late_guidance"] is (method == "batch-wise-noise")
    assert document["score_after"] < document["score_before"]
    # The monitor measures the run itself: its first step is the one that the method left behind.
    measured = scores(outputs["verdict"]["dejavu"][0])
    assert max(measured) == pytest.approx(document["score_after"], rel=1e-3)  # of the worst image


def test_an_ordinary_prompt_keeps_its_noise(server: ComfyServer) -> None:
    for prompt in bundled.held_out_ordinary(6, seed=4242):
        graph = _from_noise(prompt, "per-sample-noise")
        found = server.run(graph)
        assert json.loads(found["told"]["text"][0])["changed"] is False
        graph["noise"] = node("RandomNoise", noise_seed=14)
        graph["monitor"]["inputs"]["model"] = ["checkpoint", 0]
        del graph["told"]
        assert _pixels(server, server.run(graph)) == _pixels(server, found)


def test_noise_for_another_latent_is_refused(server: ComfyServer, memorised: str) -> None:
    graph = _from_noise(memorised, "batch-wise-noise", batch=2)
    graph["other"] = node("DejaVuDemoModel", batch_size=1)
    graph["sampler"]["inputs"]["latent_image"] = ["other", 3]
    with pytest.raises(ExecutionFailed, match="link the same latent"):
        server.run(graph)


def _from_noise(prompt: str, method: str, batch: int = 1) -> Graph:
    graph = graphs.custom_sampling(prompt, seed=14, steps=10, cfg=7.5)
    graph["checkpoint"] = node("DejaVuDemoModel", batch_size=batch)
    del graph["latent"]
    graph["sampler"]["inputs"]["latent_image"] = ["checkpoint", 3]
    graph["noise"] = node(
        "DejaVuInitialNoise",
        model=["checkpoint", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["checkpoint", 3],
        seed=14,
        steps=10,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
        target=0.0,
        method=method,
        **NOISE,
    )
    graph["guider"]["inputs"]["model"] = ["noise", 1]
    graph["told"] = node("PreviewAny", source=["noise", 2])
    return watched(graph)
