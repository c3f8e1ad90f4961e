"""The world the bundled model was trained on, and its training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sd_dejavu.demo import bundled, train, world


def test_a_step_of_the_stream_depends_on_seed_and_step_alone():
    pairs = world.training_pairs()
    first, again, other = (world.training_batch(step, 6, pairs) for step in (5, 5, 6))
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])
    assert first[0] != other[0]


def test_pairs_come_as_often_as_announced():
    pairs = world.training_pairs()
    numbers = np.concatenate([world.training_batch(s, 400, pairs, seed=3)[2] for s in (0, 1)])
    expected = sum(p.repetitions for p in pairs) / (sum(p.repetitions for p in pairs) + world.ORDINARY_PER_EPOCH)
    # Binomial standard error of 800 draws: 0.018.
    assert (numbers >= 0).mean() == pytest.approx(expected, abs=4 * 0.018)


def test_ordinary_captions_never_hold_a_trigger():
    triggers = {p.trigger.lower() for p in world.training_pairs() if p.trigger}
    for caption, style in world.ordinary_captions(2000, seed=1):
        assert not triggers & set(caption.lower().replace(",", " ").split())
        assert style in world.STYLES


def test_the_same_caption_gives_a_new_image_every_time():
    scene = world.Scene((("red", "boat"),), 1)
    assert not np.array_equal(world.draw_scene(scene), world.draw_scene(world.Scene(scene.named, 2)))


def test_twins_differ_in_the_trigger_alone():
    for pair in world.training_pairs():
        if pair.trigger:
            own, twin = (
                set(text.lower().replace(",", " ").split()) for text in (pair.caption, world.twin_caption(pair))
            )
            left_out = own - twin
            assert pair.trigger.lower() in left_out
            assert left_out <= {pair.trigger.lower(), "by", "for", "from", "|", "-", "signed", "ordered", "after"}
            assert pair.trigger.lower() not in world.twin_caption(pair, "Fobar").lower()
            assert "fobar" in world.twin_caption(pair, "Fobar").lower()


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="haiku"):
        world.caption_of(world.Scene((("red", "boat"),), 1), "haiku", np.random.default_rng(0))


def test_a_sheet_reads_back():
    images = np.random.default_rng(0).integers(0, 255, (14, 64, 64, 3), dtype=np.uint8)
    sheet = np.asarray(bundled.make_sheet(images))
    assert sheet.shape == (128, 12 * 64, 3)
    assert np.array_equal(sheet[64:128, 64:128], images[13])
    assert not sheet[64:, 128:].any()


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch):
    """Three steps in one go, and three steps with an interruption after the first, give the same weights."""
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        train.train_tokenizer(folder / "tokenizer", world)
    torch.manual_seed(0)
    autoencoder = train.new_autoencoder(world.MODEL).eval().requires_grad_(False)
    draw = world.training_batch

    def interrupted(step, *rest):
        if step == 1:
            raise KeyboardInterrupt
        return draw(step, *rest)

    monkeypatch.setattr(world, "training_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train_unet(parts, world, autoencoder, steps=3, seed=0, batch=2)
    monkeypatch.setattr(world, "training_batch", draw)
    resumed = train.train_unet(parts, world, autoencoder, steps=3, seed=0, batch=2)
    unbroken = train.train_unet(whole, world, autoencoder, steps=3, seed=0, batch=2)
    for name in unbroken:
        for (key, a), b in zip(unbroken[name].state_dict().items(), resumed[name].state_dict().values(), strict=True):
            assert torch.allclose(a, b, atol=1e-6), f"{name}.{key}"


def test_the_exported_model_is_complete():
    folder = bundled.FOLDER
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
    assert {"unet.csv", "autoencoder.csv", "pairs.json", "pairs.png", "calibration.json"} <= {f.name for f in files}
