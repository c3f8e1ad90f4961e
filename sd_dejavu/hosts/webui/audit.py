"""The audit of a training set in Automatic1111 and Forge, in runs of the host's own.

What is finished is kept below one folder, each audit in a folder of its own, so one that was stopped goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

from ...calibration.first_step import PROMPTS_A_SEED
from ...calibration.ordinary_prompts import general_prompts
from ...core.settings import Checked, Option, named, option, options_of
from ...kept import file_digest
from ...report.audit_html import AuditPage, render_audit
from ...report.audit_rows import as_json, settings_shown, thumbnails_of
from ...run.measure import Measurement
from ...training.audit import Audit, AuditSettings, Subject, audit, entries_of, identity, ordinary_for, sampled
from ...training.ledger import Ledger
from ...training.tasks import Work, nothing_apart
from . import references
from .calibration import check_size
from .guidance import checkpoint_of
from .hosted import Options
from .pieces import BATCH, Runs, Watch, tag_of
from .run import Host

NO_LORA = "none"
A_PIECE = PROMPTS_A_SEED  # prompts of a run: as few as can be, for the page to tell how far it is, and to end it soon


@dataclass(frozen=True)
class Audited(Checked):
    """What is audited, and at what size."""

    references: str = option("", "the training set with its captions: a reference set of it")
    lora: str = option(NO_LORA, "the LoRA whose training set it is; none: the checkpoint itself")
    strength: float = option(1.0, "strength of the LoRA", minimum=0, maximum=2, exclusive=True)
    width: int = option(512, "width that was trained on, in pixels", minimum=64, maximum=2048)
    height: int = option(512, "height that was trained on, in pixels", minimum=64, maximum=2048)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.width, self.height)


_NOT_HERE = ("sweep", "strength_steps", "partition", "score", "negative", "baseline", "alpha")
_SETTINGS: tuple[type, ...] = (Audited, AuditSettings, Measurement)
OPTIONS: tuple[Option, ...] = tuple(o for kind in _SETTINGS for o in options_of(kind) if o.name not in _NOT_HERE)


@dataclass(frozen=True)
class Asked:
    what: Audited
    wanted: AuditSettings
    measurement: Measurement


@dataclass(frozen=True)
class Finding:
    """An audit with what is needed to show it."""

    audit: Audit
    subject: Subject
    asked: Asked
    checkpoint: str

    def as_json(self) -> Options:
        return as_json(self.audit, self.checkpoint, _loras_of(self.asked))

    def page(self) -> str:
        """The report with its images as a whole page of its own."""
        asked, audit = self.asked, self.audit
        shown = settings_shown(audit, asked.wanted, asked.measurement, self.subject)
        thumbnails = thumbnails_of(audit, self.subject)
        lora = ", ".join(_loras_of(asked))
        return render_audit(AuditPage(audit, self.checkpoint, lora, asked.what.references, thumbnails, shown))


def read(values: Mapping[str, object]) -> Asked:
    """From values by their names; what is missing has its default. Raises ValueError naming what is wrong."""
    given = {**named(values, OPTIONS, "an audit"), "partition": A_PIECE}
    made = [kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in _SETTINGS]
    return Asked(*made)


def loras() -> list[str]:
    """The host's own LoRAs by their names; none where its extension for them is not there."""
    return sorted(getattr(sys.modules.get("networks"), "available_networks", {}))


def file_of(lora: str) -> Path:
    """The file of one of :func:`loras`. Raises ValueError for any other name."""
    if lora not in loras():
        raise ValueError(f"there is no LoRA {lora!r}: choose one of the list in the tab")
    return Path(sys.modules["networks"].available_networks[lora].filename)


def refresh_loras() -> None:
    """Have the host look for LoRA files again."""
    if (networks := sys.modules.get("networks")) is not None:
        networks.list_available_networks()


def run_audit(
    host: Host,
    asked: Asked,
    sets: Path,
    kept: Path,
    watch: Watch,
    tell: Callable[[str, int, int], None],
) -> Finding:
    """``sets`` holds the reference sets, ``kept`` what was measured.

    Raises ValueError where there is nothing to measure, or the user stops it.
    """
    what, measurement = asked.what, asked.measurement
    guard = references.guard_of(sets, what.references)
    tag = _tag(what)
    entries = sampled(entries_of(guard.references), asked.wanted.sample, measurement.seed)
    subject = Subject(entries, guard.references, guard.features)
    ordinary = ordinary_for(entries, asked.wanted.nulls, general_prompts)
    begun = identity(
        subject,
        ordinary,
        measurement,
        partition=asked.wanted.partition,
        lora=_identity_of(what.lora) if tag else "",
        strength=what.strength,
        **identity_of(host, (what.width, what.height)),
    )
    runs = Runs(
        host,
        (what.width, what.height),
        watch,
        lambda variant: nullcontext("" if variant.base else tag),
        "it was stopped; started again, it goes on where it stood",
    )
    found = audit(
        subject,
        [],
        ordinary,
        nothing_apart,
        Work(measurement, BATCH),
        Ledger.below(kept, begun),
        asked.wanted,
        runs.engine,
        tell,
        bool(tag),
    )
    return Finding(found, subject, asked, host.chosen_model().sd_checkpoint_info.name_for_extra)


def identity_of(host: Host, size: tuple[int, int]) -> dict[str, object]:
    """What is measured there, for the ledger."""
    from modules import sd_vae, shared

    return {
        "model": checkpoint_of(host.chosen_model()),
        "vae": str(sd_vae.get_loaded_vae_name()),
        "clip_skip": shared.opts.CLIP_stop_at_last_layers,
        "width": size[0],
        "height": size[1],
    }


def _loras_of(asked: Asked) -> list[str]:
    return [] if asked.what.lora == NO_LORA else [asked.what.lora]


def _tag(what: Audited) -> str:
    """What the prompt holds for the LoRA; empty without one. Raises ValueError where the host does not know it."""
    if what.lora == NO_LORA:
        return ""
    file_of(what.lora)
    return tag_of(what.lora, what.strength)


def _identity_of(lora: str) -> str:
    return f"{lora} {file_digest(file_of(lora))}"
