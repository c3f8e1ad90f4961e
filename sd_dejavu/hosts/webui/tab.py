"""Our tab of the host's page: does this LoRA copy its training set? What of, and what works on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from modules import shared, ui_common

from ...core.settings import Option, options_of
from . import audit, references, repair
from .components import at_work, component, folded, gr, task
from .controls import TITLE
from .here import Here
from .hosted import Component
from .machine import machine
from .work import audit_from_page, build_from_page, repair_from_page

FIRST = ("references", "lora", "strength", "width", "height")  # what everybody needs; the rest is behind 'more'


OF_REPAIR = ("save_as", "way", "most_copies", "captions", "ordinary")  # the rest is as it is audited


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
        audited = _audit(here)
        _repair(here, audited)
        if bind is not None:
            bind(audited["references"])
        with folded("What works on this machine", "machine"):
            look = gr.Button("Check this machine", elem_id="dejavu_look")
            found = gr.HTML("", elem_id="dejavu_found_machine")
            look.click(partial(machine, here), inputs=[], outputs=[found])
    return [(tab, TITLE, "dejavu_audit")]


def _audit(here: Here) -> dict[str, Component]:
    """The audit; its components by the names of their options."""
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
    return built


def _repair(here: Here, audited: dict[str, Component]) -> None:
    """The repair, below the audit of whose LoRA and set it is."""
    options = {known.name: known for known in repair.OPTIONS}
    with folded("Repair", "repair"):
        gr.HTML(
            "<p>Makes of the LoRA that is chosen above one that does not copy the set, as a new file beside it, and tells "
            "what that costs in likeness to the set's style. Size, images, steps, seed and guidance are those of the audit.</p>"
        )
        built = dict(audited)
        for names in (OF_REPAIR[:2], OF_REPAIR[2:]):
            with gr.Row():
                for name in names:
                    built[name] = component(options[name], "repair", options[name].choices or ())
        begin = gr.Button("Repair", variant="primary", elem_id="dejavu_begin_repair")
        shown = gr.HTML("", elem_id="dejavu_found_repair")

    def begun(name: str, *values: object) -> tuple[object, ...]:
        with here.page(name) as known:
            told = repair_from_page(here, known, dict(zip(options, values, strict=True)))
        return told, gr.update(choices=[audit.NO_LORA, *audit.loras()])

    begin.click(
        begun,
        inputs=[task(), *(built[name] for name in options)],
        outputs=[shown, audited["lora"]],
        **at_work("found repair"),
    )


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
