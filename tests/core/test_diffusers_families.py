"""A family of models is one file of its folder: a flow model on a miniature, known to nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import miniatures
import pytest
import torch
from safetensors.torch import save_file
from test_reference_build import data, write

from sd_dejavu.core.sampling import first_step
from sd_dejavu.hosts.diffusers import ModelError, families
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.reference.sources import open_source
from sd_dejavu.training.filter import FilterSettings
from sd_dejavu.training.finetune import finetune

FLOW = """
from sd_dejavu.hosts.diffusers.unet import UNetFamily


class Straight:
    def timestep(self, sigma):
        return 1000 * sigma

    def sigmas(self, steps):
        return [1 - n / steps for n in range(steps + 1)]


class Aardvark(UNetFamily):
    name = "Aardvark"
    pipeline = "StableDiffusionImg2ImgPipeline"
    text_encoders = (("text_encoder", "CLIPTextModel"),)

    def holds(self, shapes):
        return "aardvark" in shapes

    def takes_images(self, shapes):
        return False

    def files(self, shapes):
        return None

    def prediction_type(self, pipeline, name):
        return "flow"

    def schedule(self, pipeline):
        return Straight()

    def output(self, network, x, sigma, timestep, rows, extras):
        return network(x, timestep, encoder_hidden_states=rows, return_dict=False)[0]

    def conditioning(self, outputs, image_size):
        return 2 * outputs[0].last_hidden_state, {"size": rows_of(image_size)}


def rows_of(size):
    import torch

    return torch.tensor([size])


FAMILY = Aardvark()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model of the new family, whose file is put where families are."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "aardvark.py").write_text(FLOW)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    model = miniatures.write_sd1(tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"}))
    yield model
    sys.modules.pop("sd_dejavu.hosts.diffusers.families.aardvark", None)
    vars(families).pop("aardvark", None)


def test_a_new_family_is_one_file(folder: Path) -> None:
    model = load(str(folder))
    assert model.prediction_type == "flow" and model.sigmas(4) == [1, 0.75, 0.5, 0.25, 0]
    conditioning = model.encode("red fox")
    pipeline = model.pipeline
    ids = pipeline.tokenizer("red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    rows = 2 * pipeline.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(conditioning.rows, rows)
    assert conditioning.extras["size"].tolist() == [[16, 16]]
    x, sigma = model.noise(0, 2), torch.tensor([1.0, 0.25])
    with torch.no_grad():
        velocity = pipeline.unet(x, torch.tensor([1000.0, 250.0]), rows.expand(2, -1, -1)).sample
        torch.testing.assert_close(model(x, sigma, conditioning), x - sigma.reshape(2, 1, 1, 1) * velocity)
    assert (first_step(model, [conditioning], model.encode(""), model.noise(0, 1), 1.0) > 0).all()


def test_messages_and_single_files_know_the_new_family(folder: Path, tmp_path: Path) -> None:
    assert families.names() == "Stable Diffusion 1.x and 2.x, Stable Diffusion XL, Aardvark"
    save_file({"aardvark": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="of the family Aardvark, but of other sizes"):
        load(str(tmp_path / "one.safetensors"))


def test_a_flow_model_is_not_fine_tuned(folder: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", {"one.png": data(0), "one.txt": "a red fox"})
    with pytest.raises(ValueError, match="predicts 'flow'; only epsilon and v_prediction models can be fine-tuned"):
        finetune(load(str(folder)), open_source(dataset), tmp_path / "out", filtering=FilterSettings("none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", families.available(), ids=lambda family: family.name)
def test_a_checkpoint_is_of_one_family(family: families.Family, tmp_path: Path) -> None:
    """By the names of its tensors, and of none without its text encoders."""
    writers = {"StableDiffusionPipeline": miniatures.write_sd1, "StableDiffusionXLPipeline": miniatures.write_sdxl}
    names = miniatures.original_names(writers[family.pipeline](tmp_path / "model"))
    shapes = {key: tuple(value.shape) for key, value in names.items()}
    assert [known for known in families.available() if known.holds(shapes)] == [family]
    network = {key: shape for key, shape in shapes.items() if key.startswith("model.diffusion_model.")}
    assert not any(known.holds(network) for known in families.available())
