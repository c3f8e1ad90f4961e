"""Fine-tune a checkpoint or train a LoRA, leaving out of the loss what the model is memorising.

A run that was stopped, in whatever way, goes on where it stood when the same command is given again.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from ..reference.reading import Reading
from ..reference.sources import open_source
from ..report.wording import skipped
from ..training.filter import FilterSettings
from ..training.finetune import FinetuneSettings, Stopped, finetune
from . import common
from .refset import check_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="diffusers folder, checkpoint file or hub id (default: the bundled model)")
    parser.add_argument("--config", help="diffusers folder or hub id that describes a checkpoint file of unusual sizes")
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of images with their captions as a trainer reads them, webdataset .tar or .parquet (or a folder of "
        "those)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the result, logs and states")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    common.add_settings(parser, Reading, "reading the training set")
    common.add_settings(parser, FinetuneSettings, "training")
    common.add_settings(parser, FilterSettings, "filter")
    parser.add_argument(
        "--json", type=common.new_file, metavar="FILE", help="write the summary as JSON ('-' prints it)"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..hosts.diffusers.load import load

    wanted = common.from_arguments(FinetuneSettings, arguments)
    filtering = common.from_arguments(FilterSettings, arguments)
    source = open_source(arguments.dataset, common.from_arguments(Reading, arguments))
    if ":" in arguments.device:
        raise ValueError(
            f"device must be cpu, cuda or mps, not {arguments.device}: choose one with CUDA_VISIBLE_DEVICES"
        )
    check_device(arguments.device)
    model = load(arguments.model, arguments.device, config=arguments.config)
    with common.progress_bar(Console(stderr=True)) as bar, _stopping() as stop:
        try:
            summary = finetune(model, source, arguments.out, wanted, filtering, common.stages(bar), stop)
        except Stopped as stopped:
            common.tell(stopped, stderr=True)
            raise KeyboardInterrupt from stopped
    if arguments.json is not None:
        text = common.json_text(summary, indent=1)
        if str(arguments.json) == "-":
            print(text)
            return 0
        arguments.json.write_text(text + "\n", encoding="utf-8")
    common.tell(_told(summary, arguments.out))
    return 0


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """While open, the first SIGTERM or Ctrl-C asks for a stop after the step at hand; the second acts as ever."""
    asked = False
    before: dict[int, Any] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])

    for asking in (signal.SIGTERM, signal.SIGINT):
        before[asking] = signal.signal(asking, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(summary: dict[str, Any], out: Path) -> str:
    counts = summary["filter"]
    lines = [
        f"{summary['source']}: {summary['samples']} samples, {summary['shown_in_an_epoch']} shown in an epoch; "
        f"{summary['steps']} steps, {summary['trained_parameters']:,} parameters trained"
    ]
    if counts is None:
        lines.append("no filter: every sample stayed in the loss")
    else:
        lines.append(
            f"left out of the loss: {counts['left_out']} of {counts['seen']} samples"
            f" ({1 - counts['kept_share']:.1%}), {counts['not_finite']} of them as not finite; "
            f"{counts['kept_alone']} stayed only because their whole batch would have gone (see {out / 'filter.jsonl'}); "
            f"{counts['measured']} were measured"
        )
    lines += skipped(summary["skipped"], out / "result.json")
    return "\n".join([*lines, f"saved as {out / summary['result']}"])
