"""Compare all mitigations on the bundled model: copies left, captions followed, ordinary images, time, memory.

All methods draw the same held-out memorised captions, whose training images are known, and the same ordinary
captions from the same noises. With --out, DIR gets compare.svg: copies left against captions followed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from ..calibration.profile import Profile
from ..core.statistics import spread
from ..kept import write_text
from ..report.scatter import Mark, scatter_chart
from ..run.measure import Measurement
from . import common

if TYPE_CHECKING:
    from ..demo.evaluation import MitigationRow, Share

ORDINARY, ORDINARY_SEED = 20, 2077  # no seed that calibrates or tunes
IMAGES = 1
PLOT = "compare.svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    parser.add_argument("--pairs", type=common.positive, metavar="N", help="memorised captions (default: all held out)")
    parser.add_argument(
        "--ordinary",
        type=common.positive,
        default=ORDINARY,
        metavar="N",
        help=f"ordinary captions (default: {ORDINARY})",
    )
    parser.add_argument("--images", type=common.positive, default=IMAGES, help=f"images a prompt (default: {IMAGES})")
    parser.add_argument("--steps", type=common.positive, default=50, help="sampling steps (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument(
        "--json", type=common.new_file, metavar="FILE", help="write the rows as JSON ('-' for standard output)"
    )
    parser.add_argument("--csv", type=common.new_file, metavar="FILE", help="write the rows as CSV")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write compare.svg into DIR")


def run(arguments: argparse.Namespace) -> int:
    from ..demo import bundled, evaluation
    from ..hosts.diffusers.load import load

    methods = _chosen(arguments.methods, evaluation.every_mitigation())
    for file in (arguments.json, arguments.csv, arguments.out and arguments.out / PLOT):
        if file is not None:  # so that a place that cannot be written to is told before the work
            file.parent.mkdir(parents=True, exist_ok=True)
    wanted = Measurement(images=arguments.images, steps=arguments.steps, seed=arguments.seed)
    pairs = spread(evaluation.held_out_pairs(), arguments.pairs)
    ordinary = bundled.held_out_ordinary(arguments.ordinary, ORDINARY_SEED)
    model, profile = load(device=arguments.device), Profile.load(bundled.CALIBRATION)
    with common.progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=(len(pairs) + len(ordinary)) * (1 + len(methods)))
        rows = evaluation.mitigations(model, profile, wanted, pairs, methods, lambda name: bar.advance(task), ordinary)
    records = [record_of(row) for row in rows]
    counts = {"pairs": len(pairs), "ordinary": len(ordinary), "images": wanted.images, "steps": wanted.steps}
    device = device_name(torch.device(arguments.device))
    told = {"rows": records, **counts, "seed": wanted.seed, "model": model.name, "device": device}
    common.write_rows(told, arguments.json, arguments.csv)
    if arguments.out is not None:
        write_text(arguments.out / PLOT, plot(rows))
    if str(arguments.json) != "-":
        Console().print(_table(rows, len(pairs), len(ordinary)))
    for row in rows:
        if row.not_measured:
            common.warn(f"{row.method}: {row.not_measured} prompts did not fit into memory")
    return common.EXIT_NOT_MEASURED if any(row.not_measured for row in rows) else 0


def _chosen(names: Sequence[str] | None, known: dict[str, Any]) -> dict[str, Any]:
    unknown = set(names or ()) - set(known)
    if unknown:
        raise ValueError(f"there is no method {', '.join(sorted(unknown))}: use some of {', '.join(known)}")
    return {name: settings for name, settings in known.items() if names is None or name in names}


def record_of(row: MitigationRow) -> dict[str, Any]:
    """A row as plain values: shares as numbers with their counts beside them, None for what is not known."""
    found: dict[str, Any] = {}
    for name, value in asdict(row).items():
        share: Share | Any = getattr(row, name)
        if isinstance(value, dict):
            found |= {name: share.share if share.count else None, f"{name}_hits": share.hits, f"{name}_of": share.count}
        else:
            found[name] = None if value != value else value
    return found


def device_name(device: torch.device) -> str:
    """A GPU's own name, 'cpu' for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def plot(rows: Sequence[MitigationRow]) -> str:
    """Copies left against captions followed: the better a method, the further down and to the right it is."""
    marks = [
        Mark(row.method, row.caption_score, row.copies.share) for row in rows if row.caption_score == row.caption_score
    ]
    return scatter_chart(
        marks,
        "Privacy against fidelity",
        "caption score: captions of other things beaten",
        "share of images that are copies",
    )


def _table(rows: Sequence[MitigationRow], pairs: int, ordinary: int) -> Table:
    table = Table(
        "method",
        "copies (95%)",
        "of a part",
        "likeness",
        "top 5%",
        "caption",
        "ordinary kept",
        "change",
        "time",
        "peak MB",
    )
    table.title = f"{pairs} memorised and {ordinary} ordinary captions, the same noises for every method"
    for row in rows:
        table.add_row(
            row.method,
            str(row.copies),
            f"{row.part_copies.hits}/{row.part_copies.count}",
            f"{row.similarity:.2f}",
            f"{row.similarity_top5:.2f}",
            f"{row.caption_score:.2f}",
            f"{row.untouched.hits}/{row.untouched.count}",
            f"{row.change_on_ordinary:.3f}",
            f"{row.seconds_ratio:.2f}",
            f"{row.peak_memory_mb:.0f}",
        )
    return table
