"""The repair of a LoRA in Automatic1111 and Forge: what is left of it lies in files of their own, and stands in prompts
like any LoRA of the host's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from ...calibration.ordinary_prompts import general_prompts
from ...core.settings import Checked, Option, named, option, options_of, same
from ...run.measure import Measurement
from ...training.audit import BASE, Subject, entries_of, ordinary_for
from ...training.lora_files import Contents
from ...training.repair import Repaired, RepairSettings, file_called, repair
from ...training.spectral import Place
from ...training.tasks import Variant, Work, nothing_apart
from . import audit, references
from .calibration import check_size
from .pieces import BATCH, Runs, TrainedModel, Watch, tag_of
from .run import Host

_numbers = count()  # of what was tried: the host takes two LoRAs of one name for the same


@dataclass(frozen=True)
class Repairing(Checked):
    """Which LoRA is repaired, and as what; the rest is as it is audited."""

    references: str = same(audit.Audited, "references")
    lora: str = same(audit.Audited, "lora")
    width: int = same(audit.Audited, "width")
    height: int = same(audit.Audited, "height")
    save_as: str = option("repaired", "what the new LoRA is called; it comes to lie beside the others")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.width, self.height)
        file_called(self.save_as)


_NOT_HERE = ("score", "negative", "baseline", "alpha")
_SETTINGS: tuple[type, ...] = (Repairing, RepairSettings, Measurement)
OPTIONS: tuple[Option, ...] = tuple(o for kind in _SETTINGS for o in options_of(kind) if o.name not in _NOT_HERE)


@dataclass(frozen=True)
class Asked:
    what: Repairing
    wanted: RepairSettings
    measurement: Measurement


def read(values: Mapping[str, object]) -> Asked:
    """From values by their names; what is missing has its default. Raises ValueError naming what is wrong."""
    given = named(values, OPTIONS, "a repair")
    return Asked(*(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in _SETTINGS))


@dataclass(frozen=True)
class Finding:
    """A repair, and the file that it has written."""

    repaired: Repaired
    out: Path

    def as_json(self) -> dict[str, Any]:
        return {"lora": self.out.stem, **self.repaired.as_json()}


def run_repair(
    host: Host,
    asked: Asked,
    sets: Path,
    kept: Path,
    watch: Watch,
    tell: Callable[[str, int, int], None],
) -> Finding:
    """``sets`` holds the reference sets, ``kept`` what was measured, until the new LoRA is written.

    Raises ValueError where the LoRA or the set cannot be used, a LoRA has the new one's name, or the user stops it;
    nothing is written then.
    """
    from modules import shared

    what = asked.what
    if what.lora == audit.NO_LORA:
        raise ValueError("no LoRA is chosen: choose the one to repair")
    lora = audit.file_of(what.lora)
    if what.save_as in audit.loras():
        raise ValueError(f"there is a LoRA {what.save_as!r} already: give the new one another name")
    guard = references.guard_of(sets, what.references)
    entries = entries_of(guard.references)
    tag = partial(_known_to_the_host, sys.modules["networks"], what.lora)
    size = (what.width, what.height)
    stopped = "it was stopped, and no LoRA was written; started again, it goes on where it stood"
    runs = Runs(host, size, watch, tag, stopped)

    def places(contents: Contents) -> tuple[Contents, Mapping[str, Place]]:
        def found(model: TrainedModel) -> dict[str, Place]:
            return model.host.places(model.step, contents, what.lora)

        return contents, runs.within(BASE, asked.measurement, found)

    out = Path(shared.cmd_opts.lora_dir) / file_called(what.save_as)
    repaired = repair(
        Subject(entries, guard.references, guard.features),
        lora,
        out,
        ordinary_for(entries, asked.wanted.ordinary, general_prompts),
        nothing_apart,
        places,
        Work(asked.measurement, BATCH),
        kept,
        asked.wanted,
        runs.engine,
        tell,
        **audit.identity_of(host, size),
    )
    audit.refresh_loras()
    return Finding(repaired, out)


@contextmanager
def _known_to_the_host(networks: Any, lora: str, variant: Variant) -> Iterator[str]:
    """While open, the host has the file of a variant of its ``lora`` among its own; what a prompt holds for it."""
    if variant.lora is None:
        yield ""
        return
    name = f"dejavu-trial-{next(_numbers)}"
    entry = copy(networks.available_networks[lora])
    entry.name = entry.alias = entry.hash = name  # with a hash the host makes none, to keep it in its files
    entry.filename, entry.shorthash = variant.lora, ""
    lists = (networks.available_networks, networks.available_network_aliases)
    for known in lists:
        known[name] = entry
    try:
        yield tag_of(name, variant.strength)
    finally:
        for known in (*lists, networks.networks_in_memory):
            known.pop(name, None)
