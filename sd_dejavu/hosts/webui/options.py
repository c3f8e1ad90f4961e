"""Our options in the host's own places: its settings page, and the axes of its X/Y/Z plot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from modules import scripts, shared

from ...core.settings import of_text
from . import controls
from .components import gr
from .here import Here
from .hosted import Processing


def add_settings() -> None:
    """Whether images carry what was found, and the default alpha."""
    section = ("dejavu", controls.TITLE)
    known = next(option for option in controls.OPTIONS if option.name == "alpha")
    shared.opts.add_option(
        "dejavu_infotext",
        shared.OptionInfo(True, "Write verdict, score and p-value into the images' parameters", section=section),
    )
    shared.opts.add_option(
        "dejavu_alpha",
        shared.OptionInfo(
            known.default,
            "Default alpha: " + known.help,
            gr.Slider,
            {"minimum": 0.001, "maximum": known.maximum, "step": 0.001},
            section=section,
        ).needs_reload_ui(),
    )


def add_axes(here: Here) -> None:
    """An axis of the plot for each option."""
    plots = [data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"]
    for grid in plots:

        def change(p: Processing, value: object, values: object, name: str) -> None:
            p.dejavu_changes = {**getattr(p, "dejavu_changes", {}), "enabled": True, name: value}

        known = {axis.label for axis in grid.axis_options}
        for option in controls.OPTIONS:
            label = f"[{controls.TITLE}] {option.name.replace('_', ' ')}"
            choices: Callable[[], list[str]] | None = here.sets if option.name == "references" else None
            choices = partial(list, option.choices) if option.choices else choices
            if label not in known:
                kind = partial(of_text, option) if option.kind is bool else option.kind  # numbers by ranges too
                axis = grid.AxisOption(label, kind, partial(change, name=option.name), choices=choices)
                grid.axis_options.append(axis)
