"""SSCD and DINOv2 in every format that users have them in, against transformers' networks and against each other."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reference_features import failure, images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sd_dejavu.reference import dinov2 as dinov2_file
from sd_dejavu.reference import network_files, sscd
from sd_dejavu.reference.features import IMAGENET, KINDS, SSCD, FeatureError, FeatureSettings, Transformers, load
from sd_dejavu.reference.network_files import digest_of_network

NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="the extra 'onnx' is not installed",
)
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}


def script(module: torch.nn.Module, path: Path, *example: Tensor) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.trace(module, example, strict=False) if example else torch.jit.script(module)
        torch.jit.save(made, str(path))
    return str(path)


def onnx(module: torch.nn.Module, path: Path, example: Tensor, **dynamic: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), str(path), dynamo=False, input_names=["pixels"], **dynamic)
    return str(path)


ANY_SIZE = {"dynamic_axes": {"pixels": {0: "batch", 2: "height", 3: "width"}}}


# ---------------------------------------------------------------------------------------- SSCD


@pytest.fixture(scope="module")
def residual() -> Any:
    """transformers' ResNet in miniature with random weights and random statistics: the second implementation."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 1, 1])
    made = ResNetModel(config).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return made


@pytest.fixture(scope="module")
def linear() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(64, 24)


def torchvision_names(residual: Any, linear: torch.nn.Linear) -> dict[str, Tensor]:
    """The weights as the authors' ``.torchvision.pt`` names them."""
    places = {"convolution": "conv", "normalization": "bn"}
    found = {"backbone.fc.weight": linear.weight.data, "backbone.fc.bias": linear.bias.data}
    for key, value in residual.state_dict().items():
        kind = places[next(one for one in places if one in key)]
        ending = key.rpartition(".")[2]
        block = re.search(r"stages\.(\d)\.layers\.(\d)\.(?:layer\.(\d)|shortcut)", key)
        if block is None:
            found[f"backbone.{kind}1.{ending}"] = value
        else:
            number = int(block[1]) + 1
            inner = f"{kind}{int(block[3]) + 1}" if block[3] else f"downsample.{0 if kind == 'conv' else 1}"
            found[f"backbone.layer{number}.{block[2]}.{inner}.{ending}"] = value
    return {key: value.clone().contiguous() for key, value in found.items()}


def classy_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as the authors' ``.classy.pt`` names them (facebookresearch/ClassyVision, models/resnext.py)."""
    inner = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6"}
    found = {}
    for key, value in weights.items():
        match = re.fullmatch(r"backbone\.layer(\d)\.(\d)\.(.+)\.(\w+)", key)
        if match:
            stage, place = int(match[1]) - 1, match[3]
            place = f"convolutional_block.{inner[place]}" if place in inner else place.replace("bn3", "bn")
            key = f"backbone.blocks.{stage}.block{stage}-{match[2]}.{place}.{match[4]}"
        key = key.replace("backbone.conv1", "backbone.initial_block._module.0")
        key = key.replace("backbone.bn1", "backbone.initial_block._module.1").replace("backbone.fc", "embeddings.1")
        found[key] = value
    return found


