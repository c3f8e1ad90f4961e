"""What works on this machine, for the host's page: as ``sd-dejavu doctor`` tells it, of what the hosts need."""

from __future__ import annotations

from collections.abc import Iterator

from ...doctor import Finding, findings, version
from ...report import panel
from . import references
from .here import Here

ONLY_COMMAND_LINE = ("diffusers", "transformers", "peft", "pyarrow", "calibrations")


def machine(here: Here) -> str:
    """The findings as HTML."""
    return str(panel.findings([*_of_host(here), *(one for one in findings() if one.name not in ONLY_COMMAND_LINE)]))


def _of_host(here: Here) -> Iterator[Finding]:
    yield Finding("Déjà Vu", version())
    lacking = here.lacking()
    has_not = f"has no {' and no '.join(lacking)}, so nothing can be measured"
    yield Finding(
        "host", f"{here.host.name}{f' {has_not}' if lacking else ''}", not lacking, "update it" if lacking else ""
    )
    yield Finding("calibrations", f"{len(list(here.calibrations.glob('*.json'))):,} kept")
    yield Finding("reference sets", f"{len(references.names(here.references)):,} kept")
