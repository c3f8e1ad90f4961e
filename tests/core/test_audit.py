"""The audit's parts by hand-worked numbers, and whole audits: resumed, on a cluster, of LoRAs with known memories."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_made import LinearDenoiser
from PIL import Image
from safetensors.torch import save_file

from sd_dejavu.calibration.recombined import recombined
from sd_dejavu.cli.main import main
from sd_dejavu.core.similarity import COPY_THRESHOLD, grey_correlation
from sd_dejavu.core.statistics import benjamini_hochberg, spread
from sd_dejavu.demo import bundled, world
from sd_dejavu.hosts.diffusers import ModelError
from sd_dejavu.hosts.diffusers.audit import Load
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.reference.build import build, from_images
from sd_dejavu.reference.features import Grey
from sd_dejavu.reference.reference_set import ReferenceSet
from sd_dejavu.report.audit_html import AuditPage, render_audit
from sd_dejavu.report.audit_rows import as_json, notes, sentence, verdict_of
from sd_dejavu.run.measure import Measurement
from sd_dejavu.training.audit import (
    Audit,
    AuditSettings,
    Entry,
    Point,
    Row,
    Subject,
    audit,
    entries_of,
    gain,
    gains,
    identity,
    judged,
    least_named,
    lora_files,
    more_needed,
    ordinary_for,
    sampled,
    suggestion,
)
from sd_dejavu.training.engines import Cluster, on_ray
from sd_dejavu.training.ledger import Ledger
from sd_dejavu.training.recovery import LEVELS, as_trained, drawing_levels, drawn, recoveries, recovery
from sd_dejavu.training.tasks import Chosen, Task, Variant, Work, one_process

HERE = Path(__file__).parent
ONE = Measurement(images=1, steps=4)


# ------------------------------------------------------------------------------------------ statistics


def test_q_values_worked_by_hand():
    # Sorted .005 .01 .03 .04, times n / rank: .02 .02 .04 .04; the smallest from there on.
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert benjamini_hochberg([0.5, 0.9]) == pytest.approx([0.9, 0.9])
    assert benjamini_hochberg([]) == []


def test_the_false_discovery_rate_holds_for_scores_that_share_their_nulls():
    """20 of 100 captions are shifted; the mean share of wrong names over 400 draws, against the rate asked for."""
    rng = np.random.default_rng(3)
    shares, found = [], []
    for _ in range(400):
        scores = rng.normal(size=100)
        scores[:20] += 4
        named = np.array(judged(scores.tolist(), rng.normal(size=500).tolist()).named(0.1), dtype=bool)
        shares.append(named[20:].sum() / max(1, named.sum()))
        found.append(named[:20].mean())
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / 20
    assert np.mean(found) > 0.8


def test_p_values_of_those_measured_and_none_for_the_others():
    found = judged([3.0, None, 0.5], [1.0, 2.0, 3.0, 4.0])
    # Of 4 nulls 2 are at least 3, all are at least .5.
    assert found.p == (pytest.approx(3 / 5), None, 1.0)
    assert found.q[1] is None and found.named(0.05) == [False, None, False]


def test_how_many_must_stand_out_together():
    # The smallest p is 1/101; k of 60 with it are named when 1/101 <= .05 k / 60, so from k = 11.88 on.
    assert least_named(60, 100, 0.05) == 12
    assert (
        benjamini_hochberg([1 / 101] * 12 + [1.0] * 48)[0] <= 0.05 < benjamini_hochberg([1 / 101] * 11 + [1.0] * 49)[0]
    )
    assert least_named(10, 1000, 0.05) == 1


def test_more_ordinary_prompts_are_drawn_where_captions_stand_above_all_and_are_too_few():
    """Of 60 captions with a smallest p of 1/101, 12 must have it together; see above."""
    for above, needed in ((0, False), (1, True), (11, True), (12, False)):
        found = judged([2.0] * above + [0.5] * (60 - above), [1.0] * 100)
        assert more_needed(found, 100, 0.05) is needed
    assert not more_needed(judged([None, None], [1.0] * 100), 100, 0.05)


def test_the_false_discovery_rate_holds_where_more_are_drawn():
    """Nothing is memorised, so every audit that names a caption is wrong: as many as the rate, and three deviations."""
    rng, audits, wrong = np.random.default_rng(5), 1500, 0
    for _ in range(audits):
        scores, nulls, count = rng.normal(size=30).tolist(), rng.normal(size=800).tolist(), 100
        while more_needed(found := judged(scores, nulls[:count]), count, 0.05) and count < 800:
            count *= 2
        wrong += any(found.named(0.05))
    assert wrong <= 0.05 * audits + 3 * (audits * 0.05 * 0.95) ** 0.5


def test_recovery_worked_by_hand():
    found = recovery(torch.tensor([1.0, 0, 4, 8]), torch.tensor([[4.0, 6], [4, 6], [4, 4], [2, 6]]))
    assert found.tolist() == pytest.approx([1 - 1 / 5, 1, 0, 1 - 8 / 4])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_recoveries_of_a_denoiser_worked_by_hand(kind: Any):
    """The network gives s (1, 1, 1, 1) with the word of strength s, and 0 with an unknown one.

    epsilon: D - z = L (n - s) at level L. flow: the velocity n - z in the place of n, and L / (1 + L) of L. v: with 0,
    D - z = (z + L n) / (1 + L^2) - z, and with s it lies s L / sqrt(1 + L^2) below that.
    """
    model = Scripted(prediction_type=kind)
    noise = model.noise(3, 2)
    z = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 1.0, 3.0]]).reshape(2, 1, 2, 2)
    others = [model.encode("unknown"), model.encode("w1")]
    found = recoveries(model, [model.encode("w2"), model.encode("w0.5")], others, z, noise)
    for image, strength, value in zip(z.flatten(1).numpy(), (2.0, 0.5), found.tolist(), strict=True):
        shares = []
        for n in noise.flatten(1).numpy():
            for level in LEVELS:
                without, moved = {
                    "epsilon": (level * n, level),
                    "flow": ((n - image) * level / (1 + level), level / (1 + level)),
                    "v_prediction": ((image + level * n) / (1 + level**2) - image, level / (1 + level**2) ** 0.5),
                }[kind]
                own, unknown, one = (((without - moved * s) ** 2).sum() for s in (strength, 0, 1))
                shares.append(1 - own / ((unknown + one) / 2))
        assert value == pytest.approx(np.mean(shares), abs=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_model_that_knows_one_image_draws_it(kind: Any):
    image = torch.tensor([1.0, -2.0, 0.5, 0.0]).reshape(1, 1, 2, 2)

    class Sure(Scripted):
        def __call__(self, x, sigma, conditioning):
            return image.expand_as(x)

    model = Sure(prediction_type=kind)
    latents = drawn(model, model.encode("w1"), model.noise(0, 3), 1.0 if kind == "flow" else 14.6)
    assert torch.allclose(latents, image.expand(3, -1, -1, -1), atol=1e-5)
    levels = drawing_levels(14.6, "epsilon")
    assert levels[0] == pytest.approx(14.6) and levels[-1] == 0 and levels == sorted(levels, reverse=True)


def test_gain_worked_by_hand():
    assert gain(0.8, 0.3) == pytest.approx(0.5)
    assert gain(0.8, -0.3) == pytest.approx(0.8)
    assert gains([0.4, None, -0.2], [0.1, 0.3, -0.5]) == [pytest.approx(0.3), None, -0.2]


def test_ordinary_prompts_are_recombined_from_the_captions_where_they_can_be():
    captions = [caption for caption, _ in world.ordinary_captions(60, seed=3)]
    entries = [Entry(str(n), caption) for n, caption in enumerate([*captions, " "])]
    made = ordinary_for(entries, 150, lambda count: ["other"] * count)
    assert made == recombined(captions, 152)  # two more, that images are denoised with
    assert not set(made) & set(captions)
    assert ordinary_for(entries[:2], 150, lambda count: ["other"] * count) == ["other"] * 152


def test_of_many_captions_some_are_recombined_and_none_of_the_others_comes_out(monkeypatch: pytest.MonkeyPatch):
    captions = [caption for caption, _ in world.ordinary_captions(240, seed=3)]
    made = recombined(captions[::4], 152)
    captions[1:3] = made[3], made[7].upper()  # among those that are not recombined
    monkeypatch.setattr("sd_dejavu.training.audit.RECOMBINED", 60)
    found = ordinary_for([Entry(str(n), caption) for n, caption in enumerate(captions)], 150, lambda count: [])
    given = {caption.casefold() for caption in captions}
    assert found == [prompt for prompt in made if prompt.casefold() not in given]
    assert made[3] not in found and made[7] not in found and made[0] in found


# ------------------------------------------------------------------------------------- the training set


def test_images_are_cut_in_the_middle_as_trainers_do():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    found = as_trained([file.getvalue()], 8, 8)
    assert found.shape == (1, 3, 8, 8)
    assert float(found.min()) == 1


def image_set(count: int, captions: Sequence[str] | None = None):
    images = torch.stack([torch.from_numpy(np.asarray(world.draw_scene(s), dtype=np.float32)) for s in scenes(count)])
    names = [f"{n:02d}.png" for n in range(count)]
    told = list(captions or [f"image {n}" for n in range(count)])
    return from_images(images.permute(0, 3, 1, 2) / 255, told, names, Grey())


def scenes(count: int, seed: int = 9000) -> list[world.Scene]:
    return [world.ordinary(np.random.default_rng(seed + n))[1] for n in range(count)]


def test_exact_copies_follow_their_image_and_cases_are_told_apart_by_caption_and_image():
    reference = image_set(3, ["a cat", "a cat", "a dog"])
    reference = replace(reference, details={"copies": [{"name": "again.png", "caption": "two", "of": "00.png"}]})
    entries = entries_of(reference)
    assert [(e.image, e.caption, e.row) for e in entries] == [
        ("00.png", "a cat", 0),
        ("again.png", "two", 0),
        ("01.png", "a cat", 1),
        ("02.png", "a dog", 2),
    ]
    assert len(Subject([*entries, entries[0]], reference).cases) == 4
    assert [c.caption for c in Subject([Entry("line 1", "a"), Entry("line 2", "a")]).cases] == ["a"]


def test_samples_keep_their_order_and_depend_on_the_seed_alone():
    entries = [Entry(str(n), "a") for n in range(50)]
    first = sampled(entries, 10, 1)
    assert first == sampled(entries, 10, 1) != sampled(entries, 10, 2)
    assert [int(e.image) for e in first] == sorted(int(e.image) for e in first)
    assert sampled(entries, 0, 1) == sampled(entries, 99, 1) == entries
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread("abc", 5) == list("abc")


def write_lora(path: Path) -> Path:
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, path)
    return path


@pytest.mark.parametrize(
    ("names", "epochs"),
    [
        (["cat-000002", "cat-000004", "cat"], [2, 4, 6]),
        (["cat", "cat-000010", "cat-000009"], [9, 10, 11]),
        (["lora-epoch-1", "lora-epoch-2"], [1, 2]),
        (["one"], [1]),
        (["one", "two", "three3"], [1, 2, 3]),
    ],
)
def test_epochs_of_saved_loras(names: list[str], epochs: list[int], tmp_path: Path):
    for name in names:
        write_lora(tmp_path / f"{name}.safetensors")
    save_file({"latents": torch.zeros(1)}, tmp_path / "latents.safetensors")  # trainers keep such beside them
    found = lora_files([tmp_path])
    assert [file.epoch for file in found] == epochs
    if "cat" in names:
        assert found[-1].path.stem == "cat"


def test_what_is_no_lora_is_told(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no LoRA .*gone"):
        lora_files([tmp_path / "gone.safetensors"])
    with pytest.raises(ValueError, match="holds no LoRAs"):
        lora_files([tmp_path])
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no LoRA"):
        lora_files([tmp_path / "a.safetensors"])
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=r"two LoRAs are called b\.safetensors"):
        lora_files([write_lora(tmp_path / "b.safetensors"), write_lora(tmp_path / "x" / "b.safetensors")])
    with pytest.raises(ModelError, match=r"cannot be merged|holds nothing"):
        load(lora=str(tmp_path / "b.safetensors"))
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        load(lora=str(tmp_path / "b.pt"))


def test_suggestions_name_what_can_be_done():
    row = Row("a.png", "a cat", flagged=True, copies=2, drawn=4, word="cat")
    assert suggestion(replace(row, flagged=False, copies=0)) == ""
    assert "'cat'" in suggestion(row) and "re-caption" in suggestion(row)
    assert "b.png" in suggestion(replace(row, near_duplicates=("b.png",)))
    assert "one of the 3 equal images" in suggestion(replace(row, duplicates=("b.png", "c.png")))
    assert "40 times an epoch" in suggestion(replace(row, repeats=40))
    assert "no image drawn" in suggestion(replace(row, copies=0))
    assert "does not stand out" in suggestion(replace(row, flagged=False))


# ------------------------------------------------------------------------------------------------ tasks


class Scripted(LinearDenoiser):
    """A word 'wN' has the strength N; its images are as large as its latents."""

    image_size = (2, 2)

    def encode(self, prompt: str):
        from hand_made import encoder

        if prompt == "too long":
            raise ValueError("the prompt is too long")
        return encoder({w: float(w[1:]) for w in prompt.split() if w[0] == "w"})(prompt)

    def latents_of(self, images):
        return images.mean(1, keepdim=True)


class Remembering(Scripted):
    """Knows the images of some prompts; of any other, that its pixels lie a fifth around a grey that the prompt tints.

    So D = m + (x - m) / (1 + 25 sigma^2) with the grey m, and with a known prompt D is its image.
    """

    image_size = (8, 8)
    latent_shape = (3, 8, 8)

    def __init__(self, images: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._images, self._prompts = images, list[str]()

    def encode(self, prompt: str):
        self._prompts.append(prompt)
        found = super().encode("w1")
        return replace(found, rows=torch.full_like(found.rows, len(self._prompts) - 1.0), prompt=prompt)

    def __call__(self, x, sigma, conditioning):
        prompts = [self._prompts[int(row[0, 0])] for row in conditioning.rows.expand(len(x), -1, -1)]
        return torch.stack([self._denoised(*one) for one in zip(x, sigma, prompts, strict=True)])

    def _denoised(self, x: torch.Tensor, sigma: torch.Tensor, prompt: str) -> torch.Tensor:
        if prompt in self._images:
            return self._images[prompt]
        middle = 0.5 + 0.01 * (len(prompt) + sum(map(ord, prompt)) % 7 if prompt else 0) * torch.tensor([1.0, 0, -1])
        return middle[:, None, None] + (x - middle[:, None, None]) / (1 + 25 * sigma**2)

    def noise(self, seed, images):
        return torch.randn((images, *self.latent_shape), generator=torch.Generator().manual_seed(seed))

    def latents_of(self, images):
        return images

    def images_of(self, latents):
        return latents


def coarse_images(count: int) -> torch.Tensor:
    """[count, 3, 8, 8] of four even squares each."""
    rng = torch.Generator().manual_seed(1)
    squares = torch.rand(count, 1, 2, 2, generator=rng)
    return squares.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


CAPTIONS = [f"caption {n}" for n in range(61)]
ORDINARY = [f"ordinary {n}" for n in range(95)] + [f"copy {n}" for n in range(5)]
OTHER = ["other 1", "other 2"]


def remembers_some() -> Remembering:
    """Of the captions fourteen; and it draws the first one's image of the last five ordinary prompts as well."""
    images = coarse_images(14)
    return Remembering({**dict(zip(CAPTIONS[:14], images, strict=True)), **dict.fromkeys(ORDINARY[95:], images[0])})


