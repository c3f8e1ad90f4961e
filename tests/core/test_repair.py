"""Repair of LoRAs: likeness and spectral channels by hand-worked numbers, files that are written, and whole repairs."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_audit import Remembering
from torch import Tensor

from sd_dejavu.cli.main import main
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.hosts.diffusers.repair import places_of
from sd_dejavu.kept import write_tensors
from sd_dejavu.reference.build import from_images
from sd_dejavu.reference.features import Grey
from sd_dejavu.report.repair_rows import sentence
from sd_dejavu.run.measure import Measurement
from sd_dejavu.training.audit import AuditSettings, LoraFile, Subject, audit, entries_of
from sd_dejavu.training.ledger import Ledger
from sd_dejavu.training.likeness import Style, distance, likeness, style
from sd_dejavu.training.lora_files import change, modules_of, read
from sd_dejavu.training.repair import KEPT, NOTE, Point, RepairSettings, best_of, file_called, repair
from sd_dejavu.training.spectral import Place, Update, agreement, channels
from sd_dejavu.training.tasks import Task, Variant, Work, one_process

# -------------------------------------------------------------------------------------------- likeness


def test_the_style_of_two_images_worked_by_hand():
    """Two images of one pixel with neighbours each: a black one, and one of .5 that falls to .25 on the right."""
    second = torch.tensor([[0.5, 0.25], [0.5, 0.5]]).expand(3, 2, 2)
    found = style([torch.zeros(3, 2, 2), second])
    assert found.mean.tolist() == [0.25] * 3 + [-0.125] * 3 + [0.0] * 3
    assert (
        found.covariance[0, 0] == 0.0625 and found.covariance[0, 3] == -0.03125 and found.covariance[3, 4] == 0.015625
    )
    with pytest.raises(ValueError, match="there are no images"):
        style([])


def test_where_in_an_image_something_is_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(3, 9, 9, generator=rng)
    image[:, -1], image[:, :, -1] = image[:, 0], image[:, :, 0]  # as on a torus
    moved = image[:, :-1, :-1].roll((3, 5), (1, 2))
    moved = torch.cat([moved, moved[:, :1]], 1)
    moved = torch.cat([moved, moved[:, :, :1]], 2)
    assert distance(style([image]), style([moved])) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_commuting_covariances_worked_by_hand():
    """sqrt(|m - n|^2 + sum (sqrt s - sqrt t)^2): 3^2 + 4 (1 - 3)^2 = 25."""
    a = Style(torch.zeros(9).double(), torch.diag(torch.tensor([1.0] * 4 + [2.0] * 5)).double())
    b = Style(torch.tensor([3.0] + [0.0] * 8).double(), torch.diag(torch.tensor([9.0] * 4 + [2.0] * 5)).double())
    assert distance(a, b) == pytest.approx(5) and distance(b, a) == pytest.approx(5)
    assert distance(a, a) == pytest.approx(0, abs=1e-6)


def test_likeness_is_told_only_where_there_is_some():
    assert likeness(0.2, 0.2, 0.6) == 1 and likeness(0.6, 0.2, 0.6) == 0 and likeness(0.1, 0.2, 0.6) == 1.25
    assert likeness(0.6, 0.6, 0.6) is None and likeness(0.6, 0.9, 0.6) is None and likeness(0.0, 0.0, 0.0) is None


# -------------------------------------------------------------------------------------------- channels


def lora_of(update: Tensor, rank: int, name: str) -> dict[str, Tensor]:
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    return {
        f"{name}.lora_up.weight": (left[:, :rank] * values[:rank]).contiguous(),
        f"{name}.lora_down.weight": right[:rank].contiguous(),
        f"{name}.alpha": torch.tensor(float(rank)),
    }


SELF, CROSS = "lora_unet_a_attn1_to_q", "lora_unet_a_attn2_to_k"


@pytest.fixture
def update() -> Update:
    """The self-attention's weight is diag(4, 3, 2, 1); its update 6 e1 e1' + 2 e2 e4' + 5 e4 e4'."""
    own = torch.zeros(4, 4)
    own[0, 0], own[1, 3], own[3, 3] = 6, 0, 5
    own[1, 2] = 2
    tensors = {**lora_of(own, 3, SELF), **lora_of(torch.eye(4), 4, CROSS)}
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    places = {
        SELF: Place("unet", "a.attn1.to_q", weight),
        CROSS: Place("unet", "a.attn2.to_k", torch.eye(4)),
    }
    return Update(modules_of(tensors), places)


def of(tensors: dict[str, Tensor], name: str) -> Tensor:
    (module,) = [module for module in modules_of(tensors).modules if module.name == name]
    return change(torch.zeros(4, 4), module)


def test_channels_give_the_update_and_no_more():
    rng = torch.Generator().manual_seed(2)
    update = torch.randn(6, 2, generator=rng) @ torch.randn(2, 5, generator=rng)
    found = channels(update)
    assert len(found.values) == 2
    torch.testing.assert_close(found.left @ torch.diag(found.values) @ found.right, update)


def test_the_agreement_with_a_weights_first_directions_worked_by_hand():
    """Of diag(4, 3, 2, 1) the first half are e1 and e2. Left (e1 + e3) / sqrt 2, right e2: a half, and one."""
    left, right = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 1, 0, 0])
    found = channels(left.outer(right))
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert agreement(weight, found, 0.5).tolist() == pytest.approx([0.5])
    assert agreement(weight, found, 0.75).tolist() == pytest.approx([1.0])
    assert agreement(weight, found, 0.25).tolist() == pytest.approx([0.0])


def test_base_anchored_keeps_the_channels_that_agree(update: Update):
    """6 e1 e1' agrees; 2 e2 e3' does on one side alone, 5 e4 e4' on none: of three a third is one."""
    kept = of(update.tensors("base-anchored", 1 / 3), SELF)
    expected = torch.zeros(4, 4)
    expected[0, 0] = 6
    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)


