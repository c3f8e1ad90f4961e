"""Sample something else for a memorised prompt, and see what that costs.

With --out, images before and after are drawn from the same noise and saved with a report.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..calibration.profile import ORDINARY_QUANTILE, Profile
from ..core.denoiser import PromptTooLong
from ..core.memory import OutOfMemory, one_by_one
from ..kept import write_text
from ..mitigations import Mitigation, Start, available
from ..mitigations.guard import Guard
from ..reference.nearest import same_features
from ..reference.reference_set import ReferenceSet
from ..report.terminal import plain
from ..run.measure import Measurement, baseline_of
from . import common
from .cases import render_cases, run_case, save_images

TARGET_QUANTILE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    methods = available()
    common.add_prompt_options(parser)
    common.add_model_options(parser)
    common.add_settings(parser, Measurement, "measurement")
    parser.add_argument("--method", choices=tuple(methods), default="optimise-tokens", help="default: optimise-tokens")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="REFSET",
        help="amg: a reference set's .json or .safetensors (see refset build)",
    )
    parser.add_argument("--weights", default="", help="amg: the weights the reference set was made with, if any")
    parser.add_argument(
        "--target", type=float, help="magnitude to come down to (default: a quantile of ordinary prompts)"
    )
    parser.add_argument(
        "--target-quantile",
        type=float,
        default=TARGET_QUANTILE,
        help="quantile of ordinary prompts (default: 0.5, their median)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw images before and after, and a report, into DIR")
    for settings in dict.fromkeys(method.settings for method in methods.values()):
        users = _users(settings)
        common.add_settings(parser, settings, ", ".join(users), of=users[0])


def _users(settings: type) -> list[str]:
    """The methods that have these settings; their options are kept under the first one's name."""
    return [name for name, method in available().items() if method.settings is settings]


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    method = available()[arguments.method]
    chosen: Any = common.from_arguments(method.settings, arguments, _users(method.settings)[0])
    prompts = common.prompts_of(arguments)
    model = common.load_model(arguments)
    profile = common.profile_of(arguments, model, wanted)
    target = target_of(arguments.target, arguments.target_quantile, profile, wanted)
    unconditional = baseline_of(model, wanted)
    noise, sigma = model.noise(wanted.seed, wanted.images), model.sigmas(wanted.steps)[0]
    ordinary = None
    if profile is not None and arguments.target is None:
        ordinary = profile.quantile(ORDINARY_QUANTILE, "first step", wanted.images)
    guard, guided = guard_of(arguments), wanted.guidance_scale != 1
    start = Start.of(
        model, noise, sigma, unconditional, target, wanted.seed, ordinary, guard, arguments.batch_size, guided
    )
    output, cases, missing = Console(), [], False

    def mitigated(prompt: str) -> dict[str, Any]:
        if arguments.out is not None:
            case = run_case(model, prompt, wanted, profile, start, {arguments.method: chosen})
            cases.append(case)
            (outcome,) = (m.outcome for m in case.mitigated)
        else:
            outcome = method.apply(model, model.encode(prompt), start, chosen)
        return {
            "score": outcome.score_before,
            "score_after": outcome.score_after,
            "target": target,
            "prompt_after": outcome.conditioning.prompt,
            **outcome.details,
        }

    for index, prompt in enumerate(prompts):
        found: dict[str, Any] | OutOfMemory | PromptTooLong
        try:
            (found,) = one_by_one(lambda part: [mitigated(one) for one in part], [prompt])
        except PromptTooLong as error:
            if len(prompts) == 1:
                raise
            found = PromptTooLong(f"{common.place_of(prompts, index)}: {error}")
        if isinstance(found, (OutOfMemory, PromptTooLong)):
            found, missing = {"why": f"not mitigated: {found}"}, True
        common_to_all = {"settings": {**asdict(wanted), **asdict(chosen)}, "model": model.name}
        record: dict[str, Any] = {"prompt": prompt, "method": method.name, **found, **common_to_all}
        if arguments.json:
            common.print_json(record)
        else:
            output.print(_table(record, method))
    if cases:
        arguments.out.mkdir(parents=True, exist_ok=True)
        save_images(cases, arguments.out)
        report = arguments.out / "report.html"
        write_text(report, render_cases("Mitigation", f"method: {method.name}", model, wanted, profile, cases))
        common.tell(f"report: {report}", stderr=True)
    return common.EXIT_NOT_MEASURED if missing else 0


def guard_of(arguments: argparse.Namespace) -> Guard | None:
    """The reference images named by the user; for the bundled model its own training images, where none are."""
    if arguments.reference is not None:
        reference = ReferenceSet.load(arguments.reference)
        features = same_features(reference, arguments.weights, arguments.device)
        return Guard(features, reference.to(arguments.device), reference.captions)
    if arguments.model is not None:
        return None
    from ..demo.evaluation import bundled_guard

    return bundled_guard()


def target_of(absolute: float | None, quantile: float, profile: Profile | None, wanted: Measurement) -> float:
    """The magnitude to come down to. Raises ValueError when a quantile is wanted and nothing is calibrated."""
    if absolute is not None:
        if not 0 < absolute < math.inf:
            raise ValueError(f"the target must be a positive magnitude, not {absolute:g}")
        return absolute
    if not 0 <= quantile <= 1:
        raise ValueError(f"the target quantile must be between 0 and 1, not {quantile:g}")
    if profile is None:
        raise ValueError("there is no calibration profile to take the target from: calibrate, or give --target")
    return profile.quantile(quantile, "first step", wanted.images)


def _table(record: dict[str, object], method: Mitigation) -> Table:
    table = Table(
        title=plain(f"{method.name}: {method.help}", style="table.title"), title_justify="left", show_header=False
    )
    hidden = {"settings", "model", "method"}
    for key, value in record.items():
        if key in hidden:
            continue
        if isinstance(value, (tuple, list)):
            value = " -> ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in value)
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key.replace("_", " "), plain(shown))
    return table