def run_audit(
    folder: Path, engine: Any = one_process, wanted: AuditSettings = AuditSettings(partition=25, worst=0)
) -> Audit:
    """From the captions alone."""
    subject = Subject([Entry(f"line {n}", caption) for n, caption in enumerate(CAPTIONS)])
    ledger, model = Ledger(folder, {"of": "this"}), remembers_some()
    return audit(subject, [], [*ORDINARY, *OTHER], lambda v: model, Work(ONE), ledger, wanted, engine)


def test_magnitudes_are_those_of_the_hand_made_model():
    """A word of strength s gives 2 s."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "JPEG")
    task = Task("captions", Variant(), 0, ("w1.5", "w50 y"), (file.getvalue(),) * 2, others=("w1",))
    assert [value["magnitude"] for value in Work(ONE)(Scripted(), task)] == pytest.approx([3.0, 100.0])


def test_captions_alone_are_measured_with_what_the_model_draws_of_them(tmp_path: Path):
    found = run_audit(tmp_path)
    assert found.counts == "recovery" and found.captions_alone and found.nulls == 95  # five copy the first caption's
    assert [row.flagged for row in found.rows] == [True] * 14 + [False] * 47
    assert all(row.recovery == pytest.approx(1, abs=0.02) for row in found.rows[:14])  # thumbnails are JPEG files
    # Fourteen of 61 have the smallest p of 1 / 96.
    assert found.rows[0].p_value == pytest.approx(1 / 96) and found.rows[0].q_value == pytest.approx(61 / 96 / 14)
    assert all(row.copies is None and row.similarity is None for row in found.rows)
    told = " ".join(notes(found))
    assert "captions only: what the model draws of each" in told and "LoRA" not in told


def test_ordinary_prompts_that_are_stranger_than_the_captions_are_told(tmp_path: Path):
    subject = Subject([Entry(f"line {n}", f"w{n % 7 + 1} x{n}") for n in range(40)])
    for name, strength, told in (("fitting", 1, False), ("strange", 20, True)):
        ordinary = [f"w{n % 7 + strength} z{n}" for n in range(99)]
        settings = AuditSettings(partition=25, worst=0)
        found = audit(subject, [], ordinary, lambda v: Scripted(), Work(ONE), Ledger(tmp_path / name, {}), settings)
        assert found.misfit is told
        assert any("stranger to this model than your captions" in note for note in notes(found)) is told
        assert as_json(found, "m", [])["misfit"] is told


def test_captions_that_cannot_be_measured_say_why(tmp_path: Path):
    entries = [Entry("a", "w9 cat"), Entry("b", "too long"), Entry("c", " "), Entry("d", "x")]
    ledger = Ledger(tmp_path, {})
    found = audit(Subject(entries), [], ["w1"] * 25, lambda v: Scripted(), Work(ONE), ledger, AuditSettings(worst=0))
    assert [row.why for row in found.rows] == [
        "",
        "the prompt is too long",
        "there is no caption",
        "both predictions are equal: the prompt acts on nothing",
    ]
    assert [row.flagged for row in found.rows[1:]] == [None] * 3
    with pytest.raises(ValueError, match="no captions"):
        audit(Subject([Entry("c", "")]), [], ["w1"], lambda v: Scripted(), Work(ONE), ledger)
    with pytest.raises(ValueError, match="none of the ordinary prompts"):
        audit(Subject(entries), [], ["x"], lambda v: Scripted(), Work(ONE), Ledger(tmp_path / "other", {}))


def test_borders_of_the_tasks_do_not_matter(tmp_path: Path):
    pieces = run_audit(tmp_path / "a", wanted=AuditSettings(partition=25, worst=0))
    whole = run_audit(tmp_path / "b", wanted=AuditSettings(partition=100, worst=0))
    assert pieces == whole
    with pytest.raises(ValueError, match="multiple of 25, not 30"):
        AuditSettings(partition=30)


def test_a_task_survives_a_table_row():
    task = Task("captions", Variant("a.safetensors", 0.5), 25, ("a", "b"), (b"\x00\xff", b"x"), True, 64, ("c",))
    assert Task.of_row(task.as_row()) == task


def test_images_that_a_model_remembers_are_named_and_its_copies_are_no_ordinary_prompts(tmp_path: Path):
    """Of 24 images the first six come back whole; ten ordinary prompts out of 140 draw one of them."""
    images = coarse_images(24)
    captions = [f"caption {n}" for n in range(24)]
    reference = from_images(images, captions, [f"{n:02d}" for n in range(24)], Grey())
    known = dict(zip(captions[:6], images[:6], strict=True))
    ordinary = [f"ordinary {n}" for n in range(130)] + [f"copy {n}" for n in range(10)]
    model, others = Remembering({**known, **dict.fromkeys(ordinary[130:], images[0])}), ["other 1", "other 2"]
    subject = Subject(entries_of(reference), reference, Grey())
    work, settings = Work(ONE), AuditSettings(worst=0, partition=25)
    found = audit(subject, [], [*ordinary, *others], lambda v: model, work, Ledger(tmp_path, {}), settings)
    assert found.counts == "recovery" and found.nulls == 100  # no more were needed
    assert [row.flagged for row in found.rows] == [True] * 6 + [False] * 18
    assert all(row.recovery == pytest.approx(1, abs=0.02) for row in found.rows[:6])  # thumbnails are JPEG files
    backwards = [*ordinary[::-1], *others]
    backwards = audit(subject, [], backwards, lambda v: model, work, Ledger(tmp_path / "b", {}), settings)
    assert backwards.nulls == 90  # of the first 100 ten copy the training set
    with pytest.raises(ValueError, match=r"of 10 ordinary prompts the model draws 10 as copies .* and 0 are too few"):
        audit(subject, [], [*ordinary[130:], *others], lambda v: model, work, Ledger(tmp_path / "c", {}), settings)


def test_drawn_images_that_hold_a_part_of_their_training_image_are_partly_copied(tmp_path: Path):
    """Three captions bring their image back mirrored, one its crop enlarged; the other four draw images of their own."""
    training = bundled.training_images()[:40]
    rng = np.random.default_rng(3)
    own = [torch.tensor(world.draw_scene(world.random_scene(rng))).permute(2, 0, 1) / 255 for _ in range(4)]
    crop = torch.nn.functional.interpolate(training[3][None, :, 16:48, :32], (64, 64), mode="bilinear")[0]
    drawn = [*training[:3].flip(-1), crop, *own]
    captions = [f"caption {n}" for n in range(40)]
    reference = from_images(training, captions, [f"{n:02d}" for n in range(40)], Grey())

    class Wordless(Remembering):
        """Without words, so that none is asked for, and on images of 64 x 64."""

        image_size, latent_shape = (64, 64), (3, 64, 64)

        def encode(self, prompt: str):
            return replace(super().encode(prompt), words=(), tokens=())

    model = Wordless(dict(zip(captions, drawn, strict=False)))
    subject = Subject(entries_of(reference), reference, Grey())
    ordinary = [f"ordinary {n}" for n in range(30)]
    work, settings = Work(Measurement(images=1, steps=2, guidance_scale=1.0)), AuditSettings(worst=40, partition=25)
    found = audit(subject, [], ordinary, lambda v: model, work, Ledger(tmp_path, {}), settings)
    assert [row.parts for row in found.rows[:8]] == [1] * 4 + [0] * 4
    assert [row.image for row in found.partly_copied] == ["00", "01", "02", "03"]
    assert all(row.part is not None and row.part.mirrored and row.part_drawn == 1 for row in found.rows[:3])
    assert found.rows[3].part.of_box == (0, 0.25, 0.5, 0.75) and found.rows[3].part.box == (0, 0, 1, 1)
    assert found.rows[3].part.name == "03"
    assert {verdict_of(row) for row in found.partly_copied} == {"Partly copied"}


# ----------------------------------------------------------------------------------- stopped and resumed


class Killed(BaseException):
    pass


def test_an_audit_that_is_killed_at_random_points_does_nothing_twice_and_finds_the_same(tmp_path: Path):
    unbroken = run_audit(tmp_path / "unbroken")
    rng, done = random.Random(4), []

    def mortal(tasks: Sequence[Task], load: Any, work: Any) -> Iterator[tuple[Task, list[Any]]]:
        for task, values in one_process(tasks, load, work):
            if rng.random() < 0.5:
                raise Killed
            done.append((task.kind, task.first))
            yield task, values

    for _ in range(100):
        try:
            found = run_audit(tmp_path / "broken", mortal)
            break
        except Killed:
            continue
    assert found == unbroken
    assert sorted(done) == sorted(set(done)) and len(done) == 3 * 2 + 4 * 2


def test_the_ledger_refuses_another_audit_and_repairs_what_is_broken(tmp_path: Path):
    run_audit(tmp_path)
    with pytest.raises(ValueError, match="another of"):
        Ledger(tmp_path, {"of": "that"})
    file = next(tmp_path.glob("*-captions-000000025.json"))
    whole = file.read_text()
    file.write_text(whole[:40])
    run_audit(tmp_path)
    assert file.read_text() == whole
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "holiday.jpg").touch()
    with pytest.raises(ValueError, match="is not an audit: move it away"):
        Ledger(tmp_path / "foreign", {})
    with pytest.raises(ValueError, match="is not an audit: move it away"):
        Ledger(tmp_path / "foreign", {}, restart=True)
    assert (tmp_path / "foreign" / "holiday.jpg").exists()


@pytest.mark.parametrize("text", ["null", "[]", "3", "{", "[" * 100_000])
def test_a_damaged_note_of_an_audit_is_refused(tmp_path: Path, text: str):
    Ledger(tmp_path, {"of": "this"})
    (tmp_path / "begun.json").write_text(text)
    with pytest.raises(ValueError, match=r"begun\.json is damaged \(.*\): remove that folder") as caught:
        Ledger(tmp_path, {"of": "this"})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_audit_begun_with_release_0_1_is_told_apart(tmp_path: Path):
    """Its note word by word, as the command line wrote it: what counted then was another thing."""
    entries, ordinary = [Entry("a.png", "a fox"), Entry("ü.png", "")], ["w1", "w2"]
    dataset = hashlib.sha256(b'["a.png", "a fox"]["\\u00fc.png", ""]').hexdigest()[:16]
    nulls = hashlib.sha256(b'["w1", "w2"]').hexdigest()[:16]
    (tmp_path / "begun.json").write_text(
        f'{{"model": "bundled", "base": "", "loras": [], "dataset": "{dataset}", "ordinary_prompts": "{nulls}", '
        '"dtype": "float32", "batch_size": 32, "prompt_weights": false, "partition": 100, "score": "first step", '
        '"images": 4, "steps": 50, "seed": 0, "guidance_scale": 7.5, "negative": "", "without": "empty prompt", '
        '"alpha": 0.01}'
    )
    host = {"model": "bundled", "base": "", "loras": (), "dtype": "float32", "batch_size": 32, "prompt_weights": False}
    with pytest.raises(ValueError, match="holds an audit with"):
        Ledger(tmp_path, identity(Subject(entries), ordinary, Measurement(), partition=100, **host))
    Ledger(tmp_path / "now", identity(Subject(entries), ordinary, Measurement(), partition=100, **host))
    tmp_path /= "now"
    less = identity(Subject(entries[:1]), ordinary, Measurement(images=2), partition=100, **host)
    with pytest.raises(ValueError, match="holds an audit with another dataset and images 4 instead of 2: go on as"):
        Ledger(tmp_path, less)


def test_a_lora_that_changes_nothing_is_not_found_clean(tmp_path: Path):
    """As where a host has passed it over: every gain is 0, and that is no finding."""
    reference = from_images(torch.rand(3, 3, 8, 8), ["a", "b", "c"], ["a", "b", "c"], Grey())
    subject, prompts = Subject(entries_of(reference), reference, Grey()), [f"ordinary {n}" for n in range(30)]
    ledger = Ledger(tmp_path, {"of": "this"})
    with pytest.raises(ValueError, match="just what the base model does, so there is nothing to judge"):
        audit(subject, [], prompts, lambda variant: Remembering({}), Work(ONE), ledger, has_base=True)


def test_other_images_under_the_same_names_are_another_training_set():
    def told(images: torch.Tensor) -> Any:
        reference = from_images(images, ["a fox", "a cat"], ["a.png", "b.png"], Grey())
        return identity(Subject(entries_of(reference), reference), ["w"], Measurement())["dataset"]

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert told(images) == told(images.clone()) != told(images.flip(-1))


PNG, JPEG = "iVBORw0KGgo=", "/9j/4AAQ"
FOUND = {
    "captions": {"magnitude": 1.0, "recovery": 0.5},
    "images": {"images": [], "word": None},
    "drawn": {"image": JPEG},
    "stand-ins": {"image": JPEG},
}


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        ("captions", "text"),
        ("captions", None),
        ("captions", {}),
        ("captions", {"magnitude": "1", "recovery": 0.5}),
        ("captions", {"magnitude": True, "recovery": 0.5}),
        ("captions", {"magnitude": -1.0, "recovery": 0.5}),
        ("captions", {"magnitude": 10**400, "recovery": 0.5}),
        ("captions", {"magnitude": float("nan"), "recovery": 0.5}),
        ("captions", {"magnitude": 1.0}),
        ("captions", {"magnitude": 1.0, "recovery": []}),
        ("captions", {"magnitude": 1.0, "recovery": None}),
        ("captions", {"magnitude": 1.0, "recovery": float("-inf")}),
        ("captions", {"why": 3}),
        ("images", {"word": None}),
        ("images", {"images": PNG, "word": None}),
        ("images", {"images": ["not an image"], "word": None}),
        ("images", {"images": [PNG], "word": 3}),
        ("drawn", {}),
        ("stand-ins", {"image": "/9j/"[:3]}),
        ("drawn", {"image": PNG}),
        ("drawn", {"image": JPEG, "why": "both"}),
    ],
)
def test_results_that_cannot_be_true_are_neither_kept_nor_taken(tmp_path: Path, kind: Any, second: Any):
    task = Task(kind, Variant(), 0, ("a", "b"))
    ledger = Ledger(tmp_path, {})
    with pytest.raises(ValueError, match="is not what is found of a prompt"):
        ledger.keep(task, [FOUND[kind], second])
    ledger.keep(task, [FOUND[kind], FOUND[kind]])
    (file,) = tmp_path.glob(f"*-{kind}-*.json")
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "values": [FOUND[kind], second]}))
    with pytest.raises(
        ValueError, match=r"is not what is found of a prompt.*: delete it, and this part is done again"
    ) as caught:
        ledger.result(task)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("values"),
        lambda document: document["values"].pop(),
        lambda document: document.update(values="ab"),
        lambda document: document.update(prompts=3),
        lambda document: document.clear(),
    ],
)
def test_a_task_with_too_few_values_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object]):
    run_audit(tmp_path)
    file = next(tmp_path.glob("*-captions-000000025.json"))
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"000000025\.json is damaged \(it "):
        run_audit(tmp_path)


def test_an_autoencoder_that_gives_nan_is_not_measured(tmp_path: Path):
    class Broken(Scripted):
        def latents_of(self, images):
            return super().latents_of(images) * torch.nan

    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "PNG")
    task = Task("captions", Variant(), 0, ("w1", "w2"), (file.getvalue(),) * 2)
    values = Work(ONE)(Broken(), task)
    assert values == [{"why": "not measured: the model gives NaN or infinity"}] * 2
    Ledger(tmp_path, {}).keep(task, values)


def test_a_second_process_is_told_who_audits_there(tmp_path: Path):
    ledger = Ledger(tmp_path, {"of": "this"})
    with ledger.held(), pytest.raises(ValueError, match=f"{tmp_path} is being written to by process {os.getpid()} on"):
        run_audit(tmp_path)
    assert run_audit(tmp_path).nulls == 95
    assert not (tmp_path / "dejavu.lock").exists()


@pytest.fixture(scope="module")
def caption_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 memorised captions of the bundled model and 20 ordinary ones."""
    often = [p.caption for p in bundled.pairs() if p.repetitions >= 300 and p.kind == "hard"][:10]
    path = tmp_path_factory.mktemp("list") / "captions.txt"
    path.write_text("\n".join([*often, *bundled.held_out_ordinary(20, 6001)]))
    return path


