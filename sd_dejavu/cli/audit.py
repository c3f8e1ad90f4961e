"""Does this checkpoint or LoRA copy the images it was trained with?

--dataset takes what trainers take: a folder of images with captions, read as your trainer reads it, webdataset tars,
shards of Parquet; or captions alone: a list, or shards of Parquet without images. --lora takes one file, or the files (or the folder) of all saved epochs.
DIR gets report.html, audit.json and, where pyarrow is installed, audit.parquet. A stopped audit goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table

from ..hosts.diffusers.audit import Load
from ..kept import LOCK, file_digest, locked, replacing, write_bytes, write_text
from ..reference.build import BuildSettings
from ..reference.features import Features, FeatureSettings
from ..reference.nearest import same_features
from ..reference.reference_set import ReferenceSet
from ..reference.sources import caption_tables
from ..report.audit_html import AuditPage, render_audit
from ..report.audit_rows import (
    figures,
    json_pieces,
    notes,
    ranked,
    row_as_json,
    sentence,
    settings_shown,
    thumbnails_of,
    verdict_of,
)
from ..report.terminal import plain
from ..run.measure import Measurement
from ..training.audit import (
    Audit,
    AuditSettings,
    Entry,
    LoraFile,
    Row,
    Subject,
    audit,
    entries_of,
    identity,
    lora_files,
    ordinary_for,
    sampled,
)
from ..training.engines import Cluster, on_ray
from ..training.ledger import Ledger
from ..training.tasks import Engine, Work, one_process
from . import common
from .prompt_files import read_prompts
from .refset import built, check_device

LIST_ENDINGS = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")
FIXED = ("score", "alpha")  # an audit measures the first step, and corrects for many tests instead
SHOWN = 15
WRITTEN_AT_ONCE = 10_000  # rows of a table
FEATURES = "grey"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what is audited")
    what.add_argument("--dataset", metavar="DIR", help="the training set: images with captions, or captions alone")
    what.add_argument("--reference", type=Path, metavar="REFSET", help="a reference set of it, built before")
    what.add_argument(
        "--lora", type=Path, nargs="+", metavar="FILE", help="a LoRA, or all saved epochs, or their folder"
    )
    what.add_argument("--base", metavar="MODEL", help="the model that a checkpoint was trained from")
    common.add_model_options(parser)
    common.add_settings(parser, AuditSettings, "audit")
    common.add_settings(parser, Measurement, "measurement", leave_out=FIXED)
    own_features = {"features": FEATURES}
    common.add_settings(
        parser, FeatureSettings, "what compares drawn images with training images", defaults=own_features
    )
    common.add_settings(parser, BuildSettings, "reading the training set", leave_out=("thumbnail_side",))
    own = parser.add_argument_group("ordinary prompts")
    own.add_argument(
        "--null-prompts",
        type=Path,
        metavar="FILE",
        help="your own ordinary prompts (default: recombined from the captions' words, so that they are no stranger to "
        "the model, or generated where the captions share too few)",
    )
    own.add_argument("--column", help="column or key that holds the captions of a list, or the ordinary prompts")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="local: this process; ray: a cluster"
    )
    common.add_settings(parser, Cluster, "with --engine ray")
    where.add_argument("--out", type=Path, default=Path("dejavu-audit"), metavar="DIR", help="default: dejavu-audit")
    where.add_argument(
        "--json", type=common.new_file, metavar="FILE", help="the rows as JSON here too ('-' for standard output)"
    )
    where.add_argument("--restart", action="store_true", help="drop what is in DIR and begin anew")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(AuditSettings, arguments)
    measurement = common.from_arguments(Measurement, arguments)
    check_device(arguments.device)
    loras = lora_files(arguments.lora or [])
    load = Load(
        arguments.model, arguments.config, arguments.device, arguments.dtype, arguments.prompt_weights, arguments.base
    )
    engine = _engine(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with locked(arguments.out, arguments.out / LOCK):
        try:
            return _audited(arguments, wanted, measurement, loras, load, engine)
        except KeyboardInterrupt:
            common.warn("stopped: the same command goes on where it stood")
            raise


def _audited(
    arguments: argparse.Namespace,
    wanted: AuditSettings,
    measurement: Measurement,
    loras: list[LoraFile],
    load: Load,
    engine: Engine,
) -> int:
    with common.progress_bar(Console(stderr=True)) as bar:
        show = common.stages(bar)
        subject = subject_of(arguments, wanted.sample, measurement.seed, arguments.out / "images", show)
        ordinary = _ordinary(arguments, subject, wanted.nulls)
        begun = identity(
            subject,
            ordinary,
            measurement,
            partition=wanted.partition,
            model=common.model_told(arguments.model),
            base="" if arguments.base is None else common.model_told(arguments.base),
            loras=[f"{lora.path.name} {file_digest(lora.path)}" for lora in loras],
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            prompt_weights=arguments.prompt_weights,
        )
        ledger = Ledger(arguments.out / "tasks", begun, arguments.restart)
        work = Work(measurement, arguments.batch_size)
        found = audit(subject, loras, ordinary, load, work, ledger, wanted, engine, show, arguments.base is not None)
    name = "bundled model" if arguments.model is None else str(arguments.model)
    _write(found, [lora.path.name for lora in loras], arguments, subject, name, wanted, measurement)
    if str(arguments.json) != "-":
        _print(found, arguments.out)
    return 0


def _ordinary(arguments: argparse.Namespace, subject: Subject, count: int) -> list[str]:
    def generated(count: int) -> list[str]:
        return common.ordinary_prompts_of(arguments, arguments.null_prompts, None, count)[0]

    return generated(count) if arguments.null_prompts is not None else ordinary_for(subject.entries, count, generated)


def _engine(arguments: argparse.Namespace) -> Engine:
    cluster = common.from_arguments(Cluster, arguments)
    return on_ray(cluster) if arguments.engine == "ray" else one_process


def subject_of(arguments: argparse.Namespace, sample: int, seed: int, images: Path, show: Any) -> Subject:
    """The training set as entries, from a reference set that is built at ``images`` where none is named."""
    if (arguments.dataset is None) == (arguments.reference is None):
        raise ValueError("name the training set with --dataset, or a reference set of it with --reference")
    if arguments.dataset is not None and (entries := _captions_alone(arguments, Path(arguments.dataset))):
        return Subject(sampled(entries, sample, seed))
    features: Features
    if arguments.reference is not None:
        reference = ReferenceSet.load(arguments.reference)
        features = same_features(reference, arguments.weights, arguments.device)
    else:
        reference, features = built(arguments, Path(arguments.dataset), images, show)
    return Subject(sampled(entries_of(reference), sample, seed), reference, features)


def _captions_alone(arguments: argparse.Namespace, dataset: Path) -> list[Entry]:
    """Of a list, or of Parquet files without images; none where there are images."""
    if dataset.suffix.lower() in LIST_ENDINGS:
        captions = read_prompts(dataset, [], None, arguments.column)
        return [Entry(f"line {number}", caption) for number, caption in enumerate(captions, 1)]
    reading = common.from_arguments(BuildSettings, arguments).reading
    if arguments.column and not reading.caption_column:
        reading = replace(reading, caption_column=arguments.column)
    found: list[Entry] = []
    if (tables := caption_tables(dataset, reading)) is not None:
        for record in tables.records():
            if record.fault:
                raise ValueError(f"{record.name}: {record.fault}: mend it, or take it out")
            found.append(Entry(record.name, record.caption))
        if not any(entry.caption for entry in found):
            raise ValueError(f"{dataset} holds no captions: name the column of text that holds them with --column")
    return found


# ---------------------------------------------------------------------------------------------- output


def _write(
    found: Audit,
    loras: list[str],
    arguments: argparse.Namespace,
    subject: Subject,
    name: str,
    wanted: AuditSettings,
    measurement: Measurement,
) -> None:
    with replacing(arguments.out / "audit.json") as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json_pieces(found, name, loras))
    if str(arguments.json) == "-":
        sys.stdout.writelines(json_pieces(found, name, loras))
    elif arguments.json is not None:
        with arguments.json.open("w", encoding="utf-8") as file:
            file.writelines(json_pieces(found, name, loras))
    if importlib.util.find_spec("pyarrow") is not None:
        with replacing(arguments.out / "audit.parquet") as partial:
            _write_parquet(found, partial)
    dataset = Path(arguments.dataset or arguments.reference).name
    shown = settings_shown(found, wanted, measurement, subject)
    page = AuditPage(found, name, ", ".join(loras), dataset, thumbnails_of(found, subject), shown)
    write_text(arguments.out / "report.html", render_audit(page))
    if subject.reference is not None:
        folder = arguments.out / "drawn"
        folder.mkdir(exist_ok=True)
        for number, row in enumerate((row for row in found.rows if row.images), 1):
            for image, data in enumerate(row.images, 1):
                write_bytes(folder / f"row-{number:03d}-image-{image}.png", data)


def _write_parquet(found: Audit, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def columns(of: Any, names: Iterable[str]) -> list[tuple[str, Any]]:
        hints = get_type_hints(of)
        return [(name, column(hints[name])) for name in names]

    def column(hint: Any) -> Any:
        kinds = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
        if NoneType in get_args(hint):
            hint = get_args(hint)[0]
        if get_origin(hint) is tuple:
            return pa.list_(column(get_args(hint)[0]))
        return pa.struct(columns(hint, [f.name for f in fields(hint)])) if is_dataclass(hint) else kinds[hint]

    schema = pa.schema(columns(Row, row_as_json(Row("", ""))))
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, len(found.rows), WRITTEN_AT_ONCE):
            rows = [row_as_json(row) for row in found.rows[start : start + WRITTEN_AT_ONCE]]
            file.write_table(pa.Table.from_pylist(rows, schema))


def _print(found: Audit, out: Path) -> None:
    common.tell("\n".join([f"{sentence(found)}.", *notes(found)]))
    worst = [row for row in ranked(found) if row.flagged or row.copies or row.parts]
    if worst:
        table = Table("verdict", "image", "caption", found.counts, "q", "copies", "of a part", "suggestion")
        for row in worst[:SHOWN]:
            shown, told = figures(row), [plain(text) for text in (row.image, row.caption, row.suggestion)]
            table.add_row(
                verdict_of(row), *told[:2], *(shown[name] for name in ("score", "q", "copies", "parts")), told[2]
            )
        Console().print(table)
        if len(worst) > SHOWN:
            common.tell(f"and {len(worst) - SHOWN:,} more")
    common.tell(f"The report with the images: {out / 'report.html'}")
