"""Make of a LoRA that copies its training set one that does not, and say what that costs in likeness.

Several ways of holding parts of the LoRA back are tried, each more and more: its strength, the layers that read the prompt,
and its spectral channels that agree least with the base model. Copies are counted among images drawn of the captions that it
brings back most; likeness is what is kept of its style, 1 as the LoRA and 0 as the base model. FILE gets the best of all.
Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..calibration.store import user_folder
from ..hosts.diffusers.audit import Load
from ..reference.build import BuildSettings
from ..reference.features import FeatureSettings
from ..report.repair_rows import HEAD, cells, sentence
from ..run.measure import Measurement
from ..training.audit import OTHERS, ordinary_for
from ..training.repair import Repaired, RepairSettings, repair
from ..training.tasks import Work
from . import common
from .audit import FEATURES, FIXED, subject_of
from .refset import check_device

IMAGES = 2  # of each caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("lora", type=Path, metavar="LORA", help="the LoRA, a .safetensors file of any kind")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the repaired LoRA, a new .safetensors file"
    )
    parser.add_argument("--dataset", metavar="DIR", help="the training set: images with captions")
    parser.add_argument("--reference", type=Path, metavar="REFSET", help="a reference set of it, built before")
    common.add_model_options(parser)
    common.add_settings(parser, RepairSettings, "repair")
    common.add_settings(parser, Measurement, "drawing", leave_out=FIXED, defaults={"images": IMAGES})
    features = {"features": FEATURES}
    common.add_settings(parser, FeatureSettings, "what compares drawn images with training images", defaults=features)
    common.add_settings(parser, BuildSettings, "reading the training set", leave_out=("thumbnail_side",))
    parser.add_argument(
        "--null-prompts",
        type=Path,
        metavar="FILE",
        help="your own ordinary prompts (default: recombined from captions)",
    )
    parser.add_argument("--column", help="column or key that holds the ordinary prompts")
    parser.add_argument(
        "--json", type=common.new_file, metavar="FILE", help="the finding as JSON ('-' for standard output)"
    )
    parser.set_defaults(restart=False)


def run(arguments: argparse.Namespace) -> int:
    from ..hosts.diffusers.load import load
    from ..hosts.diffusers.repair import places_of

    wanted = common.from_arguments(RepairSettings, arguments)
    measurement = common.from_arguments(Measurement, arguments)
    check_device(arguments.device)
    model, config, device, dtype = arguments.model, arguments.config, arguments.device, arguments.dtype
    with tempfile.TemporaryDirectory() as folder, common.progress_bar(Console(stderr=True)) as bar:
        show = common.stages(bar)
        subject = subject_of(arguments, 0, measurement.seed, Path(folder) / "images", show)

        def generated(count: int) -> list[str]:
            return common.ordinary_prompts_of(arguments, arguments.null_prompts, None, count)[0]

        count = wanted.ordinary + OTHERS
        own = arguments.null_prompts is not None
        ordinary = generated(count) if own else ordinary_for(subject.entries, wanted.ordinary, generated)
        found = repair(
            subject,
            arguments.lora,
            arguments.out,
            ordinary,
            Load(model, config, device, dtype, arguments.prompt_weights),
            lambda contents: places_of(load(model, device, dtype, config), contents),
            Work(measurement, arguments.batch_size),
            user_folder() / "repairs",
            wanted,
            on_progress=show,
            model=common.model_told(model),
            dtype=dtype,
            batch_size=arguments.batch_size,
            prompt_weights=arguments.prompt_weights,
        )
    common.write_rows(found.as_json(), arguments.json, None)
    if str(arguments.json) != "-":
        _print(found, arguments.out)
    return 0


def _print(found: Repaired, out: Path) -> None:
    table = Table(*HEAD)
    for point in found.curve:
        table.add_row(*cells(point))
    Console().print(table)
    common.tell(f"{sentence(found)}\nThese are from other noises than those above. Saved as {out}")