def test_text_layers_and_strength_worked_by_hand(update: Update):
    whole = update.tensors("strength", 1.0)
    half = update.tensors("text layers", 0.5)
    torch.testing.assert_close(of(half, CROSS), 0.5 * torch.eye(4))
    for part in ("lora_up.weight", "lora_down.weight", "alpha"):
        assert half[f"{SELF}.{part}"] is whole[f"{SELF}.{part}"]  # what stays whole stays as it came
    assert not any(key.startswith(CROSS) for key in update.tensors("text layers", 0.0))
    quarter = update.tensors("strength", 0.25)
    torch.testing.assert_close(of(quarter, SELF), 0.25 * of(whole, SELF))
    torch.testing.assert_close(of(quarter, CROSS), 0.25 * torch.eye(4))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must be a share from 0 to 1"):
            update.tensors("strength", wrong)


@pytest.mark.parametrize("way", ["strength", "base-anchored"])
def test_every_kind_is_held_back_as_a_plain_lora_in_its_own_precision(way: Any):
    """A convolution's LoHa of rank 2 with a bias, a length of a norm, and a DoRA."""
    rng = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).half()

    tensors = {
        f"lora_unet_conv.hada_w{n}_{part}": rand(*shape)
        for n in (1, 2)
        for part, shape in (("a", (4, 2)), ("b", (2, 3 * 9)))
    }
    tensors |= {"lora_unet_conv.alpha": torch.tensor(2.0), "lora_unet_conv.diff_b": rand(4)}
    tensors |= {"lora_unet_norm.w_norm": rand(4)}
    tensors |= {
        "lora_unet_lin.lora_up.weight": rand(4, 1),
        "lora_unet_lin.lora_down.weight": rand(1, 3),
        "lora_unet_lin.dora_scale": rand(4, 1),
    }
    places = {
        "lora_unet_conv": Place("unet", "conv", torch.randn(4, 3, 3, 3, generator=rng)),
        "lora_unet_norm": Place("unet", "norm", torch.randn(4, generator=rng)),
        "lora_unet_lin": Place("unet", "lin", torch.randn(4, 3, generator=rng)),
    }
    contents = modules_of(tensors)
    found = Update(contents, places).tensors(way, 0.5)
    assert all(value.dtype == torch.float16 for key, value in found.items() if not key.endswith("alpha"))
    back = {module.name: module for module in modules_of(found).modules}
    assert not modules_of(found).unknown
    for module in contents.modules:
        weight = places[module.name].weight
        now, before = change(weight, back[module.name]), change(weight, module)
        if way == "strength":
            torch.testing.assert_close(now, 0.5 * before, atol=0.02, rtol=0.02)
        elif weight.dim() > 1:  # the channels that stay are whole ones: what is kept is orthogonal to what is not
            assert 0 < (now * now).sum() < (before * before).sum()
            assert abs(((before - now) * now).sum()) < 0.02 * (before * before).sum()
        else:
            torch.testing.assert_close(now, before)
    bias = 0.5 if way == "strength" else 1.0
    torch.testing.assert_close(back["lora_unet_conv"].parts["bias"], bias * tensors["lora_unet_conv.diff_b"])


