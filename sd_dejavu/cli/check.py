"""Check prompts: a score, a p-value and a verdict each.

Only the first sampling step is run unless --score asks for more; words are named for flagged prompts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from rich.console import Console

from ..explain.views import explain
from ..measure import Measurement, judge, setting_of
from ..report.terminal import verdict_panel
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_prompt_options(parser)
    common.add_model_options(parser)
    common.add_settings(parser, Measurement, "measurement")
    parser.add_argument(
        "--explain", choices=("never", "flagged", "always"), default="flagged", help="name words (default: flagged)"
    )
    parser.add_argument("--fail-on-flag", action="store_true", help="exit with status 3 when a prompt is flagged")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    prompts = common.prompts_of(arguments)
    model = common.load_model(arguments)
    profile, setting = common.profile_of(arguments, model, wanted), setting_of(model, wanted)
    output, flagged = Console(), 0
    for measured in common.measured_in_chunks(model, prompts, wanted, arguments.batch_size, Console(stderr=True)):
        verdict = judge(measured, wanted, setting, profile)
        flagged += bool(verdict.flagged)
        if measured.scores is not None and (
            arguments.explain == "always" or (arguments.explain == "flagged" and verdict.flagged)
        ):
            words = explain(model, model.encode(measured.prompt), wanted, batch_size=arguments.batch_size)
            verdict = judge(measured, wanted, setting, profile, words)
        if arguments.json:
            print(
                json.dumps({**verdict.as_json(), "settings": asdict(wanted), "model": model.name}, ensure_ascii=False)
            )
        else:
            output.print(verdict_panel(verdict))
    if not arguments.json and len(prompts) > 1:
        output.print(f"{flagged} of {len(prompts)} prompts flagged at alpha = {wanted.alpha:g}")
    return 3 if arguments.fail_on_flag and flagged else 0
