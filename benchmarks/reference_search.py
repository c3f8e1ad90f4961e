"""Exact search in a reference set: seconds a search, by metric and batch.

    python benchmarks/reference_search.py [--rows 1000000] [--width 512] [--device cpu] [--json FILE]

Rows are random: an exact search looks at all of them, so what they hold does not matter. The first search of each
kind is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sd_dejavu.reference.reference_set import ReferenceSet, Thumbnails

METRICS = ("cosine", "normalised L2")
NEIGHBOURS = 10


def random_set(count: int, width: int, metric: Any, device: str) -> ReferenceSet:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    if metric == "cosine":
        rows /= rows.norm(dim=1, keepdim=True)
    nothing = torch.zeros(count, dtype=torch.int64)
    text = ("",) * count
    return ReferenceSet(rows.to(device), text, text, nothing, nothing, Thumbnails(nothing.byte(), nothing), "", metric)


def seconds(reference: ReferenceSet, queries: torch.Tensor, repeats: int) -> list[float]:
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        reference.search(queries, NEIGHBOURS).index.cpu()  # waits for the device
        found.append(time.perf_counter() - began)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = []
    for metric in METRICS:
        reference = random_set(arguments.rows, arguments.width, metric, arguments.device)
        for batch in arguments.batches:
            queries = torch.randn(batch, arguments.width, generator=torch.Generator().manual_seed(1))
            times = seconds(reference, queries.to(arguments.device), arguments.repeats)
            measured.append(
                {
                    "metric": metric,
                    "batch": batch,
                    "seconds_median": statistics.median(times),
                    "seconds_highest": max(times),
                }
            )
        del reference
    cuda = arguments.device.startswith("cuda")
    result = {
        "rows": arguments.rows,
        "width": arguments.width,
        "neighbours": NEIGHBOURS,
        "repeats": arguments.repeats,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "searches": measured,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
