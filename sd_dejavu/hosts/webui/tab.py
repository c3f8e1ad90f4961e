"""Our tab of the host's page: does this LoRA copy its training set?"""

from __future__ import annotations

from modules import ui_common

from . import audit, references
from .components import component, gr, stopping
from .controls import TITLE
from .here import Here
from .hosted import Component
from .work import audit_from_page


def audit_tab(here: Here) -> list[tuple[Component, str, str]]:
    """As the host wants its tabs: (blocks, title, element)."""
    found = {"references": lambda: references.names(here.references), "lora": lambda: [audit.NO_LORA, *audit.loras()]}

    def begun(*values: object) -> str:
        return audit_from_page(here, {known.name: value for known, value in zip(audit.OPTIONS, values, strict=True)})

    with gr.Blocks(analytics_enabled=False) as tab:
        gr.HTML(
            "<p>Does my LoRA copy its training set? Every caption is measured, and the worst ones are drawn again. The "
            "training set is a reference set of it: made by <code>sd-dejavu refset build</code>, and put into "
            "<code>dejavu/references/</code> below the data folder.</p>"
        )
        components = []
        for known in audit.OPTIONS:
            offered = found.get(known.name)
            if offered is None:
                components.append(component(known, "audit", known.choices or ()))
                continue
            with gr.Row():
                components.append(component(known, "audit", offered()))
                ui_common.create_refresh_button(
                    components[-1],
                    audit.refresh_loras,
                    lambda offered=offered: {"choices": offered()},
                    f"dejavu_refresh_{known.name}_audit",
                )
        with gr.Row():
            begin = gr.Button("Audit", variant="primary", elem_id="dejavu_begin_audit")
            stopping("audit")
        shown = gr.HTML("", elem_id="dejavu_found_audit")
        begin.click(begun, inputs=components, outputs=[shown])
    return [(tab, TITLE, "dejavu_audit")]