def test_ways_that_can_do_nothing_are_known():
    text, own = Place("text_encoder", "a.q_proj", torch.eye(2)), Place("unet", "a.attn1.to_q", torch.eye(2))
    tensors = lora_of(torch.eye(2), 1, "x")
    assert not Update(modules_of(tensors), {"x": text}).acts("text layers")
    assert not Update(modules_of(tensors), {"x": own}).acts("text layers")
    assert Update(modules_of(tensors), {"x": own}).acts("strength")
    both = Update(modules_of({**tensors, **lora_of(torch.eye(2), 1, "y")}), {"x": own, "y": text})
    assert both.acts("text layers")
    with pytest.raises(ValueError, match="holds nothing for this model"):
        Update(modules_of(tensors), {})


def test_names_are_those_that_hosts_read():
    """A file of peft's names is written in kohya's where it is changed, and read back for the same weights."""
    model = load()
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"unet.{path}.lora_A.weight": torch.ones(1, 128), f"unet.{path}.lora_B.weight": torch.ones(128, 1)}
    contents, places = places_of(model, modules_of(tensors))
    (place,) = places.values()
    assert (place.part, place.name, place.reads_text) == ("unet", path, True)
    changed = Update(contents, places).tensors("strength", 0.5)
    assert {key.split(".")[0] for key in changed} == {f"lora_unet_{path.replace('.', '_')}"}
    again, there = places_of(model, modules_of(changed))
    (module,) = again.modules
    assert there[module.name].name == path
    torch.testing.assert_close(change(place.weight, module), torch.full((128, 128), 0.5))


def test_of_a_few_channels_one_is_left():
    """An eighth of 4 channels is half a one; without any there would be no file to draw with."""
    update = Update(modules_of(lora_of(torch.eye(4), 4, SELF)), {SELF: Place("unet", "a.attn1.to_q", torch.eye(4))})
    assert len(channels(of(update.tensors("base-anchored", 0.125), SELF)).values) == 1


def test_numbers_in_one_byte_are_held_back_in_two(tmp_path: Path):
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in lora_of(torch.eye(4), 1, SELF).items()}
    tensors[f"{SELF}.diff_b"] = torch.ones(4).to(torch.float8_e4m3fn)
    update = Update(modules_of(tensors), {SELF: Place("unet", "a.attn1.to_q", torch.eye(4))})
    write_tensors(tmp_path / "whole.safetensors", update.tensors("strength", 1.0))
    write_tensors(tmp_path / "half.safetensors", update.tensors("strength", 0.5))
    half = load_file(tmp_path / "half.safetensors")
    assert half[f"{SELF}.lora_up.weight"].dtype == torch.float16 and half[f"{SELF}.diff_b"].tolist() == [0.5] * 4
    torch.testing.assert_close(of(half, SELF), 0.5 * of(tensors, SELF), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        write_tensors(tmp_path / "bad.safetensors", {"a": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)})


