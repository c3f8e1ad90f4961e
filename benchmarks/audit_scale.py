"""How an audit's memory and time grow with the captions, without a model: a stub gives values and pictures at once.

Captions alone, and captions with images in a reference set on disk; each size in a process of its own, whose memory is
looked at all the while, without what is mapped from files (RssAnon of Linux). The captions themselves and their rows are
in it. Seconds are the processor's, and all the audit's own: tasks, ledger, thumbnails, judging. Then the same audit again,
when nothing is left to measure: that is what reading the ledger and judging take.

    python benchmarks/audit_scale.py [--json FILE] [--captions 2000 8000 32000]
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import platform
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sd_dejavu.reference.build import embed
from sd_dejavu.reference.features import Grey
from sd_dejavu.reference.images import thumbnail
from sd_dejavu.reference.reference_set import ReferenceSet, Thumbnails
from sd_dejavu.report.audit_rows import json_pieces
from sd_dejavu.run.measure import Measurement
from sd_dejavu.training.audit import Audit, AuditSettings, Entry, Subject, audit, entries_of, identity, ordinary_for
from sd_dejavu.training.ledger import Ledger
from sd_dejavu.training.tasks import Task, Work, nothing_apart

PARTS = ("captions alone", "images and captions")
WORDS, LENGTH = 2000, 12  # different words, and those of a caption: about 80 characters
SIDE = 128  # of a thumbnail, as a reference set keeps it
NULLS = 100  # ordinary prompts: what these take does not grow with the captions
MIB = 1 << 20


class Stub:
    """An engine that measures at random, and draws one of a few pictures: others of ordinary prompts than of captions."""

    def __init__(self) -> None:
        self._random = random.Random(1)
        self._pictures = {kind: pictures(64, seed) for seed, kind in enumerate(("stand-ins", "drawn"))}

    def __call__(
        self, tasks: Sequence[Task], load: object, work: object
    ) -> Iterator[tuple[Task, list[dict[str, Any]]]]:
        for task in tasks:
            yield task, [self._value(task, place) for place in range(len(task.prompts))]

    def _value(self, task: Task, place: int) -> dict[str, Any]:
        if task.kind in self._pictures:
            some = self._pictures[task.kind]
            return {"image": base64.b64encode(some[(task.first + place) % len(some)]).decode("ascii")}
        assert task.training[place].startswith(b"\xff\xd8")  # read, as a model would
        return {"magnitude": self._random.random(), "recovery": self._random.gauss(0, 1)}


def pictures(count: int, seed: int) -> list[bytes]:
    """JPEG files of about the size of a photograph's thumbnail."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((SIDE, SIDE))
        noisy = np.asarray(coarse, float) + rng.normal(0, 12, (SIDE, SIDE, 3))
        found.append(thumbnail(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), SIDE))
    return found


def captions_of(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(WORDS)]
    weights = [1 / (rank + 1) for rank in range(WORDS)]
    return [" ".join(rng.choices(words, weights, k=LENGTH)) for _ in range(count)]


def write_set(count: int, path: Path) -> None:
    few = pictures(64, 2)
    files = [few[n % len(few)] for n in range(count)]
    rows = torch.nn.functional.normalize(torch.randn(count, 1024, generator=torch.Generator().manual_seed(0)), dim=1)
    nothing = torch.zeros(count, dtype=torch.int64)
    names = tuple(f"{n:07d}.jpg" for n in range(count))
    grey = Grey()
    captions = tuple(captions_of(count))
    ReferenceSet(rows, captions, names, nothing + 1, nothing, Thumbnails.of(files), grey.name, grey.metric).save(path)


def in_memory() -> float:
    """MiB of this process that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Peak:
    """The most memory while it is open, looked at 50 times a second."""

    def __enter__(self) -> Peak:
        self.highest, self._over = in_memory(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.highest = max(self.highest, in_memory())

    def __exit__(self, *fault: object) -> None:
        self._over.set()
        self._thread.join()


def measured(part: str, count: int, folder: Path) -> dict[str, Any]:
    """One size, in a process of its own."""
    torch.set_num_threads(1)
    embed(Grey(), [torch.rand(1, 3, SIDE, SIDE)])  # what torch takes once
    stub, begun, seconds = Stub(), in_memory(), dict[str, float]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = work()
        seconds[name] = time.process_time() - start
        return found

    with Peak() as peak:
        if part == PARTS[0]:
            subject = Subject([Entry(f"line {n}", caption) for n, caption in enumerate(captions_of(count), 1)])
        else:
            reference = ReferenceSet.load(folder / "set")
            subject = Subject(entries_of(reference), reference, Grey())
        given = in_memory()
        ordinary = timed("ordinary prompts", lambda: ordinary_for(subject.entries, NULLS, lambda wanted: []))
        wanted = AuditSettings(worst=0, nulls=NULLS)
        ledger = Ledger(folder / "tasks", identity(subject, ordinary, Measurement(), partition=wanted.partition))

        def whole() -> Audit:
            return audit(subject, [], ordinary, nothing_apart, Work(Measurement()), ledger, wanted, stub)

        timed("audit", whole)
        found = timed("audit again", whole)
        with (folder / "audit.json").open("w", encoding="utf-8") as file:
            timed("audit.json", lambda: file.writelines(json_pieces(found, "stub", [])))
    files = list((folder / "tasks").iterdir())
    return {
        "given": part,
        "captions": count,
        "mib_of_the_captions": given - begun,
        "mib_at_most": peak.highest - begun,
        "seconds": seconds,
        "files": len(files),
        "mib_on_disk": sum(file.stat().st_size for file in files) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, nargs="+", default=[2000, 8000, 32_000])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    apart = multiprocessing.get_context("spawn")
    found = []
    for part in PARTS:
        for count in arguments.captions:
            with tempfile.TemporaryDirectory() as name, apart.Pool(1, maxtasksperchild=1) as pool:
                if part == PARTS[1]:
                    pool.apply(write_set, (count, Path(name) / "set"))
                found.append(pool.apply(measured, (part, count, Path(name))))
            print(found[-1], flush=True)
            result = {"cpu": f"{platform.machine()}, one thread", "python": platform.python_version(), "rows": found}
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
