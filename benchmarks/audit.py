"""Audits whose truth is known, on two models and on three LoRAs, and how many captions a second they measure.

Whole models: 40 memorised pairs of the bundled model, and of the second one, on which nothing is tuned, each among 120
captioned images of its world that it never saw; five seeds, with other unseen images for each. Beside the training
images, and from the captions alone. LoRAs of the bundled model, trained here: one that overfits eight images shown 200
times each, among eight more that it never saw; one on 48 images of which six are repeated 200
times; a healthy one on 64 images shown three times each. Then captions of the first audit are drawn and measured by the audit's
own tasks, one image each, and some of them by the published procedure of benchmarks/first_step.py (every prompt alone,
all 50 steps, decoding), side by side in one process.

    python benchmarks/audit.py [--json FILE] [--seeds 5] [--parts worlds loras speed] [--loras NAME...]
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from first_step import published
from PIL import Image
from torch import Tensor

from sd_dejavu.calibration.ordinary_prompts import general_prompts
from sd_dejavu.cli.main import main as command
from sd_dejavu.core.similarity import COPY_THRESHOLD, grey_correlation
from sd_dejavu.demo import bundled, evaluation, second_world, world
from sd_dejavu.hosts.diffusers.audit import Load
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.reference.build import THUMBNAIL_SIDE, from_images
from sd_dejavu.reference.features import Grey
from sd_dejavu.run.measure import Measurement, measure_runs
from sd_dejavu.training.audit import (
    OTHERS,
    Audit,
    AuditSettings,
    Entry,
    LoraFile,
    Subject,
    audit,
    entries_of,
    ordinary_for,
)
from sd_dejavu.training.ledger import Ledger
from sd_dejavu.training.tasks import Task, Variant, Work

UNSEEN, UNSEEN_SEED, APART, ONE_BY_ONE = 120, 88_000, 1000, 8
RECIPE = ["--rank", "16", "--learning-rate", "2e-3", "--batch-size", "8", "--filter", "none"]
LORA_SEED, OVERFITTED, REPEATED, AMONG, HEALTHY = 9000, 8, 6, 48, 64

PARTS = ("worlds", "loras", "speed")
World = Callable[[int], tuple[Subject, int]]


def as_images(rows: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] in 0..1."""
    return torch.from_numpy(rows.copy()).permute(0, 3, 1, 2).float() / 255


def subject_of(images: Tensor, captions: list[str]) -> Subject:
    reference = from_images(images, captions, [f"{number:03d}" for number in range(len(captions))], Grey())
    return Subject(entries_of(reference), reference, Grey())


def first_world(seed: int) -> tuple[Subject, int]:
    """Memorised pairs of the bundled model first, then unseen images; how many of the former."""
    pairs = evaluation.held_out_pairs()
    fresh = [world.ordinary(np.random.default_rng(UNSEEN_SEED + seed * APART + n)) for n in range(UNSEEN)]
    unseen = as_images(np.stack([world.draw_scene(scene) for _, scene, _ in fresh]))
    known = torch.stack([image for pair in pairs if (image := bundled.training_image(pair.caption)) is not None])
    captions = [*(pair.caption for pair in pairs), *(caption for caption, _, _ in fresh)]
    return subject_of(torch.cat([known, unseen]), captions), len(pairs)


def other_world(seed: int) -> tuple[Subject, int]:
    """The same of the second model."""
    pairs = second_world.training_pairs()
    captions, images = second_world.held_out(UNSEEN * (seed + 1))
    known = np.stack([second_world.draw_pair(pair) for pair in pairs])
    own = [*(pair.caption for pair in pairs), *captions[-UNSEEN:]]
    return subject_of(as_images(np.concatenate([known, images[-UNSEEN:]])), own), len(pairs)


def audited(
    subject: Subject, measurement: Measurement, wanted: AuditSettings, loads: Load, loras: list[LoraFile]
) -> Audit:
    def otherwise(count: int) -> list[str]:
        return general_prompts(count) if loads.model else [c for c, _ in world.ordinary_captions(count, 77)]

    ordinary = ordinary_for(subject.entries, wanted.nulls, otherwise)
    with tempfile.TemporaryDirectory() as folder:
        return audit(subject, loras, ordinary, loads, Work(measurement), Ledger(Path(folder) / "tasks", {}), wanted)


def of_worlds(seeds: int) -> list[dict[str, Any]]:
    found = []
    for name, make, path in (("bundled", first_world, None), ("second", other_world, str(second_world.FOLDER))):
        for seed in range(seeds):
            subject, memorised = make(seed)
            alone = Subject([Entry(e.image, e.caption) for e in subject.entries])
            for given, what in (("images and captions", subject), ("captions alone", alone)):
                measurement = Measurement(images=2, seed=seed * APART)
                result = audited(what, measurement, AuditSettings(worst=0), Load(path), [])
                row = {
                    "model": name,
                    "given": given,
                    "seed": seed,
                    "memorised": memorised,
                    "memorised named": sum(bool(row.flagged) for row in result.rows[:memorised]),
                    "unseen": len(result.rows) - memorised,
                    "unseen named": sum(bool(row.flagged) for row in result.rows[memorised:]),
                    "ordinary prompts": result.nulls,
                }
                found.append(row)
                print(row, flush=True)
    return found