# ------------------------------------------------------------------------------------------ whole repairs


class Tinted(Remembering):
    """Draws ordinary prompts ``tint`` brighter than the base model."""

    def __init__(self, images: dict[str, Tensor], tint: float) -> None:
        super().__init__(images)
        self._tint = tint

    def _denoised(self, x: Tensor, sigma: Tensor, prompt: str) -> Tensor:
        if prompt in self._images:
            return self._images[prompt]
        return self._tint + super()._denoised(x - self._tint, sigma, prompt)


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """A LoRA whose cross-attention brings six images back, and whose self-attention brings their brightness."""
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(6, 1, 2, 2, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    images = 0.6 + 0.4 * images
    captions = [f"caption {n}" for n in range(6)]
    reference = from_images(images, captions, captions, Grey())
    lora = tmp_path / "lora.safetensors"
    save_file({**lora_of(torch.eye(4), 2, SELF), **lora_of(torch.eye(4), 2, CROSS)}, lora, {"ss_output_name": "mine"})

    def loaded(variant: Variant) -> Tinted:
        held = (
            {}
            if variant.base
            else {m.name: change(torch.zeros(4, 4), m) for m in read(Path(variant.lora or "")).modules}
        )
        recalls = CROSS in held and float(held[CROSS].norm()) > 0.9  # sqrt 2 at full strength
        strength = float(held[SELF].norm()) / 2**0.5 if SELF in held else 0.0
        return Tinted(dict(zip(captions, images, strict=True)) if recalls else {}, 0.3 * strength)

    def places(contents: Any) -> Any:
        return contents, {
            SELF: Place("unet", "a.attn1.to_q", torch.eye(4)),
            CROSS: Place("unet", "a.attn2.to_k", torch.eye(4)),
        }

    return {
        "subject": Subject(entries_of(reference), reference, Grey()),
        "lora": lora,
        "out": tmp_path / "repaired.safetensors",
        "ordinary": [f"ordinary {n}" for n in range(10)],
        "load": loaded,
        "places": places,
        "work": Work(Measurement(images=1, steps=4, guidance_scale=1)),
        "folder": tmp_path / "kept",
    }


def test_a_lora_that_copies_is_repaired_at_no_cost_in_likeness(world: dict[str, Any]):
    found = repair(**world, wanted=RepairSettings(captions=4))
    assert found.before.copies == found.before.drawn == 4 and found.before.likeness == 1
    assert (found.after.way, found.after.kept, found.after.copies) == ("text layers", 0.5, 0)  # .5 sqrt 2 < .9
    assert found.after.likeness == pytest.approx(1) and found.reached
    course = {(point.way, point.kept): point for point in found.curve}
    assert len(found.curve) == 1 + sum(len(kept) for kept in KEPT.values())
    assert course["strength", 0.8].copies == 4 and course["strength", 0.5].copies == 0
    assert 0.3 < (course["strength", 0.5].likeness or 0) < 0.7  # half of the brightness
    tensors = load_file(world["out"])
    assert set(tensors) == set(load_file(world["lora"]))
    torch.testing.assert_close(of(tensors, CROSS), 0.5 * of(load_file(world["lora"]), CROSS))
    with safe_open(world["out"], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "mine" and json.loads(metadata[NOTE])["after"]["copies"] == 0


def test_one_way_alone_and_a_goal_that_is_not_reached(world: dict[str, Any]):
    found = repair(**world, wanted=RepairSettings(way="strength", most_copies=0.0, captions=2))
    assert {point.way for point in found.curve} == {"strength"} and found.after.kept == 0.5
    world["load"] = lambda variant, loaded=world["load"]: loaded(replace(variant, lora=str(world["lora"])))
    world["out"] = world["out"].with_name("no better.safetensors")
    found = repair(**world, wanted=RepairSettings(captions=2))
    assert not found.reached and found.after.copies == 2 and world["out"].is_file()


@pytest.mark.parametrize(
    ("change_of", "told"),
    [
        (lambda w: w["out"].touch(), "is there already: name another file, or remove it"),
        (lambda w: w.update(out=Path("x.pt")), r"must be called something\.safetensors, not x\.pt"),
        (lambda w: w["lora"].write_bytes(b"no"), r"lora\.safetensors cannot be repaired: .*broken"),
        (lambda w: w.update(places=lambda contents: (contents, {})), "holds nothing for this model"),
        (
            lambda w: w.update(ordinary=["a", "b", "c"]),
            "3 ordinary prompts are too few to tell a style by: give 6 or more",
        ),
        (lambda w: w.update(subject=Subject(w["subject"].entries)), "a repair needs the training images"),
    ],
)
def test_what_cannot_be_repaired_is_told_and_nothing_is_written(world: dict[str, Any], change_of: Any, told: str):
    change_of(world)
    before = sorted(path.name for path in world["lora"].parent.iterdir())
    with pytest.raises(ValueError, match=told):
        repair(**world)
    assert sorted(path.name for path in world["lora"].parent.iterdir()) == before


def test_a_lora_of_zeros_copies_nothing_and_stays_as_it_is(world: dict[str, Any]):
    zeros = {key: value if key.endswith("alpha") else 0 * value for key, value in load_file(world["lora"]).items()}
    save_file(zeros, world["lora"])
    found = repair(**world, wanted=RepairSettings(way="strength"))
    assert len(found.curve) == 1 and found.after.copies == 0 and found.after.likeness is None
    assert "Nothing is held back: nothing that was tried is better than the LoRA as it is." in sentence(found)
    assert set(load_file(world["out"])) == set(zeros)


def test_a_caption_of_many_images_is_drawn_once_and_copies_any_of_them(world: dict[str, Any]):
    """All six images have one caption, of which the LoRA always draws the third."""
    subject = world["subject"]
    third = subject.entries[2].caption
    world["subject"] = replace(subject, entries=[replace(entry, caption=third) for entry in subject.entries])
    found = repair(**world, wanted=RepairSettings(way="text layers"))
    assert (found.before.copies, found.before.drawn) == (1, 1) and found.after.copies == 0


def test_the_file_says_of_itself_what_still_holds_and_so_does_what_was_measured(world: dict[str, Any]):
    """Alphas that trainers note beside the tensors count in every file that is drawn with; a hash of the old bytes, by
    which a host would take the new file for the old one, goes."""
    bare = {key: value for key, value in load_file(world["lora"]).items() if not key.endswith("alpha")}
    noted = json.dumps({f"{SELF.partition('.')[0]}.lora_alpha": 4})
    save_file(bare, world["lora"], {"lora_adapter_metadata": noted, "sshs_model_hash": "ab", "ss_output_name": "mine"})
    drawn_with, load = list[dict[str, str]](), world["load"]

    def loaded(variant: Variant) -> Any:
        if not variant.base:
            with safe_open(variant.lora, "pt") as file:
                drawn_with.append(file.metadata())
        return load(variant)

    world["load"] = loaded
    repair(**world, wanted=RepairSettings(way="text layers"))
    assert {one["lora_adapter_metadata"] for one in drawn_with} == {noted}
    with safe_open(world["out"], "pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"lora_adapter_metadata", "ss_output_name", NOTE}


def test_the_highest_seed_leaves_other_noises(world: dict[str, Any]):
    measurement = replace(world["work"].wanted, seed=2**63 - 1)
    world["work"] = replace(world["work"], wanted=measurement)
    assert repair(**world, wanted=RepairSettings(way="strength", captions=1)).before.drawn == 1


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_drawn(world: dict[str, Any]):
    world["out"] = world["out"].parent / "missing" / "new.safetensors"
    told = list[str]()
    with pytest.raises(ValueError, match=r"new\.safetensors cannot be written"):
        repair(**world, on_progress=lambda stage, done, total: told.append(stage))
    assert not told


def test_files_that_cannot_be_taken_away_do_not_lose_the_finding(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """As on Windows, where a file stays as long as a host has it in memory."""
    unlink, held = os.unlink, list[str]()

    def refusing(path: Any, **more: Any) -> None:
        if " strength " in Path(path).stem:
            held.append(str(path))
            raise PermissionError(13, "held", str(path))
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refusing)
    monkeypatch.setattr(tempfile, "tempdir", str(world["out"].parent))
    repair(**world, wanted=RepairSettings(way="strength", captions=1))
    assert held and world["out"].is_file()


def test_a_stopped_repair_goes_on_where_it_stood_and_finds_the_same(world: dict[str, Any]):
    """Stopped after every task in turn, it does each once; what was kept goes when the new LoRA is written."""
    wanted = RepairSettings(captions=2)
    whole = list[Task]()

    def counted(tasks: Sequence[Task], load: Any, work: Work) -> Iterator[Any]:
        for done in one_process(tasks, load, work):
            whole.append(done[0])
            yield done

    found = repair(**world, wanted=wanted, engine=counted)
    expected = read(world["out"]).metadata, load_file(world["out"])
    assert not list(world["folder"].iterdir())
    world["out"].unlink()
    tried = list[Task]()

    def mortal(tasks: Sequence[Task], load: Any, work: Work) -> Iterator[Any]:
        for done in one_process(tasks[:1], load, work):
            tried.append(done[0])
            yield done
        raise KeyboardInterrupt

    for _ in whole:
        with pytest.raises(KeyboardInterrupt):
            repair(**world, wanted=wanted, engine=mortal)
        assert not world["out"].exists() and list(world["folder"].iterdir())
    again = repair(**world, wanted=wanted, engine=lambda tasks, load, work: pytest.fail("all was done"))
    metadata, tensors = read(world["out"]).metadata, load_file(world["out"])
    assert again == found and metadata == expected[0] and not list(world["folder"].iterdir())
    assert tensors.keys() == expected[1].keys() and all(tensors[key].equal(expected[1][key]) for key in tensors)
    assert [(one.kind, one.prompts) for one in tried] == [(one.kind, one.prompts) for one in whole]


def test_what_was_kept_serves_no_other_lora_set_or_model(world: dict[str, Any]):
    wanted = RepairSettings(way="strength", captions=1)

    def stopped(tasks: Sequence[Task], load: Any, work: Work) -> Iterator[Any]:
        yield from one_process(tasks[:1], load, work)
        raise KeyboardInterrupt

    def kept() -> int:
        with pytest.raises(KeyboardInterrupt):
            repair(**world, wanted=wanted, engine=stopped)
        return len(list(world["folder"].iterdir()))

    assert kept() == 1 == kept()
    world["model"] = "another"
    assert kept() == 2
    save_file({key: 2 * value for key, value in load_file(world["lora"]).items()}, world["lora"])
    assert kept() == 3
    subject = world["subject"]
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    captions = [entry.caption for entry in subject.entries]
    reference = from_images(images, captions, captions, Grey())
    world["subject"] = Subject(entries_of(reference), reference, Grey())
    assert kept() == 4


def test_no_candidate_stays_longer_than_it_is_measured(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A full-rank LoRA of SDXL takes gigabytes, and there are nine."""
    monkeypatch.setattr(tempfile, "tempdir", str(world["out"].parent))
    there = set[int]()
    load = world["load"]

    def counted(variant: Variant) -> Any:
        there.add(len(list(world["out"].parent.glob("tmp*/*.safetensors"))))
        return load(variant)

    world["load"] = counted
    repair(**world, wanted=RepairSettings(captions=1))
    assert there == {0, 1}


def test_names_that_no_file_can_bear_are_refused():
    assert file_called("Ünïcode 絵") == "Ünïcode 絵.safetensors"
    for name in ("", "..", "a/b", "a\\b", "絵" * 100, "\ud800"):
        with pytest.raises(ValueError, match="cannot be the new LoRA's name"):
            file_called(name)


def test_an_audit_tells_what_lower_strengths_and_earlier_epochs_cost(world: dict[str, Any], tmp_path: Path):
    """The brightness grows with the strength; the earlier epoch is the base model itself."""
    first, last = LoraFile(tmp_path / "lora-000001.safetensors", 1), LoraFile(world["lora"], 2)
    nothing = {key: 0 * tensor for key, tensor in load_file(world["lora"]).items() if not key.endswith("alpha")}
    save_file(nothing, first.path)
    images = {row.caption: row for row in world["subject"].entries}

    def loaded(variant: Variant) -> Any:
        made = world["load"](variant)
        if not variant.base:
            made._tint, made._images = made._tint * variant.strength, made._images if variant.strength == 1 else {}
        return made

    ordinary = [f"ordinary {n}" for n in range(32)]
    settings = AuditSettings(worst=0, strength_steps=2)
    ledger = Ledger(tmp_path / "ledger", {})
    found = audit(world["subject"], [first, last], ordinary, loaded, world["work"], ledger, settings)
    assert len(images) == len(found.rows) and found.counts == "gain"
    half, whole = found.strengths
    assert whole.likeness == 1 and 0.3 < (half.likeness or 0) < 0.7
    early, late = found.epochs
    assert early.likeness == pytest.approx(0, abs=1e-6) and late.likeness == 1
    captions = Subject([replace(entry, row=None) for entry in world["subject"].entries])
    found = audit(captions, [first, last], ordinary, loaded, world["work"], Ledger(tmp_path / "b", {}), settings)
    assert all(point.likeness is None for point in (*found.strengths, *found.epochs))


def test_the_best_point_is_the_likest_of_those_with_few_copies():
    points = [
        Point("strength", 1.0, 8, 8, 1.0),
        Point("text layers", 0.25, 0, 8, 0.9),
        Point("strength", 0.5, 0, 8, 0.7),
    ]
    assert best_of(points, 0.1) == points[1] and best_of(points, 1.0) == points[0]
    assert best_of([points[0], replace(points[1], copies=4), replace(points[2], copies=3)], 0.1).copies == 3
    unknown = [replace(points[1], likeness=None), replace(points[2], likeness=None)]
    assert best_of(unknown, 0.1).kept == 0.5  # no likeness can be told: what keeps most


def test_the_command_repairs_a_lora_of_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from test_reference_build import data, write

    folder = write(
        tmp_path / "set",
        {f"{n}.{end}": what for n in range(2) for end, what in (("png", data(n)), ("txt", f"a red ball {n}"))},
    )
    rng = torch.Generator().manual_seed(5)
    place = "down_blocks_1_attentions_0_transformer_blocks_0"
    tensors = {}
    for part in ("attn1_to_q", "attn2_to_k"):
        tensors[f"lora_unet_{place}_{part}.lora_down.weight"] = torch.randn(2, 128, generator=rng)
        tensors[f"lora_unet_{place}_{part}.lora_up.weight"] = torch.randn(128, 2, generator=rng)
    save_file(tensors, tmp_path / "lora.safetensors")
    out, found = tmp_path / "out.safetensors", tmp_path / "found.json"
    command = ["repair", str(tmp_path / "lora.safetensors"), "--out", str(out), "--dataset", str(folder)]
    small = ["--captions", "1", "--ordinary", "4", "--images", "1", "--steps", "2", "--way", "text layers"]
    assert main([*command, *small, "--most-copies", "1", "--json", str(found)]) == 0
    document = json.loads(found.read_text())
    assert [row["kept"] for row in document["rows"]] == [1.0, *KEPT["text layers"]]
    assert document["before"]["drawn"] == 1 and out.is_file() and "Saved as" in capsys.readouterr().out
    load(lora=str(out))
    assert main([*command, *small]) == 2
    assert "is there already: name another file" in capsys.readouterr().err
