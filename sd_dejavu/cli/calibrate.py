"""Calibrate: measure ordinary prompts once, so that later scores get p-values.

The profile is kept in the user's data folder and found again by itself for the same weights and setting.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from rich.console import Console

from ..calibration import store
from ..calibration.calibrate import calibrate
from ..denoiser import PromptTooLong
from ..report.wording import calibrated
from ..run.measure import Measurement, setting_of
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser)
    common.add_settings(parser, Measurement, "measurement")
    parser.add_argument("--count", type=common.positive, default=1000, help="ordinary prompts (default: 1000)")
    parser.add_argument(
        "--full-runs",
        type=int,
        default=0,
        help="prompts also run to the end, for the charts' band and other scores than the first step (default: 0)",
    )
    parser.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="your own ordinary prompts (default: generated)"
    )
    parser.add_argument("--column", help="column or key that holds the prompts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to save (default: the user's data folder)")
    parser.add_argument(
        "--replace", action="store_true", help="also replace a calibration that holds more than the new one"
    )
    parser.add_argument("--json", action="store_true", help="print what was made as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    if not 0 <= arguments.full_runs <= common.LARGEST_COUNT:
        raise ValueError(f"full runs must be 0 or more, at most {common.LARGEST_COUNT:,}, not {arguments.full_runs}")
    prompts = common.ordinary_prompts_of(arguments, arguments.prompts_file, arguments.count)
    model = common.load_model(arguments)
    unread = {} if arguments.prompts_file is None else common.too_long(model, prompts)
    if len(unread) == len(prompts):
        raise PromptTooLong(unread[0])
    prompts = [prompt for index, prompt in enumerate(prompts) if index not in unread]
    path = arguments.out or store.path_for(setting_of(model, wanted))
    if not arguments.replace:
        store.check_kept(path, store.Size(len(prompts), min(arguments.full_runs, len(prompts)), wanted.images))
    with common.progress_bar(Console(stderr=True)) as bar:
        tasks = {"first step": bar.add_task("first step", total=len(prompts))}
        if arguments.full_runs:
            tasks["whole runs"] = bar.add_task("whole runs", total=min(arguments.full_runs, len(prompts)))
        left_out: dict[str, str] = {}
        profile = calibrate(
            model,
            prompts,
            wanted,
            arguments.full_runs,
            arguments.batch_size,
            lambda stage: bar.advance(tasks[stage]),
            left_out.__setitem__,
        )
    for why in (*unread.values(), *(f"{prompt}: {why}" for prompt, why in left_out.items())):
        common.warn(f"not measured: {why}")
    store.keep(profile, path, arguments.replace)
    summary = {
        "profile": str(path),
        "prompts": len(profile.nulls),
        "styles": dict(Counter(null.style for null in profile.nulls)),
        "median": profile.quantile(0.5, "first step", wanted.images),
        "q99": profile.quantile(0.99, "first step", wanted.images),
    }
    if arguments.json:
        common.print_json(summary)
    else:
        common.tell(f"{calibrated(profile, wanted.images)}\nsaved as {path}")
    return common.EXIT_NOT_MEASURED if left_out or unread else 0
