"""Examples in docstrings say what comes out; here each of them is run."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import sd_dejavu

ROOT = Path(sd_dejavu.__file__).parent
WRITTEN = {path: n for path in sorted(ROOT.rglob("*.py")) if (n := path.read_text(encoding="utf-8").count(">>> "))}
LEAST = 60


def test_there_are_examples() -> None:
    assert sum(WRITTEN.values()) >= LEAST


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_an_example_says_comes_out(path: Path) -> None:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    ran = doctest.testmod(import_module(".".join(parts).removesuffix(".__init__")))
    assert (ran.failed, ran.attempted) == (0, WRITTEN[path])  # none stands where it is not found
