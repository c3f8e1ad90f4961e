"""Explain prompts: which words bring the magnitude about.

Views: 'input gradient' (through the text encoder), 'output gradient' (as published), 'leave one out' (what the
score would be without each word), and 'confirmed gradient' (the first and the third together, the default).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import get_args

from rich.console import Console
from rich.table import Table

from ..explain.views import explain
from ..measure import Measurement, judge, setting_of
from ..report.terminal import verdict_panel
from ..verdict import Verdict, View
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
    output = Console()
    for measured in common.measured_in_chunks(model, prompts, wanted, arguments.batch_size, Console(stderr=True)):
        conditioning = model.encode(measured.prompt)
        words = explain(model, conditioning, wanted, arguments.view, arguments.batch_size)
        verdict = judge(measured, wanted, setting, profile, words)
        if arguments.json:
            print(
                json.dumps({**verdict.as_json(), "settings": asdict(wanted), "model": model.name}, ensure_ascii=False)
            )
        else:
            output.print(verdict_panel(verdict))
            output.print(_table(verdict))
    return 0


def _table(verdict: Verdict) -> Table:
    assert verdict.explanation is not None  # run() has just made it
    table = Table("word", "significance", verdict.explanation.raw_unit)
    without = verdict.explanation.view == "leave one out" and verdict.score is not None
    if without:
        table.add_column("score without it")
    for word in sorted(verdict.explanation.words, key=lambda w: -w.raw):
        row = [word.text, f"{word.significance:.2f}", f"{word.raw:.4g}"]
        if without and verdict.score is not None:
            row.append(f"{verdict.score - word.raw:.3f}")
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table
