"""How well do detectors tell memorised prompts from ordinary ones? With intervals, and seconds a prompt.

Without files, the bundled model's held-out memorised captions (repeated 100 times or more) against fresh
ordinary captions. The letter-case control stands beside the detectors: where it does well, the lists differ
in style and the other figures say little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..core.denoiser import Model
from ..core.memory import OutOfMemory, one_by_one
from ..core.sampling import first_readings
from ..core.statistics import auc, auc_interval, tpr_at_fpr, wilson
from ..detectors import Detector, Observed, available
from ..run.measure import Measurement, guidance_of
from ..run.reference import sample_prompts
from . import common
from .prompt_files import read_prompts

NEGATIVES, NEGATIVES_SEED = 200, 4242


@dataclass(frozen=True)
class Row:
    """One detector in one configuration; ``steps`` 0 means that no model was run.

    ``not_measured`` counts prompts for which memory did not suffice; the figures are those of the others.
    """

    detector: str
    steps: int
    images: int
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_1_fpr: float
    tpr_interval: tuple[float, float]
    seconds_per_prompt: float
    not_measured: int = 0


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
    parser.add_argument(
        "--json", type=common.new_file, metavar="FILE", help="write the rows as JSON ('-' for standard output)"
    )
    parser.add_argument("--csv", type=common.new_file, metavar="FILE", help="write the rows as CSV")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    positives, negatives = _prompts(arguments)
    model = common.load_model(arguments)
    if arguments.positives is not None:
        common.refuse_too_long(model, positives, arguments.positives.name)
        common.refuse_too_long(model, negatives, arguments.negatives.name)
    rows = _rows(model, [available()[name] for name in arguments.detectors], positives, negatives, wanted, arguments)
    records = [vars(row) for row in rows]
    told = {"rows": records, "positives": len(positives), "negatives": len(negatives), "model": model.name}
    common.write_rows(told, arguments.json, arguments.csv)
    if str(arguments.json) != "-":
        Console().print(_table(rows, len(positives), len(negatives)))
    missing = max(row.not_measured for row in rows)
    if missing:
        common.warn(f"{missing} prompts were not measured: memory did not suffice")
    return common.EXIT_NOT_MEASURED if missing else 0


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
    steps = [min(number or all_steps, all_steps) for number in detector.evaluations]
    return list(dict.fromkeys((s, images) for s in steps for images in detector.images))


def _rows(
    model: Model,
    detectors: Sequence[Detector],
    positives: Sequence[str],
    negatives: Sequence[str],
    wanted: Measurement,
    arguments: argparse.Namespace,
) -> list[Row]:
    """Each configuration is run once, whatever the number of detectors that look at it.

    The seconds of a detector are those of the run (text encoding included), of decoding where it looks
    at images, and of its own scoring.
    """
    prompts, rows = [*positives, *negatives], []
    chosen = {(d.name, c): d for d in detectors for c in _configurations(d, wanted.steps)}
    for steps, images in dict.fromkeys(c for _, c in chosen):
        users = [d for (_, c), d in chosen.items() if c == (steps, images)]
        scores: dict[str, list[float | None]] = {d.name: [] for d in users}
        seconds = dict.fromkeys(scores, 0.0)
        with common.progress_bar(Console(stderr=True)) as bar:
            task = bar.add_task(f"{steps} steps, {images} images", total=len(prompts))
            together = common.CHUNK if steps <= 1 else max(1, arguments.batch_size // images)
            for start in range(0, len(prompts), together):
                part = prompts[start : start + together]
                began = time.perf_counter()
                observe = partial(_observe, model, users, wanted, steps, images, arguments.batch_size)
                runs = one_by_one(observe, part)
                seconds_run = time.perf_counter() - began
                began = time.perf_counter()
                looked_at = any(d.needs == "images" for d in users)
                seen = one_by_one(partial(_with_images, model, looked_at), runs)
                seconds_decoding = time.perf_counter() - began
                for d in users:
                    began = time.perf_counter()
                    scores[d.name] += [None if isinstance(o, OutOfMemory) else d.score(o[d.name]) for o in seen]
                    seconds[d.name] += time.perf_counter() - began + seconds_run
                    seconds[d.name] += seconds_decoding if d.needs == "images" else 0.0
                bar.advance(task, len(part))
        for d in users:
            found = scores[d.name]
            split = [
                [score for score in side if score is not None]
                for side in (found[: len(positives)], found[len(positives) :])
            ]
            missing = found.count(None)
            if not all(split):
                raise OutOfMemory("there is not enough memory for any of these prompts: use --dtype float16")
            rows.append(_row(d, steps, images, split[0], split[1], seconds[d.name] / len(prompts), missing))
    return rows


Seen = dict[str, Observed]  # of one prompt, by detector


def _observe(
    model: Model,
    users: Sequence[Detector],
    wanted: Measurement,
    steps: int,
    images: int,
    batch_size: int,
    prompts: Sequence[str],
) -> list[tuple[Seen, Tensor | None]]:
    """What each detector read of each prompt, and its final latents where a run went to the end."""
    if steps == 0:
        return [({d.name: Observed(prompt) for d in users}, None) for prompt in prompts]
    conditionings = [model.encode(prompt) for prompt in prompts]
    noise, sigmas = model.noise(wanted.seed, images), model.sigmas(wanted.steps)
    readers = {d.name: d.read for d in users if d.read is not None}
    found: list[tuple[Seen, Tensor | None]] = []
    if steps == 1:
        read = first_readings(model, conditionings, model.encode(""), noise, sigmas[0], readers, batch_size)
        for number, prompt in enumerate(prompts):
            found.append(({name: Observed(prompt, values[number][None]) for name, values in read.items()}, None))
        return found
    runs = sample_prompts(model, conditionings, guidance_of(model, wanted), noise, sigmas, steps, batch_size)
    for prompt, run in zip(prompts, runs, strict=True):
        seen = {d.name: Observed(prompt) for d in users}
        for name in readers:
            seen[name] = Observed(prompt, torch.tensor([run.trace.reading(number, name) for number in range(steps)]))
        found.append((seen, run.latents if steps == wanted.steps else None))
    return found


def _with_images(
    model: Model, looked_at: bool, runs: Sequence[tuple[Seen, Tensor | None] | OutOfMemory]
) -> list[Seen | OutOfMemory]:
    """What detectors look at, images decoded where one does; a fault stays one."""
    seen: list[Seen | OutOfMemory] = []
    for run in runs:
        if isinstance(run, OutOfMemory):
            seen.append(run)
            continue
        observed, latents = run
        if looked_at and latents is not None:
            images = model.decode(latents)
            observed = {name: replace(one, images=images) for name, one in observed.items()}
        seen.append(observed)
    return seen


def _row(
    detector: Detector,
    steps: int,
    images: int,
    positives: list[float],
    negatives: list[float],
    seconds: float,
    not_measured: int,
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
        not_measured,
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