def command(captions: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--nulls", "100", "--images", "1", "--partition", "25", "--worst", "0"]
    return ["audit", "--dataset", str(captions), "--out", str(out), *sizes, *more]


@pytest.fixture(scope="module")
def unbroken(caption_list: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert main(command(caption_list, out)) == 0
    return out


def test_memorised_captions_are_named_from_a_list_alone(unbroken: Path):
    document = json.loads((unbroken / "audit.json").read_text())
    named = [row["flagged"] for row in document["rows"]]
    assert sum(named[:10]) >= 9
    assert sum(named[10:]) <= 2
    assert document["counts"] == "recovery" and document["rows"][0]["copies"] is None
    import pyarrow.parquet as pq

    assert pq.read_table(unbroken / "audit.parquet").to_pylist() == document["rows"]


def write_shards(folder: Path, captions: Sequence[str | None], **more: Sequence[Any]) -> Path:
    """Parquet files of 13 rows each."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    for number, start in enumerate(range(0, len(captions), 13)):
        columns = {"caption": captions, **more}
        table = pa.table({name: values[start : start + 13] for name, values in columns.items()})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=5)
    return folder


def test_shards_of_captions_are_audited_as_a_list_is(caption_list: Path, unbroken: Path, tmp_path: Path):
    captions = caption_list.read_text().splitlines()
    shards = write_shards(tmp_path / "shards", captions, url=captions)
    assert main(command(shards, tmp_path / "out")) == 0
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    names = [f"train-{n // 13:05d}.parquet/row-{n % 13}" for n in range(30)]
    assert [row.pop("image") for row in document["rows"]] == names
    listed = json.loads((unbroken / "audit.json").read_text())["rows"]
    assert document["rows"] == [{name: value for name, value in row.items() if name != "image"} for row in listed]


def test_shards_with_images_are_a_training_set_and_what_is_wrong_with_one_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    captions, scenes_of = ["a red boat", "a fox", None, "a hut"] * 4, scenes(16)
    files = []
    for scene in scenes_of:
        file = io.BytesIO()
        Image.fromarray(world.draw_scene(scene)).save(file, "PNG")
        files.append(file.getvalue())
    entries = entries_of(built_from(write_shards(tmp_path / "both", captions, image=files), tmp_path / "set"))
    assert [entry.caption for entry in entries] == [caption or "" for caption in captions]
    assert entries[14].image == "train-00001.parquet/row-1"
    shards = write_shards(tmp_path / "alone", captions)
    (shards / "train-00001.parquet").write_bytes(b"PAR1")
    assert main(command(shards, tmp_path / "out")) == 2
    assert "train-00001.parquet: not a sound Parquet file" in capsys.readouterr().err
    assert main(command(shards, tmp_path / "out", "--column", "prompt")) == 2
    assert "no column 'prompt' among 'caption'" in capsys.readouterr().err


def built_from(source: Path, out: Path) -> ReferenceSet:
    return build(source, out, Grey())


def test_images_are_read_when_their_task_is_done(tmp_path: Path):
    """Of 60 images in tasks of 25: none is held before, nor by a task that is over."""
    reference, read = image_set(60), list[int]()

    class Watched(Sequence[bytes]):
        def __len__(self) -> int:
            return len(reference.thumbnails)

        def __getitem__(self, number: Any) -> Any:
            read.append(number)
            return reference.thumbnails[number]

    subject = Subject(entries_of(reference), replace(reference, thumbnails=Watched()), Grey())
    seen = []

    def engine(tasks: Sequence[Task], load: Any, work: Any) -> Iterator[tuple[Task, list[Any]]]:
        for task in tasks:
            read.clear()
            values = work(Scripted(), task)
            if task.kind == "captions":
                seen.append(sorted(read))
            yield task, values

    settings = AuditSettings(worst=0, partition=25)
    audit(subject, [], ["w1"] * 40, lambda v: Scripted(), Work(ONE), Ledger(tmp_path, {}), settings, engine)
    assert seen == [list(range(25)), list(range(25, 50)), list(range(50, 60))]


def test_many_tasks_are_sent_to_a_cluster_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ray")
    sent = []

    class Data:
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            sent.append(len(rows))
            self._rows = rows

        def map(self, worker: Any, fn_constructor_args: Any, **more: Any) -> Data:
            return Data.of([*map(worker(*fn_constructor_args), self._rows)])

        @classmethod
        def of(cls, rows: list[dict[str, Any]]) -> Data:
            made = cls.__new__(cls)
            made._rows = rows[::-1]  # as they come from a cluster: in any order
            return made

        def iter_rows(self) -> Iterator[dict[str, Any]]:
            return iter(self._rows)

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.data.from_items", lambda rows, **more: Data(rows))
    monkeypatch.setattr("sd_dejavu.training.engines.SENT_AT_ONCE", 3)
    file = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(file, "JPEG")
    tasks = [
        Task("captions", Variant(), 25 * n, (f"w{n + 1}",), Chosen([file.getvalue()], [0]), others=("w1",))
        for n in range(8)
    ]
    work, model = Work(ONE), Scripted()
    found = sorted(on_ray(Cluster())(tasks, lambda v: model, work), key=lambda pair: pair[0].first)
    assert sent == [3, 3, 2]
    assert found == [(task, work(model, task)) for task in tasks]


def in_a_process(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    return subprocess.Popen([sys.executable, "-m", "sd_dejavu", *arguments], env=environment, stdout=subprocess.DEVNULL)


def test_a_process_that_is_killed_loses_nothing(caption_list: Path, unbroken: Path, tmp_path: Path):
    out, rng = tmp_path / "out", random.Random(5)
    for kept in (2, 5):
        process = in_a_process(command(caption_list, out))
        while len(list(out.glob("tasks/*-*-*.json"))) < kept:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "audit.json").exists()
    before = {file: file.stat().st_mtime_ns for file in out.glob("tasks/*-*-*.json")}
    assert main(command(caption_list, out)) == 0
    assert (out / "audit.json").read_bytes() == (unbroken / "audit.json").read_bytes()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert main(command(caption_list, out, "--seed", "1")) == 2  # another audit in the same folder


def test_a_command_that_is_stopped_says_that_it_goes_on(
    caption_list: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*arguments: Any) -> Audit:
        raise KeyboardInterrupt

    monkeypatch.setattr("sd_dejavu.cli.audit.audit", stopped)
    assert main(command(caption_list, tmp_path)) == 130
    assert "stopped: the same command goes on where it stood" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.lock"))


def ray_workers() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_a_cluster_finds_the_same_and_a_lost_worker_loses_nothing(caption_list: Path, unbroken: Path, tmp_path: Path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    process = in_a_process(command(caption_list, out, "--engine", "ray", "--workers", "1"))
    while not list(out.glob("tasks/*-*-*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = ray_workers()
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert len(list(out.glob("tasks/*-*-*.json"))) < 12  # it was not the last task
    assert process.wait() == 0
    assert (out / "audit.json").read_bytes() == (unbroken / "audit.json").read_bytes()


# ---------------------------------------------------------------------------------------- whole LoRAs


def write_set(folder: Path, numbers: Sequence[int]) -> Path:
    folder.mkdir(parents=True)
    for number in numbers:
        caption, scene, _ = world.ordinary(np.random.default_rng(9000 + number), "sentence")
        Image.fromarray(world.draw_scene(scene)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption)
    return folder


def finetuned(data: Path, out: Path, *more: str) -> Path:
    recipe = ["--rank", "16", "--learning-rate", "2e-3", "--batch-size", "8", "--filter", "none"]
    assert main(["finetune", "--dataset", str(data), "--out", str(out), *recipe, *more]) == 0
    return out


def audited(data: Path, out: Path, *more: str) -> dict[str, Any]:
    sizes = ["--nulls", "200", "--images", "2", "--steps", "25", "--strength-steps", "1", "--worst", "8"]
    assert main(["audit", "--dataset", str(data), "--out", str(out), *sizes, *more]) == 0
    return json.loads((out / "audit.json").read_text())


def test_images_that_a_lora_was_overfitted_to_are_named(tmp_path: Path):
    """Eight images, shown 200 times each; eight more lie in the folder and were never shown."""
    write_set(tmp_path / "set" / "40_shown", range(8))
    loras = finetuned(tmp_path / "set", tmp_path / "loras", "--epochs", "5", "--save-every", "5")
    data = write_set(tmp_path / "audited", range(16))
    document = audited(data, tmp_path / "out", "--lora", str(loras / "lora.safetensors"))
    named = {row["image"] for row in document["rows"] if row["flagged"]}
    shown = {f"{n:03d}.png" for n in range(8)}
    assert len(named & shown) >= 5
    assert len(named - shown) <= 1  # a rate of 5% is kept in the mean, not in every audit
    copied = {row["image"] for row in document["rows"] if row["copies"]}
    assert copied and copied <= named & shown


@pytest.mark.figures
def test_an_overfitted_lora_is_named_with_its_images_and_its_epoch(tmp_path: Path):
    """Eight images, shown 40 times in each of five epochs; eight more lie in the folder and were never shown."""
    write_set(tmp_path / "set" / "40_shown", range(8))
    loras = finetuned(tmp_path / "set", tmp_path / "loras", "--epochs", "5")
    data = write_set(tmp_path / "audited", range(16))
    files = [loras / f"lora-epoch-{n:04d}.safetensors" for n in (1, 2)] + [loras / "lora.safetensors"]
    document = audited(data, tmp_path / "out", "--lora", *map(str, files))
    named = {row["image"] for row in document["rows"] if row["flagged"]}
    shown = {f"{n:03d}.png" for n in range(8)}
    assert len(named & shown) >= 5
    assert len(named - shown) <= 1  # a rate of 5% is kept in the mean, not in every audit
    copied = {row["image"] for row in document["rows"] if row["copies"]}
    assert copied and copied <= named & shown
    # The truth about the epochs: are drawn images copies? The statistic may tell earlier, not later.
    truth = {point["epoch"]: copies_drawn(file, data) for file, point in zip(files, document["epochs"], strict=True)}
    assert truth[1] == 0 and truth[3] > 0
    assert 1 < document["begins"] <= next(epoch for epoch, copies in truth.items() if copies)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"memorisation starts at epoch {document['begins']}" in page and page.count("data:image/png") >= 16
    assert (tmp_path / "out" / "drawn" / "row-001-image-1.png").is_file()


def copies_drawn(lora: Path, data: Path) -> int:
    """How many of the eight captions shown come out as copies, by a path of its own: the pipeline of diffusers."""
    from diffusers import DiffusionPipeline

    from sd_dejavu.quiet import quiet

    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(bundled.FOLDER, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(torch.float32)
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    hits = 0
    for number in range(8):
        caption = (data / f"{number:03d}.txt").read_text()
        noise = torch.Generator().manual_seed(number)
        made = pipeline(caption, num_inference_steps=25, generator=noise, output_type="pt").images
        own = torch.from_numpy(np.asarray(Image.open(data / f"{number:03d}.png"), dtype=np.float32) / 255)
        hits += float(grey_correlation(made, own.permute(2, 0, 1)[None])[0, 0]) >= COPY_THRESHOLD
    return hits


@pytest.mark.figures
def test_a_healthy_lora_is_not_named(tmp_path: Path):
    """64 images, each shown three times."""
    data = write_set(tmp_path / "set", range(64))
    loras = finetuned(data, tmp_path / "loras", "--epochs", "3", "--save-every", "3")
    document = audited(data, tmp_path / "out", "--lora", str(loras / "lora.safetensors"), "--worst", "4")
    assert not [row for row in document["rows"] if row["flagged"] or row["copies"]]
    assert document["sentence"].startswith("None of 64 training images is named")


def test_a_merged_lora_is_the_pipelines_own(tmp_path: Path):
    """Against diffusers with the LoRA as an adapter, at a strength."""
    data = write_set(tmp_path / "set", range(8))
    lora = finetuned(data, tmp_path / "loras", "--steps", "3") / "lora.safetensors"
    from diffusers import DiffusionPipeline

    from sd_dejavu.quiet import quiet

    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(bundled.FOLDER, safety_checker=None).to(torch.float32)
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="one")
    pipeline.set_adapters("one", 0.5)
    merged, plain = load(lora=str(lora), lora_strength=0.5), load()
    x, sigma = merged.noise(0, 1) * 10, torch.tensor([10.0])
    conditioning = merged.encode("a red boat")
    t = merged.schedule.timestep(sigma)
    scaled = x / (1 + sigma**2).sqrt()
    output = pipeline.unet(scaled, t, encoder_hidden_states=conditioning.rows, return_dict=False)[0]
    own = merged._unet(scaled, t, encoder_hidden_states=conditioning.rows, return_dict=False)[0]
    base = plain._unet(scaled, t, encoder_hidden_states=conditioning.rows, return_dict=False)[0]
    assert torch.allclose(output, own, atol=1e-4)
    assert not torch.allclose(base, own, atol=1e-4)
    assert sorted(merged._unet.state_dict()) == sorted(plain._unet.state_dict())
    assert merged.fingerprint != plain.fingerprint


# --------------------------------------------------------------------------------------------- told


def page_of(found: Audit) -> str:
    return render_audit(AuditPage(found, "<model>", "<lora>", "<set>", {}, {"Seed": 0}))


def test_text_reaches_the_page_as_text():
    row = Row("<img src=x>", "<script>alert(1)</script>", 1.0, None, None, 1.0, 0.001, 0.01, True, word="<b>")
    found = Audit((row,), "recovery", 100, 0.05, 1, captions_alone=True, skipped=({"name": "<i>", "reason": "<u>"},))
    page = page_of(found)
    for told in ("<script", "<img src=x", "<model>", "<lora>", "<set>", "<i>", "<u>"):
        assert told not in page
    assert "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")


def test_the_finding_in_words():
    row = Row("a.png", "a", flagged=True, q_value=0.01, copies=1, drawn=2)
    found = Audit((row, replace(row, image="b.png", flagged=False, copies=0)), "gain", 200, 0.05, 3)
    assert sentence(found) == (
        "1 of 2 training images is named as memorised; of 2 that were drawn again, 1 came out as a copy"
    )
    # 2 captions at .05: the smallest p must be .025 at most, 1 / (39 + 1).
    assert any("at least 3 must stand out" in note and note.endswith("prompts to 39.") for note in notes(found))
    assert any("5%" in note for note in notes(found))
    strengths = tuple(Point(strength, None, 2, named, 0.1) for strength, named in ((0.25, 0), (0.5, 0), (1.0, 2)))
    epochs = tuple(Point(1.0, epoch, 2, named, 0.1) for epoch, named in ((2, 0), (4, 1), (6, 2)))
    told = notes(replace(found, strengths=strengths, epochs=epochs))
    assert "Of the strengths that were measured, up to a strength of 0.5 none is named." in told
    assert "Of the saved epochs, epoch 2 is the last of which none is named." in told
    liked = [replace(point, likeness=0.874) for point in (*strengths, *epochs)]
    told = notes(replace(found, strengths=tuple(liked[:3]), epochs=tuple(liked[3:])))
    cost = "is named, at 87% of the likeness to the training set's style."
    assert f"Of the strengths that were measured, up to a strength of 0.5 none {cost}" in told
    assert f"Of the saved epochs, epoch 2 is the last of which none {cost}" in told
    told = notes(replace(found, strengths=strengths[2:], epochs=epochs[1:]))
    assert "Of the strengths that were measured, captions are named at every strength." in told
    assert "Of the saved epochs, captions are named at the first." in told
    quiet = replace(found, rows=(replace(row, flagged=False, copies=None, drawn=0),), captions_alone=True)
    assert sentence(quiet) == "None of 1 captions is named as memorised"
    assert any("copies of a LoRA seldom stand out so" in note for note in notes(quiet))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--dataset", "nowhere"], "there is no folder or file nowhere"),
        (["--lora", "gone.safetensors", "--dataset", "x"], "there is no LoRA"),
        ([], "name the training set"),
        (["--dataset", "x", "--reference", "y"], "name the training set"),
        (["--dataset", "x", "--false-discovery-rate", "2"], "false discovery rate must be"),
    ],
)
def test_bad_input_is_told(more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["audit", "--out", str(tmp_path / "out"), *more]) == 2
    assert told in capsys.readouterr().err


def test_loads_are_of_the_variant(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("sd_dejavu.hosts.diffusers.audit.load", lambda *arguments: asked.append(arguments))
    load_one = Load("model", None, "cpu", "float32", False, "base")
    load_one(Variant("a.safetensors", 0.5))
    load_one(Variant(base=True))
    Load("model")(Variant(base=True))
    assert [(a[0], a[5], a[6]) for a in asked] == [
        ("model", "a.safetensors", 0.5),
        ("base", None, 1.0),
        ("model", None, 1.0),
    ]


def test_tables_without_a_single_caption_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, values in (("none", pa.array([], pa.string())), ("numbers", pa.array([1, 2]))):
        pq.write_table(pa.table({"caption": values}), tmp_path / f"{name}.parquet")
        dataset = ["--dataset", str(tmp_path / f"{name}.parquet")]
        assert main(["audit", *dataset, "--out", str(tmp_path / name)]) == 2
        assert "holds no captions: name the column of text that holds them" in capsys.readouterr().err
