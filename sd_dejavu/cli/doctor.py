"""What works on this machine, and what does not, and why: packages, devices, gradients, the bundled model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console

from ..demo import bundled
from ..doctor import Finding, findings, headline, in_lines, timed, version
from ..report.terminal import plain
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_device_options(parser)
    parser.add_argument("--json", action="store_true", help="one object a line")


def run(arguments: argparse.Namespace) -> int:
    output = Console()
    with Console(stderr=True).status("Looking at packages, devices, gradients and the bundled model"):
        every = list(_all(arguments))
    if arguments.json:
        for found in every:
            common.print_json(asdict(found))
    else:
        for line in (headline(every), *(line for found in every for line in in_lines(found))):
            output.print(plain(line), soft_wrap=True)
    return common.EXIT_NOT_MEASURED if any(found.works is False for found in every) else 0


def _all(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield Finding("Déjà Vu", version())
    yield from findings()
    yield timed(lambda: _first_verdict(arguments), "the bundled model", "send this line with your report of the fault")


def _first_verdict(arguments: argparse.Namespace) -> str:
    """A memorised and an ordinary caption measured, on the device and in the precision asked for."""
    from ..hosts.diffusers.load import load
    from ..run.measure import Measurement, measure

    model = load(device=arguments.device, dtype=arguments.dtype)
    prompts = [bundled.held_out_memorised(at_least=1)[0], bundled.held_out_ordinary(1, seed=1)[0]]
    measured = measure(model, prompts, Measurement(images=1))
    memorised, ordinary = (0.0 if found.scores is None else float(found.scores.mean()) for found in measured)
    if not memorised > ordinary:
        raise ValueError(f"a memorised caption scores {memorised:.2f}, an ordinary one {ordinary:.2f}")
    return f"memorised {memorised:.2f}, ordinary {ordinary:.2f} on {arguments.device} in {arguments.dtype}"
