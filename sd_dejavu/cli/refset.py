"""Build a reference set from training images, and ask whether an image is a copy of one of them.

refset build SOURCE OUT        from a folder, webdataset tars or Parquet files
refset search REFSET IMAGE...  the nearest training images
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..kept.foreign import IMAGE_BYTES, Unreadable, contents
from ..reference.build import BuildSettings, build, embed, only_writer
from ..reference.features import KINDS, Features, FeatureSettings, load
from ..reference.images import ImageError, open_image, to_tensor
from ..reference.left_out import notes_in_short
from ..reference.nearest import answer, same_features
from ..reference.parts import PartIndex, part_index
from ..reference.qdrant import QdrantSearch
from ..reference.reference_set import ReferenceSet, files_of
from ..report.terminal import plain
from ..report.wording import part_sentence, skipped
from . import common

BUNDLED = "bundled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    making = actions.add_parser("build", help="make a reference set", description=_build.__doc__)
    making.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of images with their captions as a trainer reads them, webdataset .tar or .parquet (or a folder of "
        "those); 'bundled' for the bundled model's training images",
    )
    making.add_argument("out", type=Path, metavar="OUT", help="the set becomes OUT.safetensors and OUT.json")
    common.add_settings(making, FeatureSettings, "features")
    common.add_settings(making, BuildSettings, "building")
    making.add_argument("--restart", action="store_true", help="drop what is there under this name and begin anew")
    making.set_defaults(do=_build)
    asking = actions.add_parser("search", help="is this image a copy?", description=_search.__doc__)
    asking.add_argument("refset", type=Path, metavar="REFSET", help="a reference set's .json or .safetensors")
    asking.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    asking.add_argument("--count", type=common.positive, default=5, help="nearest images to show (default: 5)")
    asking.add_argument(
        "--threshold",
        type=float,
        help="similarity from which an image is called a copy (default: "
        + ", ".join(f"{name} {kind.copy:g}" for name, kind in KINDS.items() if kind.copy is not None)
        + "; none for the others)",
    )
    asking.add_argument(
        "--parts",
        action="store_true",
        help="also look for copies of parts of training images: tiles, crops, mirrored (grey, sscd; the set's thumbnails "
        "are embedded first)",
    )
    asking.add_argument("--weights", default="", help="the weights the set was made with, where it was with any")
    asking.add_argument(
        "--qdrant",
        metavar="PLACE",
        help="search in Qdrant: a server's http address (its key in QDRANT_API_KEY), or a folder for the embedded mode; "
        "'-' is a folder beside the set. Rows that are not there yet are uploaded",
    )
    asking.set_defaults(do=_search)
    for action in (making, asking):
        action.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
        action.add_argument("--batch-size", type=common.positive, default=32, help="images at a time (default: 32)")
    making.add_argument("--json", action="store_true", help="print what was made as one JSON object")
    asking.add_argument("--json", action="store_true", help="one JSON object an image, a line each")


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments.device)
    status: int = arguments.do(arguments)
    return status


def _build(arguments: argparse.Namespace) -> int:
    """Build a reference set. One that was stopped goes on where it stood when the command is given again."""
    bundled = arguments.source == BUNDLED and not Path(BUNDLED).exists()
    with common.progress_bar(Console(stderr=True)) as bar:
        if bundled:
            made = _bundled(arguments)
        else:
            made, _ = built(arguments, Path(arguments.source), arguments.out, common.stages(bar))
    summary = _summary(made, arguments.out)
    if arguments.json:
        common.print_json(summary)
        return 0
    common.tell(_told(summary))
    if lines := skipped(summary["skipped"], files_of(arguments.out)[1]):
        common.tell("\n".join(lines), stderr=True)
    return 0


def built(
    arguments: argparse.Namespace, source: Path, out: Path, show: Callable[[str, int, int], None]
) -> tuple[ReferenceSet, Features]:
    """The reference set of a source as the options ask for it, and its features."""
    chosen = common.from_arguments(FeatureSettings, arguments)
    features = load(chosen, arguments.device)
    wanted, how = common.from_arguments(BuildSettings, arguments), made_with(chosen)
    batch_size, device, restart = arguments.batch_size, arguments.device, arguments.restart
    return build(source, out, features, wanted, how, batch_size, device, restart, show), features


def _bundled(arguments: argparse.Namespace) -> ReferenceSet:
    from ..demo.reference import bundled_reference

    chosen = common.from_arguments(FeatureSettings, arguments)
    wanted = common.from_arguments(BuildSettings, arguments)
    with only_writer(arguments.out):
        if files_of(arguments.out)[1].exists() and not arguments.restart:
            raise ValueError(
                f"{files_of(arguments.out)[1]} is there already: give another name, or --restart to replace it"
            )
        made = bundled_reference(load(chosen, arguments.device), wanted.near_threshold, wanted.thumbnail_side)
        details = {"source": "the bundled model's training images", "made_with": made_with(chosen)}
        made = replace(made, details=details)
        made.save(arguments.out)
    return made


def made_with(chosen: FeatureSettings) -> dict[str, Any]:
    """What makes the same features again, but for the weights, whose place is another on every machine."""
    return {name: value for name, value in asdict(chosen).items() if name != "weights"}


def _summary(made: ReferenceSet, out: Path) -> dict[str, Any]:
    return {
        "refset": str(files_of(out)[1]),
        "source": made.details.get("source", ""),
        "images": len(made),
        "with_caption": sum(bool(caption) for caption in made.captions),
        "shown_in_an_epoch": int(made.duplicates.sum()),
        "with_duplicates": int((made.duplicates > 1).sum()),
        "with_near_duplicates": int((made.near_duplicates > 0).sum()) if int(made.near_duplicates.min()) >= 0 else None,
        "near_threshold": made.near_threshold,
        "features": made.features,
        "metric": made.metric,
        "skipped": made.details.get("skipped", []),
        "notes": made.details.get("notes", []),
    }


def _told(summary: dict[str, Any]) -> str:
    near = summary["with_near_duplicates"]
    return (
        f"{summary['source']}: {summary['images']} different images, {summary['with_caption']} with a caption, "
        f"{summary['shown_in_an_epoch']} shown in an epoch\n"
        f"{summary['with_duplicates']} more than once; "
        + ("near duplicates not counted" if near is None else f"{near} with near duplicates")
        + f" (similarity above {summary['near_threshold']:g})\n"
        f"features {summary['features']}, {summary['metric']}\n"
        + "".join(f"{note}\n" for note in notes_in_short(summary["notes"]))
        + f"saved as {summary['refset']}"
    )


def _search(arguments: argparse.Namespace) -> int:
    """The training images nearest to each image, with similarity, caption and duplicate count."""
    reference = ReferenceSet.load(arguments.refset)
    features = same_features(reference, arguments.weights, arguments.device)
    images = [_image(path) for path in arguments.images]
    queries = [embed(features, [image], device=arguments.device) for image in images]
    with ExitStack() as stack:
        parts: PartIndex | None = None
        if arguments.parts:
            with common.progress_bar(Console(stderr=True)) as bar:
                show = partial(common.stages(bar), "cutting into parts")
                batch_size, device, threshold = arguments.batch_size, arguments.device, arguments.threshold
                parts = part_index(reference, features, None, batch_size, device, threshold, show)
        searched: ReferenceSet | QdrantSearch
        if arguments.qdrant is None:
            searched = reference.to(arguments.device)
        else:
            beside = str(files_of(arguments.refset)[0].with_suffix(".qdrant"))
            bar = stack.enter_context(common.progress_bar(Console(stderr=True)))
            place = beside if arguments.qdrant == "-" else arguments.qdrant
            show = partial(common.stages(bar), "uploading")
            searched = stack.enter_context(QdrantSearch(reference, place, show))
        for path, image, query in zip(arguments.images, images, queries, strict=True):
            found = searched.search(query, arguments.count)
            record = {"image": str(path), **answer(reference, found, 0, arguments.threshold).as_json()}
            part = parts.search([image])[0] if parts is not None else None
            if part is not None:
                record["part"] = part.as_json()
            if arguments.json:
                common.print_json(record)
            else:
                Console().print(_table(record))
                if part is not None:
                    common.tell(part_sentence(part))
    return 0


def _image(path: Path) -> torch.Tensor:
    """[1, 3, H, W] in 0..1."""
    try:
        return to_tensor(open_image(contents(path, IMAGE_BYTES)))
    except ImageError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    except Unreadable as error:
        raise ValueError(f"{path}: {error}") from error


def _table(record: dict[str, Any]) -> Table:
    answers = {True: "a copy", False: "no copy found", None: "nearest training images"}
    limit = record["why"] or f"a copy from {record['threshold']:g} on"
    table = Table("similarity", "times shown", "near duplicates", "training image", "caption")
    table.title = plain(
        f"{record['image']}: {answers[record['copy']]} ({record['metric']}; {limit})", style="table.title"
    )
    table.title_justify = "left"
    for row in record["neighbours"]:
        near = str(row["near_duplicates"]) if row["near_duplicates"] >= 0 else "-"
        table.add_row(
            f"{row['similarity']:.3f}", str(row["duplicates"]), near, plain(row["name"]), plain(row["caption"])
        )
    return table


def check_device(name: str) -> None:
    """Raises ValueError for a device that is not there, or holds no values."""
    try:
        torch.zeros(1, device=name).item()  # 'meta' holds no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used here: give cpu, cuda, cuda:1 or mps") from error