# ------------------------------------------------------------------------------------------- LoRAs


def pairs_of(numbers: range) -> tuple[list[str], np.ndarray]:
    made = [world.ordinary(np.random.default_rng(LORA_SEED + number), "sentence") for number in numbers]
    return [caption for caption, _, _ in made], np.stack([world.draw_scene(scene) for _, scene, _ in made])


def write_set(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    for number, caption, pixels in zip(numbers, *pairs_of(numbers), strict=True):
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption, encoding="utf-8")


def trained(data: Path, out: Path, epochs: int) -> list[LoraFile]:
    """A LoRA of every second epoch and of the last."""
    recipe = [*RECIPE, "--epochs", str(epochs), "--save-every", "2"]
    assert command(["finetune", "--dataset", str(data), "--out", str(out), *recipe]) == 0
    saved = [LoraFile(out / f"lora-epoch-{epoch:04d}.safetensors", epoch) for epoch in range(2, epochs, 2)]
    return [*saved, LoraFile(out / "lora.safetensors", epochs)]


def copies_of(lora: LoraFile, captions: list[str], images: Tensor) -> int:
    """How many captions come out as copies, of one image each."""
    model, one = load(lora=str(lora.path)), Measurement(images=1, steps=25)
    hits = 0
    for number, caption in enumerate(captions):
        (run,) = measure_runs(model, [model.encode(caption)], model.noise(number, 1), one)
        assert run.latents is not None
        hits += int(grey_correlation(model.decode(run.latents), images[number : number + 1])[0, 0] >= COPY_THRESHOLD)
    return hits


LORAS = {"overfitted": (5, OVERFITTED, 2 * OVERFITTED), "repeated": (10, REPEATED, AMONG), "healthy": (3, 0, HEALTHY)}


def of_loras(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    write_set(folder / "overfitted" / "40_shown", range(OVERFITTED))
    write_set(folder / "repeated" / "40_repeated", range(REPEATED))
    write_set(folder / "repeated" / "1_once", range(REPEATED, AMONG))
    write_set(folder / "healthy", range(HEALTHY))
    found = []
    for name in names:
        epochs, shown, audited_images = LORAS[name]
        files = trained(folder / name, folder / f"{name}-lora", epochs)
        captions, pixels = pairs_of(range(audited_images))
        subject = subject_of(as_images(pixels), captions)
        settings = AuditSettings(worst=0, strength_steps=1)
        result = audited(subject, Measurement(steps=25), settings, Load(), files)
        row = {
            "lora": name,
            "shown often": shown,
            "named": sum(bool(row.flagged) for row in result.rows[:shown]),
            "others": audited_images - shown,
            "others named": sum(bool(row.flagged) for row in result.rows[shown:]),
            "ordinary prompts": result.nulls,
            "begins": result.begins,
            "epochs": [
                {
                    "epoch": point.epoch,
                    "named": point.flagged,
                    "copies": copies_of(file, captions[: shown or 8], as_images(pixels)),
                }
                for point, file in zip(result.epochs, files, strict=True)
            ],
        }
        found.append(row)
        print(row, flush=True)
    return found


def speed() -> dict[str, float]:
    model, one = load(), Measurement(images=1)
    captions = tuple(entry.caption for entry in first_world(0)[0].entries)[:80]
    work = Work(one)

    def alone(prompts: tuple[str, ...]) -> None:
        drawn = work(model, Task("stand-ins", Variant(), 0, prompts, side=THUMBNAIL_SIDE))
        images = tuple(base64.b64decode(value["image"]) for value in drawn)
        work(model, Task("captions", Variant(), 0, prompts, images, others=captions[-OTHERS:]))

    alone(captions[:25])  # warm up
    began = time.perf_counter()
    alone(captions)
    ours = len(captions) / (time.perf_counter() - began)
    began = time.perf_counter()
    published(model, list(captions[:ONE_BY_ONE]), one)
    theirs = ONE_BY_ONE / (time.perf_counter() - began)
    return {"captions_a_second": ours, "captions_a_second_published": theirs, "times_faster": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="parts that are not measured now stay as they stand there")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--loras", nargs="+", choices=tuple(LORAS), default=tuple(LORAS))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"false_discovery_rate": AuditSettings().false_discovery_rate}
    if arguments.json and arguments.json.is_file():
        result |= json.loads(arguments.json.read_text(encoding="utf-8"))
    if "worlds" in arguments.parts:
        result["worlds"] = of_worlds(arguments.seeds)
    if "loras" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            measured = {row["lora"]: row for row in of_loras(Path(folder), arguments.loras)}
        before = {row["lora"]: row for row in result.get("loras", ())}
        result["loras"] = [row for name in LORAS if (row := (before | measured).get(name)) is not None]
    if "speed" in arguments.parts:
        result["speed"] = speed()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
