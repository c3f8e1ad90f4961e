"""Feature networks against second implementations: Pillow's resize, numpy, transformers' own outputs."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd_dejavu.core.similarity import grey_correlation
from sd_dejavu.reference.features import (
    IMAGENET,
    KINDS,
    OPENAI_CLIP,
    SSCD,
    FeatureError,
    Features,
    FeatureSettings,
    Grey,
    HostVision,
    Latents,
    Pixels,
    Transformers,
    load,
)


def images(seed: int, count: int, height: int = 60, width: int = 90) -> Tensor:
    """Smooth random images in whole 8-bit steps, as files hold them."""
    small = torch.rand((count, 3, 6, 9), generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    return (large * 255).round() / 255


def pillow(image: Tensor, width: int, height: int, how: Image.Resampling) -> np.ndarray:
    """The second implementation: Pillow's resize of one image, [height, width, 3] in 0..1."""
    whole = Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    return np.asarray(whole.resize((width, height), how)).astype(float) / 255


class Averages(torch.nn.Module):
    """A network small enough to compute by hand: mean, quarter means and the last pixel of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        left = x[:, :, :, : x.shape[3] // 2].mean(dim=(2, 3))
        return torch.cat([x.mean(dim=(2, 3)), left, x[:, :, -1, -1]], dim=1)


def averages(x: np.ndarray) -> np.ndarray:
    """The same with numpy, [H, W, 3] -> unit row."""
    row = np.concatenate([x.mean((0, 1)), x[:, : x.shape[1] // 2].mean((0, 1)), x[-1, -1]])
    return row / np.linalg.norm(row)


@pytest.fixture
def torchscript(tmp_path: Path) -> Path:
    path = tmp_path / "sscd.torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Averages()), str(path))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Miniature vision models with random weights, in transformers' layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPVisionConfig(**size, intermediate_size=32, image_size=28, patch_size=7, projection_dim=12)
    dino = Dinov2Config(**size, image_size=28, patch_size=7)
    root = tmp_path_factory.mktemp("models")
    CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip")
    Dinov2Model(dino).save_pretrained(root / "dinov2")
    said = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6]}
    (root / "dinov2" / "preprocessor_config.json").write_text(json.dumps(said))
    return {name: str(root / name) for name in ("clip", "dinov2")}


# --------------------------------------------------------------------------------- each network


def test_pixels_are_pillows_reduced_image() -> None:
    batch = images(0, 2)
    expected = [pillow(p, 32, 32, Image.Resampling.BILINEAR).transpose(2, 0, 1).ravel() for p in batch]
    # Pillow rounds to 8 bits after each of its two passes.
    assert Pixels()(batch).numpy() == pytest.approx(np.array(expected), abs=1.01 / 255)


def test_latents_are_what_the_encoder_gives_for_the_reduced_image() -> None:
    seen = []

    def encode(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x[:, :2, ::2, ::2] * 3

    batch = images(1, 2)
    features = Latents(encode, "by hand", side=16)
    expected = Pixels(16)(batch).view(2, 3, 16, 16)[:, :2, ::2, ::2].flatten(1) * 3
    assert torch.equal(features(batch), expected)
    assert seen == [(2, 3, 16, 16)]
    assert (features.name, features.metric) == ("latents 16 by hand", "normalised L2")


def test_grey_rows_have_the_bundled_models_copy_metric_as_cosine() -> None:
    a, b = images(2, 3, 64, 64), images(3, 4, 64, 64)
    rows = Grey()(a)
    assert (rows @ Grey()(b).T).numpy() == pytest.approx(grey_correlation(a, b).numpy(), abs=1e-5)
    assert rows.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert Grey()(torch.full((1, 3, 64, 64), 0.7)).abs().max() == 0


@pytest.mark.parametrize(("size", "width", "height"), [(288, 432, 288), (320, 320, 320)])
def test_sscd_sees_the_authors_preprocessing(torchscript: Path, size: int, width: int, height: int) -> None:
    """Short side 288 of a 90 x 60 image is 432 x 288."""
    batch = images(4, 2)
    mean, std = (np.array(v) for v in IMAGENET)
    expected = [averages((pillow(p, width, height, Image.Resampling.BILINEAR) - mean) / std) for p in batch]
    features = SSCD(torchscript, size)
    assert features(batch).numpy() == pytest.approx(np.array(expected), abs=4e-3)
    assert features(batch).norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert features.name.startswith(f"sscd {size} ")


def test_clip_is_the_models_own_projected_embedding(folders: dict[str, str]) -> None:
    """Without a preprocessing file: CLIP's authors' numbers, bicubic to the short side, the middle square."""
    from transformers import CLIPVisionModelWithProjection

    batch = images(5, 2)
    reduced = [pillow(p, 42, 28, Image.Resampling.BICUBIC)[:, 7:35] for p in batch]
    mean, std = (np.array(v) for v in OPENAI_CLIP)
    inputs = torch.tensor(((np.array(reduced) - mean) / std).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(folders["clip"]).eval()(inputs).image_embeds
    expected = expected / expected.norm(dim=1, keepdim=True)
    found = Transformers("clip", folders["clip"])(batch)
    assert found.shape == (2, 12)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=5e-3)


def test_dinov2_is_the_class_token_with_the_preprocessing_that_its_file_names(folders: dict[str, str]) -> None:
    from transformers import Dinov2Model

    batch = images(6, 2)
    reduced = [pillow(p, 48, 32, Image.Resampling.BICUBIC)[2:30, 10:38] for p in batch]
    inputs = ((np.array(reduced) - np.array([0.4, 0.5, 0.6])) / np.array(IMAGENET[1])).transpose(0, 3, 1, 2)
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(folders["dinov2"]).eval()
        expected = model(torch.tensor(inputs, dtype=torch.float32)).last_hidden_state[:, 0]
    expected = expected / expected.norm(dim=1, keepdim=True)
    found = Transformers("dinov2", folders["dinov2"])(batch)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=5e-3)


def test_a_hosts_vision_model_gives_unit_rows() -> None:
    features = HostVision(lambda x: x.mean(dim=(2, 3))[:, None], "ViT-H")
    batch = images(7, 2)
    means = batch.mean(dim=(2, 3)).numpy()
    assert features(batch).numpy() == pytest.approx(means / np.linalg.norm(means, axis=1, keepdims=True), abs=1e-6)
    assert (features.name, features.metric) == ("host ViT-H", "cosine")


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_those_of_finite_differences(kind: str, torchscript: Path, folders: dict[str, str]) -> None:
    """Along a random direction, central difference in fp32: agreement to 3%. ReLUs want a short step."""
    weights = {"sscd": str(torchscript), **folders}.get(kind, "")
    features = load(FeatureSettings(features=kind, weights=weights))
    x = images(8, 1, 64, 64).clamp(0.1, 0.9).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        pull = torch.randn(features(x).shape, generator=generator)
    direction = images(9, 1, 64, 64) - 0.5
    (gradient,) = torch.autograd.grad((features(x) * pull).sum(), x)
    step = 3e-4 if kind == "latents" else 0.02
    with torch.no_grad():
        up, down = ((features(x + s * direction) * pull).double().sum() for s in (step, -step))
    expected = float((up - down) / (2 * step))
    assert abs(expected) > 1e-4
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.03)


# --------------------------------------------------------------------------------------- names


def test_names_tell_weights_and_sizes_apart(torchscript: Path, folders: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Sequential(Averages(), torch.nn.Linear(9, 4))), str(other))
    made: list[Features] = [SSCD(torchscript), SSCD(torchscript, 320), SSCD(other), Pixels(32), Pixels(16), Grey()]
    made += [Transformers("clip", folders["clip"]), Transformers("dinov2", folders["dinov2"])]
    assert len({f.name for f in made}) == len(made)
    assert SSCD(torchscript).name == SSCD(torchscript).name
    for features in made:
        assert features.name.split()[0] in KINDS


def test_the_bundled_autoencoder_needs_no_weights() -> None:
    features = load(FeatureSettings(features="latents"))
    assert features.name.startswith("latents 64 ")
    assert features(images(0, 2)).ndim == 2


# -------------------------------------------------------------------------------------- faults


def failure(**chosen: object) -> str:
    with pytest.raises(FeatureError) as caught:
        load(FeatureSettings(**chosen))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["sscd", "clip", "dinov2"])
def test_networks_must_be_named(kind: str) -> None:
    assert "name them with --weights" in failure(features=kind)
    assert "there is no" in failure(features=kind, weights="./not/here")


def test_settings_that_do_not_belong_together() -> None:
    assert "take no weights: leave 'a.pt' out" in failure(features="grey", weights="a.pt")
    assert "leave the side 64 out" in failure(features="grey", side=64)
    with pytest.raises(ValueError, match="features must be one of"):
        FeatureSettings(features="vgg")


def test_files_that_are_something_else(tmp_path: Path, folders: dict[str, str]) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"not a zip")
    assert "cannot be loaded as TorchScript" in failure(features="sscd", weights=str(broken))
    assert "type 'dinov2', not clip" in failure(features="clip", weights=folders["dinov2"])
    assert "cannot be loaded as a clip vision model" in failure(features="clip", weights=str(tmp_path))
    assert "there is no autoencoder in" in failure(features="latents", weights=str(tmp_path))


def test_a_torchscript_file_of_another_kind_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(7, 2)), str(path))
    assert "does not take an image" in failure(features="sscd", weights=str(path))


def test_models_with_pickled_weights_are_refused(tmp_path: Path, folders: dict[str, str]) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((Path(folders["clip"]) / "config.json").read_text())
    stream = io.BytesIO()
    torch.save(load_file(Path(folders["clip"]) / "model.safetensors"), stream)
    (folder / "pytorch_model.bin").write_bytes(stream.getvalue())
    assert "cannot be loaded as a clip vision model" in failure(features="clip", weights=str(folder))
