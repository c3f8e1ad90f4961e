"""Our tab of the host's page: does this LoRA copy its training set? What of, and what works on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from modules import shared, ui_common

from ...core.settings import Option, options_of
from . import audit, references
from .components import at_work, component, folded, gr, task
from .controls import TITLE
from .here import Here
from .hosted import Component
from .machine import machine
from .work import audit_from_page, build_from_page

FIRST = ("references", "lora", "strength", "width", "height")  # what everybody needs; the rest is behind 'more'


def audit_tab(here: Here) -> list[tuple[Component, str, str]]:
    """As the host wants its tabs: (blocks, title, element)."""
    with gr.Blocks(analytics_enabled=False) as tab:
        gr.HTML(
            "<p>Does my LoRA copy its training set? Build a reference set of your training images, choose it and the LoRA, "
            "and press Audit. Every caption is measured, and the images of the worst ones are drawn again, beside their "
            "training images.</p>"
        )
        bind = None
        if shared.cmd_opts.hide_ui_dir_config:  # the host's page names no folders
            gr.HTML("<p>This host was started with --hide-ui-dir-config, so no reference set can be built here.</p>")
        else:
            bind = _build(here)
        sets = _audit(here)
        if bind is not None:
            bind(sets)
        with folded("What works on this machine", "machine"):
            look = gr.Button("Check this machine", elem_id="dejavu_look")
            found = gr.HTML("", elem_id="dejavu_found_machine")
            look.click(partial(machine, here), inputs=[], outputs=[found])
    return [(tab, TITLE, "dejavu_audit")]


def _audit(here: Here) -> Component:
    """The audit; the component that chooses its reference set."""
    offered: dict[str, Callable[[], Sequence[str]]] = {
        "references": lambda: references.names(here.references),
        "lora": lambda: [audit.NO_LORA, *audit.loras()],
    }
    built: dict[str, Component] = {}

    def add(known: Option) -> None:
        choices = offered.get(known.name, lambda: known.choices or ())
        built[known.name] = component(known, "audit", choices())
        if known.name in offered:
            elem_id, refreshed = f"dejavu_refresh_{known.name}_audit", lambda: {"choices": choices()}
            ui_common.create_refresh_button(built[known.name], audit.refresh_loras, refreshed, elem_id)

    options = {known.name: known for known in audit.OPTIONS}
    for names in (FIRST[:2], FIRST[2:]):
        with gr.Row():
            for name in names:
                add(options[name])
    begin = gr.Button("Audit", variant="primary", elem_id="dejavu_begin_audit")
    rest = [known for known in audit.OPTIONS if known.name not in FIRST]
    with folded("more", "more_audit"):
        for start in range(0, len(rest), 3):
            with gr.Row():
                for known in rest[start : start + 3]:
                    add(known)
    shown = gr.HTML("", elem_id="dejavu_found_audit")

    def begun(name: str, *values: object) -> str:
        with here.page(name) as known:
            return audit_from_page(here, known, dict(zip(options, values, strict=True)))

    begin.click(begun, inputs=[task(), *(built[name] for name in options)], outputs=[shown], **at_work("found audit"))
    return built["references"]


def _build(here: Here) -> Callable[[Component], None]:
    """Building a reference set; what is given the audit's list of them, built later, for the new one to come into."""
    options = {known.name: known for known in options_of(references.Building)}
    with folded("Build a reference set", "refset", opened=not references.names(here.references)):
        gr.HTML(
            "<p>Of your training images, with their captions as your trainer reads them, or fox.txt beside fox.png.</p>"
        )
        built = {}
        for names in (("folder", "name"), ("features", "restart"), ("trainer", "trigger_word"), ("trainer_config",)):
            with gr.Row():
                for name in names:
                    built[name] = component(options[name], "refset", options[name].choices or ())
        begin = gr.Button("Build", variant="primary", elem_id="dejavu_begin_refset")
        shown = gr.HTML("", elem_id="dejavu_built_refset")

    def begun(name: str, *values: object) -> tuple[object, ...]:
        with here.page(name) as known:
            told, made = build_from_page(here, known, dict(zip(options, values, strict=True)))
        chosen = {} if made is None else {"value": made}
        others = [gr.update(choices=here.sets()) for _ in here.lists]
        return told, gr.update(choices=references.names(here.references), **chosen), *others

    def bind(sets: Component) -> None:
        begin.click(
            begun,
            inputs=[task(), *(built[name] for name in options)],
            outputs=[shown, sets, *here.lists],
            **at_work("built refset"),
        )

    return bind
