"""Which words of a prompt make it score high?

Views: 'input gradient' (through the text encoder), 'output gradient' (as published), 'leave one out' (what the
score would be without each word), and 'confirmed gradient' (the first and the third together, the default).
"""

from __future__ import annotations

import argparse
from typing import get_args

from rich.console import Console
from rich.table import Table

from ..core.verdict import Verdict, View
from ..report.terminal import plain
from ..run.measure import Measurement, setting_of, verdict_on
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_prompt_options(parser)
    common.add_model_options(parser)
    common.add_settings(parser, Measurement, "measurement")
    parser.add_argument("--view", choices=get_args(View), help="how words are judged (default: confirmed gradient)")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    prompts = common.prompts_of(arguments)
    model = common.load_model(arguments)
    profile, setting = common.profile_of(arguments, model, wanted), setting_of(model, wanted)
    output, missing = Console(), False
    for measured in common.measured_in_chunks(model, prompts, wanted, arguments.batch_size, Console(stderr=True)):
        words, why = common.words_of(model, measured.prompt, wanted, arguments.view, arguments.batch_size)
        verdict = verdict_on(measured, wanted, setting, profile, words)
        missing = missing or not measured.per_step or bool(why)
        common.print_verdict(verdict, wanted, model, arguments.json, why)
        if words is not None and not arguments.json:
            output.print(_table(verdict))
    return common.EXIT_NOT_MEASURED if missing else 0


def _table(verdict: Verdict) -> Table:
    assert verdict.explanation is not None  # run() has just made it
    table = Table("word", "significance", verdict.explanation.raw_unit)
    left_out = verdict.explanation.view == "leave one out" and verdict.score is not None
    if left_out:
        table.add_column("score without it")
    for word in sorted(verdict.explanation.words, key=lambda w: -w.raw):
        row = [word.text, f"{word.significance:.2f}", f"{word.raw:.4g}"]
        if left_out and verdict.score is not None:
            row.append(f"{verdict.score - word.raw:.3f}")
        table.add_row(*map(plain, row))
    return table
