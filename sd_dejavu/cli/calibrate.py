"""Measure ordinary prompts once, so that later scores get a verdict.

The profile is kept in the user's data folder and found again by itself for the same weights and setting.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..calibration import store
from ..calibration.calibrate import calibrate
from ..calibration.misfit import stranger_nulls
from ..calibration.profile import Ordinary, Profile
from ..core.denoiser import Model, PromptTooLong
from ..core.statistics import spread
from ..report.wording import calibrated, misfit
from ..run.measure import Measurement, measure, setting_of
from . import common
from .prompt_files import read_prompts

GIVEN = 100  # of the prompts that others were made from, so many are measured too


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
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="your own ordinary prompts (default: generated)"
    )
    which.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="prompts like those that will be judged: ordinary ones are recombined from their words, so that they are no "
        "stranger to the model",
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
    like = None if arguments.like is None else list(read_prompts(arguments.like, [], None, arguments.column))
    prompts, ordinary = common.ordinary_prompts_of(arguments, arguments.prompts_file, like, arguments.count)
    model = common.load_model(arguments)
    unread = common.too_long(model, prompts)
    if len(unread) == len(prompts):
        raise PromptTooLong(unread[0])
    prompts = [prompt for index, prompt in enumerate(prompts) if index not in unread]
    if unread and arguments.prompts_file is None:
        common.warn(
            f"{len(unread):,} ordinary prompts have more tokens than the model reads and are left out, as words that it does "
            "not know have many: calibrate with prompts like yours (--like)"
        )
        unread = {}
    path = arguments.out or store.path_for(setting_of(model, wanted))
    if not arguments.replace:
        store.check_kept(path, store.Size(len(prompts), min(arguments.full_runs, len(prompts)), wanted.images))
    for why in unread.values():
        common.warn(f"not measured: {why}")
    profile, left_out = measured(model, prompts, wanted, arguments.full_runs, arguments.batch_size, ordinary)
    store.keep(profile, path, arguments.replace)
    told = [calibrated(profile, wanted.images)]
    if like is not None and _misfit(model, like, wanted, profile, arguments.batch_size):
        told.append(misfit(advice="give more of them"))
    summary = {
        "profile": str(path),
        "ordinary": ordinary,
        "prompts": len(profile.nulls),
        "styles": dict(Counter(null.style for null in profile.nulls)),
        "median": profile.quantile(0.5, "first step", wanted.images),
        "q99": profile.quantile(0.99, "first step", wanted.images),
    }
    if arguments.json:
        common.print_json(summary)
    else:
        common.tell("\n".join([*told, f"saved as {path}"]))
    return common.EXIT_NOT_MEASURED if left_out or unread else 0


def measured(
    model: Model, prompts: Sequence[str], wanted: Measurement, full_runs: int, batch_size: int, ordinary: Ordinary
) -> tuple[Profile, bool]:
    """The calibration that these ordinary prompts give, and whether some were left out, each with a warning."""
    left_out: dict[str, str] = {}
    with common.progress_bar(Console(stderr=True)) as bar:
        tasks = {"first step": bar.add_task("ordinary prompts", total=len(prompts))}
        if full_runs:
            tasks["whole runs"] = bar.add_task("whole runs", total=min(full_runs, len(prompts)))
        profile = calibrate(
            model,
            prompts,
            wanted,
            full_runs,
            batch_size,
            lambda stage: bar.advance(tasks[stage]),
            left_out.__setitem__,
            ordinary,
        )
    for prompt, why in left_out.items():
        common.warn(f"not measured: {prompt}: {why}")
    return profile, bool(left_out)


def _misfit(model: Model, given: list[str], wanted: Measurement, profile: Profile, batch_size: int) -> bool:
    """Whether the nulls are stranger to the model than the prompts that they were made from."""
    unread = common.too_long(model, given)
    readable = [prompt for index, prompt in enumerate(given) if index not in unread]
    first_step = replace(wanted, score="first step")
    measured = measure(model, spread(readable, GIVEN), first_step, batch_size)
    scores = [float(one.scores.mean()) for one in measured if one.scores is not None]
    return stranger_nulls(scores, profile.null_scores("first step", wanted.images))
