"""Bench: how well detectors tell memorised from ordinary prompts, with intervals and seconds a prompt.

Without files, the bundled model's held-out memorised captions (repeated 100 times or more) against fresh
ordinary captions. The letter-case control stands beside the detectors: where it does well, the lists differ
in style and the other figures say little.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..denoiser import Model
from ..detectors import Detector, Observed, available
from ..measure import Measurement, guidance_of
from ..sampling import first_step, sample_prompts
from ..statistics import auc, auc_interval, tpr_at_fpr, wilson
from . import common
from .prompt_files import read_prompts

NEGATIVES, NEGATIVES_SEED = 200, 4242


@dataclass(frozen=True)
class Row:
    """One detector in one configuration; ``steps`` 0 means that no model was run."""

    detector: str
    steps: int
    images: int
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_1_fpr: float
    tpr_interval: tuple[float, float]
    seconds_per_prompt: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser)
    common.add_settings(parser, Measurement, "measurement (--score and --images come from each detector)")
    parser.add_argument(
        "--positives", type=Path, metavar="FILE", help="memorised prompts (default: the bundled held-out ones)"
    )
    parser.add_argument("--negatives", type=Path, metavar="FILE", help="ordinary prompts")
    parser.add_argument(
        "--negatives-count",
        type=common.positive,
        default=NEGATIVES,
        help="ordinary captions of the bundled world (default: 200)",
    )
    parser.add_argument("--column", help="column or key that holds the prompts")
    parser.add_argument(
        "--detectors", nargs="+", choices=tuple(available()), default=list(available()), help="default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON ('-' for standard output)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    positives, negatives = _prompts(arguments)
    model = common.load_model(arguments)
    console = Console(stderr=True)
    rows = []
    for detector in (available()[name] for name in arguments.detectors):
        for steps, images in _configurations(detector, wanted.steps):
            scores, seconds = _scores(
                model, detector, [*positives, *negatives], wanted, steps, images, arguments.batch_size, console
            )
            rows.append(_row(detector, steps, images, scores[: len(positives)], scores[len(positives) :], seconds))
    records = [vars(row) for row in rows]
    if arguments.json is not None:
        text = json.dumps(
            {"rows": records, "positives": len(positives), "negatives": len(negatives), "model": model.name}, indent=1
        )
        if str(arguments.json) == "-":
            print(text)
        else:
            arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    if str(arguments.json) != "-":
        Console().print(_table(rows, len(positives), len(negatives)))
    return 0


def _prompts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    if (arguments.positives is None) != (arguments.negatives is None):
        raise ValueError("give both --positives and --negatives, or neither for the bundled model's held-out prompts")
    if arguments.positives is not None:
        return tuple(
            list(read_prompts(f, [], None, arguments.column)) for f in (arguments.positives, arguments.negatives)
        )  # type: ignore[return-value]
    if arguments.model is not None:
        raise ValueError("--positives and --negatives are needed for a model other than the bundled one")
    from ..demo import bundled

    return bundled.held_out_memorised(), bundled.held_out_ordinary(arguments.negatives_count, NEGATIVES_SEED)


def _configurations(detector: Detector, all_steps: int) -> list[tuple[int, int]]:
    """(steps, images) to run, each once."""
    if detector.needs == "prompt":
        return [(0, 0)]
    steps = [min(steps or all_steps, all_steps) for steps in detector.steps]
    return list(dict.fromkeys((s, images) for s in steps for images in detector.images))


def _scores(
    model: Model,
    detector: Detector,
    prompts: Sequence[str],
    wanted: Measurement,
    steps: int,
    images: int,
    batch_size: int,
    console: Console,
) -> tuple[list[float], float]:
    """One score a prompt, and the seconds a prompt took, text encoding included."""
    began = time.perf_counter()
    scores: list[float] = []
    with common.progress_bar(console) as bar:
        task = bar.add_task(f"{detector.name}, {steps} steps, {images} images", total=len(prompts))
        for observed in _observe(model, detector, prompts, wanted, steps, images, batch_size):
            scores.append(detector.score(observed))
            bar.advance(task)
    return scores, (time.perf_counter() - began) / len(prompts)


def _observe(
    model: Model,
    detector: Detector,
    prompts: Sequence[str],
    wanted: Measurement,
    steps: int,
    images: int,
    batch_size: int,
) -> Iterator[Observed]:
    if detector.needs == "prompt":
        yield from (Observed(prompt) for prompt in prompts)
        return
    noise, sigmas = model.noise(wanted.seed, images), model.sigmas(wanted.steps)
    if detector.needs == "steps" and steps == 1:
        for start in range(0, len(prompts), common.CHUNK):
            part = prompts[start : start + common.CHUNK]
            values = first_step(model, [model.encode(p) for p in part], model.encode(""), noise, sigmas[0], batch_size)
            yield from (Observed(p, magnitudes=row[None]) for p, row in zip(part, values, strict=True))
        return
    guidance = guidance_of(model, wanted)
    together = max(1, batch_size // images)
    for start in range(0, len(prompts), together):
        part = prompts[start : start + together]
        conditionings = [model.encode(prompt) for prompt in part]
        runs = sample_prompts(model, conditionings, guidance, noise, sigmas, steps, batch_size)
        for prompt, drawn in zip(part, runs, strict=True):
            magnitudes = torch.tensor([drawn.trace.reading(number) for number in range(steps)])
            yield Observed(prompt, magnitudes, model.decode(drawn.latents) if detector.needs == "pictures" else None)


def _row(
    detector: Detector, steps: int, images: int, positives: list[float], negatives: list[float], seconds: float
) -> Row:
    tpr = tpr_at_fpr(positives, negatives)
    return Row(
        detector.name,
        steps,
        images,
        auc(positives, negatives),
        auc_interval(positives, negatives),
        tpr,
        wilson(tpr, len(positives)),
        seconds,
    )


def _table(rows: Sequence[Row], positives: int, negatives: int) -> Table:
    table = Table("detector", "steps", "images", "AUC (95%)", "TPR at 1% FPR (95%)", "s / prompt")
    table.title = f"{positives} memorised against {negatives} ordinary prompts"
    for r in rows:
        table.add_row(
            r.detector,
            str(r.steps or "-"),
            str(r.images or "-"),
            f"{r.auc:.3f} ({r.auc_interval[0]:.3f}-{r.auc_interval[1]:.3f})",
            f"{r.tpr_at_1_fpr:.3f} ({r.tpr_interval[0]:.3f}-{r.tpr_interval[1]:.3f})",
            f"{r.seconds_per_prompt:.4f}",
        )
    return table
