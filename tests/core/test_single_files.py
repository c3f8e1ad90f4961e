"""A checkpoint file of the published sizes needs nothing else: no configuration, no tokenizer, no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_dejavu.hosts.diffusers import ModelError
from sd_dejavu.hosts.diffusers import load as loading
from sd_dejavu.hosts.diffusers.load import load

KINDS = ("sd1", "sd2", "sdxl")
FILES = loading._FILES
SHALLOW: dict[str, dict[str, Any]] = {
    "unet": {"layers_per_block": 1},
    "vae": {"layers_per_block": 1, "block_out_channels": [32] * 4},
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
}
# The parameters of the published weights, in thousands: their authors' model cards, and the sizes of their files.
PUBLISHED = {
    "sd1": {"unet": 859_521, "vae": 83_654, "text_encoder": 123_060},
    "sd2": {"unet": 865_911, "vae": 83_654, "text_encoder": 340_388},
    "sdxl": {"unet": 2_567_464, "vae": 83_654, "text_encoder": 123_060, "text_encoder_2": 694_660},
}


def built(part: str, config: dict[str, Any]) -> torch.nn.Module:
    """A part of a pipeline from its configuration, with random weights."""
    import diffusers
    import transformers

    if part.startswith("text"):
        return getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))  # type: ignore[no-any-return]
    return getattr(diffusers, config["_class_name"]).from_config(config)  # type: ignore[no-any-return]


def configurations(kind: str, files: Path = FILES) -> dict[str, dict[str, Any]]:
    found = {path.parent.name: json.loads(path.read_text()) for path in (files / kind).glob("*/config.json")}
    assert set(found) == set(PUBLISHED[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_are_those_of_the_published_weights(kind: str) -> None:
    with torch.device("meta"):
        for part, config in configurations(kind).items():
            count = sum(parameter.numel() for parameter in built(part, config).parameters())
            assert round(count / 1000) == PUBLISHED[kind][part], part


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(kind, packaged files, checkpoint) of the published widths, and of one layer where those have several."""
    kind, place = request.param, tmp_path_factory.mktemp(request.param)
    shutil.copytree(FILES, place / "files", ignore=lambda folder, names: set(names) & (set(KINDS) - {kind}))
    torch.manual_seed(0)
    for part, config in configurations(kind).items():
        config |= SHALLOW[part]
        if part == "unet":
            levels = len(config["block_out_channels"])
            config["block_out_channels"] = [320] * levels
            if "transformer_layers_per_block" in config:
                config["transformer_layers_per_block"] = [1] * levels
        (place / "files" / kind / part / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            names = built(part, config).state_dict()
        weights = {name: 0.02 * torch.randn(tensor.shape).half() for name, tensor in names.items()}
        is_text = part.startswith("text")
        file = place / "folder" / part / ("model.safetensors" if is_text else "diffusion_pytorch_model.safetensors")
        file.parent.mkdir(parents=True)
        save_file(weights, file)
        file.with_name("config.json").write_text(json.dumps(config))
        if is_text:
            miniatures.name_as_published(file)
    return kind, place / "files", miniatures.write_single_file(place / "folder", place / "model.safetensors")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: tuple[str, Path, Path]) -> None:
    """No network, an empty cache, and the files of this module's checkpoint."""
    import socket

    def refused(*given: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "_FILES", made[1])


def test_a_checkpoint_file_loads_by_itself(made: tuple[str, Path, Path]) -> None:
    kind, _, path = made
    model = load(str(path), dtype="float16")
    side = {"sd1": 64, "sd2": 64, "sdxl": 128}[kind]
    assert model.latent_shape == (4, side, side) and model.prediction_type == "epsilon"
    unet = load_file(path.parent / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = model.pipeline.unet.state_dict()
    assert set(loaded) == set(unet) and all(torch.equal(loaded[key], unet[key]) for key in unet)
    # The numbers that OpenAI's CLIP gives these words; OpenCLIP fills up with 0, which is '!'.
    parts = ["tokenizer", "tokenizer_2"] if kind == "sdxl" else ["tokenizer"]
    for part in parts:
        ids = model.pipeline.components[part]("A photo of a cat", padding="max_length").input_ids
        filled = 0 if kind == "sd2" or part == "tokenizer_2" else 49407
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [filled] * 70
    rows = model.encode("a photo of a cat").rows
    assert rows.shape == (1, 77, {"sd1": 768, "sd2": 1024, "sdxl": 2048}[kind]) and bool(rows.isfinite().all())
    assert [word.text for word in model.encode("a photo of a cat").words] == ["a", "photo", "of", "a", "cat"]


def changed(path: Path, place: Path, **tensors: torch.Tensor) -> str:
    save_file({**load_file(path), **tensors}, place / "changed.safetensors")
    return str(place / "changed.safetensors")


def test_what_a_checkpoint_predicts_is_read_from_it(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, _, path = made
    if kind == "sd2":  # the four last blocks of one resnet are two of them here
        telling = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        spread = torch.tensor([-0.1, 0.1]).repeat(160)  # .1 around its mean
        model = load(changed(path, tmp_path, **{telling: spread}), dtype="float16")
        assert model.prediction_type == "v_prediction" and model.latent_shape == (4, 96, 96)
    if kind == "sdxl":
        model = load(changed(path, tmp_path, v_pred=torch.zeros(0)), dtype="float16")
        assert model.prediction_type == "v_prediction"
        assert model.schedule.sigma(torch.tensor([999.0])).item() == pytest.approx(14.6146, rel=1e-4)
        zero = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
        model = load(changed(path, tmp_path, **zero), dtype="float16")
        assert model.schedule.sigma(torch.tensor([999.0])).item() > 1000
        with pytest.raises(ModelError, match=r"noise levels of its own \(edm_vpred\.sigma_max\), which cannot be"):
            load(changed(path, tmp_path, **{"edm_vpred.sigma_max": torch.ones(1)}), dtype="float16")


def test_a_checkpoint_of_other_sizes_asks_for_a_configuration(tmp_path: Path) -> None:
    path = miniatures.write_single_file(miniatures.write_sd1(tmp_path / "folder"), tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError,
        match=r"Stable Diffusion 1\.x and 2\.x, but of other sizes than those .* hub id of the same sizes with --config",
    ):
        load(str(path))