class Described(torch.nn.Module):
    """transformers' ResNet, then GeM and the linear layer, written out."""

    def __init__(self, residual: Any, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.residual, self.linear = residual, linear

    def forward(self, x: Tensor) -> Tensor:
        last = self.residual(x).last_hidden_state
        return self.linear((last.clamp(min=1e-6) ** 3).mean((2, 3)) ** (1 / 3))


@pytest.fixture(scope="module")
def described(residual: Any, linear: torch.nn.Linear) -> Described:
    return Described(residual, linear).eval()


@pytest.fixture(scope="module")
def sscd_files(
    described: Described, residual: Any, linear: torch.nn.Linear, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sscd")
    weights = torchvision_names(residual, linear)
    save_file(weights, root / "torchvision.safetensors")
    save_file(classy_names(weights), root / "classy.safetensors")
    script(described, root / "mixup.torchscript.pt", torch.rand(2, 3, 288, 300))
    return {path.name.partition(".")[0]: path for path in root.iterdir()}


def test_the_network_is_that_of_a_second_implementation(described: Described, residual: Any, linear: Any) -> None:
    x = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = described(x)
        for weights in (torchvision_names(residual, linear), classy_names(torchvision_names(residual, linear))):
            assert sscd.network(weights)(x).numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-5)


def test_grouped_convolutions_are_those_of_their_blocks_on_a_diagonal(residual: Any, linear: Any) -> None:
    """ResNeXt's groups are a dense convolution with zeros between the groups."""
    dense = torchvision_names(residual, linear)
    grouped = dict(dense)
    for key in [key for key in dense if key.endswith("conv2.weight")]:
        half = dense[key].shape[0] // 2
        dense[key] = dense[key].clone()
        dense[key][:half, half:] = dense[key][half:, :half] = 0
        grouped[key] = torch.cat([dense[key][:half, :half], dense[key][half:, half:]])
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(sscd.network(grouped)(x), sscd.network(dense)(x), atol=1e-5)


def test_sscd_gives_the_same_rows_from_every_format(sscd_files: dict[str, Path]) -> None:
    batch = images(11, 2)
    expected = SSCD(sscd_files["mixup"])(batch)
    assert torch.pdist(expected) > 1e-3  # so that equal rows say something
    for name in ("torchvision", "classy"):
        for size in (288, 320):
            found, scripted = SSCD(sscd_files[name], size), SSCD(sscd_files["mixup"], size)
            assert found(batch).numpy() == pytest.approx(scripted(batch).numpy(), abs=1e-5)
            assert found.name.startswith(f"sscd {size} ")


def test_half_precision_is_computed_in_single(sscd_files: dict[str, Path], tmp_path: Path) -> None:
    half = {name: value.half() for name, value in load_file(sscd_files["classy"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    batch = images(12, 2)
    rows = SSCD(tmp_path / "half.safetensors")(batch)
    assert rows.dtype == torch.float32
    assert rows.numpy() == pytest.approx(SSCD(sscd_files["classy"])(batch).numpy(), abs=5e-3)


@NEEDS_ONNX
def test_sscd_as_onnx(described: Described, sscd_files: dict[str, Path], tmp_path: Path) -> None:
    batch = images(13, 3)
    expected = SSCD(sscd_files["torchvision"])(batch)
    free = onnx(described, tmp_path / "free.onnx", torch.rand(2, 3, 288, 300), **ANY_SIZE)
    assert SSCD(Path(free))(batch).numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    fixed = onnx(described, tmp_path / "fixed.onnx", torch.rand(1, 3, 320, 320))
    squares = SSCD(sscd_files["torchvision"], 320)(batch)
    assert SSCD(Path(fixed), 320)(batch).numpy() == pytest.approx(squares.numpy(), abs=1e-4)
    assert "images of 320 x 320 only: choose 320" in failure(features="sscd", weights=fixed)
    with pytest.raises(FeatureError, match=r"gives no gradients.*use the same network as \.safetensors"):
        SSCD(Path(free))(batch.requires_grad_(True))


# -------------------------------------------------------------------------------------- DINOv2


def dinov2(registers: int, gated: bool = False) -> Any:
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(4)
    known = {**SIZE, "image_size": 98, "patch_size": 14, "use_swiglu_ffn": gated}
    if registers:
        made: Any = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**known, num_register_tokens=registers))
    else:
        made = Dinov2Model(Dinov2Config(**known))
    for parameter in made.parameters():  # as initialised, the class token is nearly the same for all images
        torch.nn.init.normal_(parameter, 0.02, 0.15)
    return made.eval()


def published(module: Any) -> dict[str, Tensor]:
    """As the files on the hub name them, which transformers keeps to whatever its classes call them."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def authors_names(module: Any) -> dict[str, Tensor]:
    """As facebookresearch/dinov2 names them: what transformers' own conversion does, the other way round."""
    found = {}
    for key, value in published(module).items():
        key = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        key = key.replace("embeddings.position_embeddings", "pos_embed").replace("layernorm", "norm")
        key = key.replace("embeddings.", "").replace("encoder.layer.", "blocks.")
        key = re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.gamma", key).replace("attention.output.dense", "attn.proj")
        found[key.replace("weights_in", "w12").replace("weights_out", "w3")] = value
    for block in range(SIZE["num_hidden_layers"]):
        for ending in ("weight", "bias"):
            parts = [
                found.pop(f"blocks.{block}.attention.attention.{name}.{ending}") for name in ("query", "key", "value")
            ]
            found[f"blocks.{block}.attn.qkv.{ending}"] = torch.cat(parts)
    return found


@pytest.mark.parametrize(("registers", "gated"), [(0, False), (4, False), (0, True)])
def test_dinov2_gives_the_same_rows_from_every_layout(registers: int, gated: bool, tmp_path: Path) -> None:
    module = dinov2(registers, gated)
    module.save_pretrained(tmp_path / "folder")
    save_file(published(module), tmp_path / "hub.safetensors")
    save_file(authors_names(module), tmp_path / "authors.safetensors")
    batch = images(14, 2, 100, 120)
    expected = Transformers("dinov2", str(tmp_path / "folder"))
    assert expected.preprocessing.side == 256
    assert torch.pdist(expected(batch)) > 1e-2
    for name in ("hub", "authors"):
        found = Transformers("dinov2", str(tmp_path / f"{name}.safetensors"))
        assert found(batch).numpy() == pytest.approx(expected(batch).numpy(), abs=1e-5)
        assert found.name == expected.name


class Tokens(torch.nn.Module):
    """What exported models give."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(pixel_values=x).last_hidden_state


class ClassToken(Tokens):
    """What the authors' hub model gives."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def test_dinov2_as_torchscript(tmp_path: Path) -> None:
    module = dinov2(0)
    module.save_pretrained(tmp_path / "folder")
    file = script(ClassToken(module), tmp_path / "dinov2.pt", torch.rand(1, 3, 224, 224))
    batch = images(15, 2, 100, 120)
    found, expected = Transformers("dinov2", file), Transformers("dinov2", str(tmp_path / "folder"))
    assert found(batch).numpy() == pytest.approx(expected(batch).numpy(), abs=1e-5)


@NEEDS_ONNX
def test_dinov2_as_onnx_takes_the_size_that_its_file_names(tmp_path: Path) -> None:
    """Also one that gives all tokens, of which the class token is the first."""
    module = dinov2(0)
    module.save_pretrained(tmp_path / "folder")
    batch = images(16, 2, 100, 120)
    expected = Transformers("dinov2", str(tmp_path / "folder"))(batch)
    file = onnx(ClassToken(module), tmp_path / "d.onnx", torch.rand(1, 3, 224, 224))
    assert Transformers("dinov2", file)(batch).numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    large = Transformers("dinov2", onnx(Tokens(module), tmp_path / "tokens.onnx", torch.rand(1, 3, 518, 518)))
    assert (large.preprocessing.side, large.preprocessing.crop) == (592, 518)
    assert large(batch).shape == (2, 64)


def test_the_preprocessing_of_a_file_is_that_of_transformers_processor(tmp_path: Path) -> None:
    from transformers import BitImageProcessor

    save_file(authors_names(dinov2(0)), tmp_path / "a.safetensors")
    features = Transformers("dinov2", str(tmp_path / "a.safetensors"))
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=IMAGENET[0],
        image_std=IMAGENET[1],
    )
    image = images(17, 1, 300, 420)
    eights = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    expected = processor(eights, return_tensors="pt").pixel_values
    mean, std = (torch.tensor(one)[:, None, None] for one in IMAGENET)
    found = (features.prepare(image) - mean) / std
    # The processor rounds to 8 bits, and is crisper by its own resize at edges.
    assert float((found - expected).abs().mean()) < 0.02


# -------------------------------------------------------------------------------------- faults


def test_wrong_files_are_told_in_a_sentence(
    sscd_files: dict[str, Path], residual: Any, linear: Any, tmp_path: Path
) -> None:
    save_file(authors_names(dinov2(0)), tmp_path / "dinov2.safetensors")
    assert "not those of an SSCD network (it lacks conv1.weight)" in failure(
        features="sscd", weights=str(tmp_path / "dinov2.safetensors")
    )
    assert "not those of a DINOv2 network (it lacks embeddings.patch" in failure(
        features="dinov2", weights=str(sscd_files["classy"])
    )
    weights = torchvision_names(residual, linear)
    save_file({k: v for k, v in weights.items() if "layer4.0.bn3" not in k}, tmp_path / "less.safetensors")
    assert "it lacks layer4.0.bn3.weight" in failure(features="sscd", weights=str(tmp_path / "less.safetensors"))
    save_file({**weights, "backbone.extra.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    assert "unknown are extra.weight" in failure(features="sscd", weights=str(tmp_path / "more.safetensors"))
    named = authors_names(dinov2(0))
    named.pop("blocks.1.norm2.weight")
    save_file(named, tmp_path / "holes.safetensors")
    assert "it lacks encoder.layer.1.norm2.weight" in failure(
        features="dinov2", weights=str(tmp_path / "holes.safetensors")
    )
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    for kind in ("sscd", "dinov2"):
        told = failure(features=kind, weights=str(tmp_path / "broken.safetensors"))
        assert "is not a sound safetensors file" in told
    assert "is a file: name a folder" in failure(features="clip", weights=str(sscd_files["classy"]))


class Largest(TorchDispatchMode):
    """How many values the largest tensor holds that is made while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.device.type != "meta":
            self.values = max(self.values, made.numel())
        return made


def test_shapes_that_do_not_fit_take_no_memory_and_are_told(residual: Any, linear: Any) -> None:
    """A convolution of so many outputs would hold 147 times as many values as the file; empty tensors have any shape."""
    weights, first = torchvision_names(residual, linear), torch.ones(1 << 20, 1, 1, 1)
    with Largest() as largest, pytest.raises(ValueError, match="not those of an SSCD network"):
        sscd.network({**weights, "backbone.conv1.weight": first})
    assert largest.values <= 1 << 20
    groups = {"backbone.layer2.1.conv2.weight": torch.empty(8, 0, 3, 3)}
    with pytest.raises(ValueError, match=r"not those of an SSCD network \(layer2\.1\.conv2\.weight is empty"):
        sscd.network({**weights, **groups})
    named = authors_names(dinov2(0))
    with pytest.raises(ValueError, match="not those of a DINOv2 network"):
        dinov2_file.network({**named, "pos_embed": torch.empty(1, 0, 64)})


def test_the_digits_of_an_onnx_file_are_those_of_its_weights_too(tmp_path: Path) -> None:
    """Whatever the files are called that it names, and of no others. Written out as protobuf has it: field 1 is the key
    and field 2 the text, each after its length, of 200 as 0xc8 0x01."""
    long = "w" * 196 + ".bin"
    entry = b"\n\x08location\x12"
    network = b"network" + entry + b"\x05w.bin" + entry + b"\xc8\x01" + long.encode() + b"more"
    (tmp_path / "a.onnx").write_bytes(network)
    seen = [digest_of_network(tmp_path / "a.onnx")]
    (tmp_path / "a.onnx.extracted").mkdir()
    (tmp_path / "a.onnx.txt").write_bytes(b"notes")
    assert digest_of_network(tmp_path / "a.onnx") == seen[0]
    for name, weights in (("w.bin", b"1"), ("w.bin", b"2"), (long, b"1"), (long, b"2")):
        (tmp_path / name).write_bytes(weights)
        seen.append(digest_of_network(tmp_path / "a.onnx"))
    assert len(set(seen)) == len(seen)


@NEEDS_ONNX
def test_where_an_onnx_file_says_that_its_weights_lie(tmp_path: Path) -> None:
    """As the library of the format writes it."""
    import onnx as library

    weights = library.numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w")
    ends = [library.helper.make_tensor_value_info(name, 1, ["b", 3, "h", "w"]) for name in "xy"]
    nodes = [
        library.helper.make_node("Conv", ["x", "w"], ["c"]),
        library.helper.make_node("GlobalAveragePool", ["c"], ["y"]),
    ]
    made = library.helper.make_model(library.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights]))
    library.save(made, tmp_path / "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    first = digest_of_network(tmp_path / "a.onnx")
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    assert digest_of_network(tmp_path / "a.onnx") != first


def test_a_file_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(64)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(network_files, "_MOST_BYTES", 100)
    with pytest.raises(FeatureError, match=r"too large: .* and at most 100 are read"):
        network_files.tensors_of(tmp_path / "a.safetensors")


def test_pickled_weights_are_not_read(residual: Any, linear: Any, tmp_path: Path) -> None:
    torch.save(torchvision_names(residual, linear), tmp_path / "sscd_disc_mixup.torchvision.pt")
    told = failure(features="sscd", weights=str(tmp_path / "sscd_disc_mixup.torchvision.pt"))
    assert "is a pickle and is not read: save its tensors as .safetensors" in told


def test_onnx_without_its_package_is_told_in_a_sentence(tmp_path: Path) -> None:
    """In a process in which the package cannot be imported."""
    (tmp_path / "a.onnx").write_bytes(b"x")
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from sd_dejavu.reference.features import FeatureSettings, load\n"
        f"load(FeatureSettings(features='sscd', weights={str(tmp_path / 'a.onnx')!r}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert "a.onnx needs the package onnxruntime: pip install onnxruntime" in ended.stderr


@NEEDS_ONNX
def test_broken_onnx_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    assert "cannot be loaded as ONNX" in failure(features="sscd", weights=str(tmp_path / "broken.onnx"))
    flat = onnx(torch.nn.Linear(7, 2), tmp_path / "flat.onnx", torch.rand(1, 7))
    assert "takes an input of the shape [1, 7], and images are" in failure(features="dinov2", weights=flat)


# ------------------------------------------------------------------------------- thresholds


def test_the_threshold_of_a_copy_is_the_first_published() -> None:
    assert KINDS["sscd"].copy == 0.5
    assert {one.similarity for one in KINDS["sscd"].published} == {0.5, 0.7, 0.75}
    assert all(one.source for kind in KINDS.values() for one in kind.published)
    assert KINDS["dinov2"].copy is KINDS["clip"].copy is None


def test_load_takes_files_of_every_kind(sscd_files: dict[str, Path]) -> None:
    for path in sscd_files.values():
        assert load(FeatureSettings(features="sscd", weights=str(path))).name.startswith("sscd 288 ")
