"""An audit of the bundled model against what it was trained on, and how many captions a second it measures.

The training set is its held-out pairs repeated 100 times an epoch or more, and as many ordinary images again that
it never saw, with their captions. Which of them are named? Then the same captions are measured by the audit's own
tasks, one image each, and some of them by the published procedure of benchmarks/first_step.py (every prompt alone,
all 50 steps, decoding), side by side in one process.

    python benchmarks/audit.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from first_step import published

from sd_dejavu.demo import bundled, evaluation, world
from sd_dejavu.hosts.diffusers.audit import Load
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.reference.build import from_images
from sd_dejavu.reference.features import Grey
from sd_dejavu.run.measure import Measurement
from sd_dejavu.training.audit import Audit, AuditSettings, Entry, Subject, audit, entries_of
from sd_dejavu.training.ledger import Ledger
from sd_dejavu.training.tasks import Task, Variant, Work

NULLS_SEED, UNSEEN_SEED, ONE_BY_ONE = 77, 88_000, 8


def training_set() -> tuple[Subject, int]:
    """Memorised pairs first, then unseen ordinary ones; how many of the former."""
    pairs = evaluation.held_out_pairs()
    shown = [bundled.training_image(pair.caption) for pair in pairs]
    fresh = [world.ordinary(np.random.default_rng(UNSEEN_SEED + number)) for number in range(len(pairs))]
    unseen = [torch.from_numpy(world.draw_scene(scene).copy()).permute(2, 0, 1).float() / 255 for _, scene, _ in fresh]
    captions = [*(pair.caption for pair in pairs), *(caption for caption, _, _ in fresh)]
    names = [f"{number:03d}" for number in range(len(captions))]
    reference = from_images(torch.stack([*shown, *unseen]), captions, names, Grey())
    return Subject(entries_of(reference), reference, Grey()), len(pairs)


def audited(subject: Subject, wanted: Measurement, settings: AuditSettings) -> Audit:
    ordinary = [caption for caption, _ in world.ordinary_captions(settings.nulls, NULLS_SEED)]
    with tempfile.TemporaryDirectory() as folder:
        return audit(subject, [], ordinary, Load(), Work(wanted), Ledger(Path(folder) / "tasks", {}), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    subject, memorised = training_set()
    settings = AuditSettings(worst=0)
    found = {}
    for counts, what in (
        ("contrast", subject),
        ("magnitude", Subject([Entry(e.image, e.caption) for e in subject.entries])),
    ):
        rows = audited(what, Measurement(images=2), settings).rows
        found[counts] = {
            "memorised_named": sum(bool(row.flagged) for row in rows[:memorised]),
            "memorised": memorised,
            "unseen_named": sum(bool(row.flagged) for row in rows[memorised:]),
            "unseen": len(rows) - memorised,
        }
    model, one = load(), Measurement(images=1)
    captions = tuple(entry.caption for entry in subject.entries)

    work, task = Work(one), Task("captions", Variant(), 0, captions)
    work(model, Task("captions", Variant(), 0, captions[:25]))  # warm up
    began = time.perf_counter()
    work(model, task)
    ours = len(captions) / (time.perf_counter() - began)
    began = time.perf_counter()
    published(model, list(captions[:ONE_BY_ONE]), one)
    theirs = ONE_BY_ONE / (time.perf_counter() - began)
    result = {
        **found,
        "nulls": settings.nulls,
        "false_discovery_rate": settings.false_discovery_rate,
        "captions_a_second": ours,
        "captions_a_second_published": theirs,
        "times_faster": ours / theirs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
