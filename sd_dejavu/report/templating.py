"""The one way to HTML: the templates of this package. What is put into one is escaped, and nothing may be missing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def rendered(name: str, **values: Any) -> str:
    """A whole page or panel."""
    return _environment().get_template(name).render(values)


def macro(name: str, *values: Any) -> Markup:
    """A piece of a page, by a macro of macros.html.j2.

    >>> macro("paragraph", "1 < 2")
    Markup('<p>1 &lt; 2</p>')
    """
    made: Markup = getattr(_environment().get_template("macros.html.j2").module, name)(*values)
    return made


def writable(page: str) -> str:
    """Without lone surrogates, which JSON can smuggle into a prompt, and which could not be written as UTF-8."""
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def _environment() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
