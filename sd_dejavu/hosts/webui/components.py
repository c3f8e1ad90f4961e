"""Components of the host's page from the core's options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from modules import shared, ui_components

from ...core.settings import Option
from .controls import TITLE, label_of, shown_as, told_of
from .hosted import Component

gr: Component = import_module("gradio")  # the host's: two major versions are in use


@contextmanager
def accordion(tab: str) -> Iterator[Component]:
    """Holds our controls, and switches them on; a host without switches on its accordions gets a checkbox in it."""
    kind = getattr(ui_components, "InputAccordion", None)
    if kind is not None:
        with kind(False, label=TITLE, elem_id=f"dejavu_{tab}") as enabled:
            yield enabled
        return
    with gr.Accordion(TITLE, open=False, elem_id=f"dejavu_{tab}"):
        yield gr.Checkbox(False, label="Enable", elem_id=f"dejavu_enabled_{tab}")


def folded(title: str, place: str, opened: bool = False) -> Component:
    """Holds what not everybody needs."""
    return gr.Accordion(title, open=opened, elem_id=f"dejavu_{place}")


def component(known: Option, tab: str, choices: Sequence[str]) -> Component:
    """A component for one option of the core."""
    default = shared.opts.data.get(f"dejavu_{known.id}", known.default)
    shown = {"label": label_of(known), "info": told_of(known) or None, "elem_id": f"dejavu_{known.id}_{tab}"}
    kind = shown_as(known, choices)
    if kind == "dropdown":
        return gr.Dropdown(list(choices), value=default if default in choices else None, **shown)
    if kind == "text":
        return gr.Textbox(default, lines=1, max_lines=1, **shown)
    if kind == "checkbox":
        return gr.Checkbox(default, **shown)
    if kind == "number":
        return gr.Number(default, precision=0 if known.kind is int else None, **shown)
    step = 0.001 if known.kind is float else 1
    return gr.Slider(known.minimum or 0, known.maximum, value=default, step=step, **shown)


def stopping(tab: str) -> None:
    """Ends what the host is at, for the Stop beside the progress that our script shows."""
    stop = gr.Button("Stop", visible=False, elem_id=f"dejavu_stop_{tab}")
    stop.click(lambda: shared.state.interrupt(), inputs=[], outputs=[])


def task() -> Component:
    """The first input of what :func:`at_work` begins: the page's own name for the work."""
    return gr.Textbox("", visible=False)


def at_work(place: str) -> dict[str, Any]:
    """How a button begins work that takes long: our script shows its progress above the answer at ``place``."""
    assert re.fullmatch(r"\w+ \w+", place)
    script = f"(...values) => globalThis.dejavuBegun ? globalThis.dejavuBegun('{place}', values) : values"
    return {"_js": script, "show_progress": "hidden"}
