"""The accordion below the prompt of a tab, and what it is tied to elsewhere on the host's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ...core.settings import options_of
from . import components, controls
from .calibration import Calibrating
from .components import gr
from .here import Here
from .hosted import Component
from .work import calibrate_from_page

ON_PAGE = {  # of what is calibrated for, where the page has a component of the host's or of ours
    "count": "count",
    "width": "width",
    "height": "height",
    "steps": "steps",
    "sampler_name": "sampling",
    "scheduler": "scheduler",
    "negative_prompt": "neg_prompt",
    "replace": "replace",
    "baseline": "baseline",
}


class Accordion:
    """Ours on one tab of the page; the host builds its own components before and after it."""

    def __init__(self, here: Here, tab: str) -> None:
        """``tab`` is txt2img or img2img."""
        self.tab = tab
        self.infotext_fields: list[tuple[Component, Callable[[Mapping[str, object]], object]]] = []
        self._here = here
        self._shown: Component = None  # the panel
        self._parts: dict[str, Component] = {}
        self._bound = False

    def build(self) -> list[Component]:
        """The components, whose values the script is given."""
        tab, parts = self.tab, self._parts
        calibrating = {known.name: known for known in options_of(Calibrating)}
        with components.accordion(tab) as enabled:
            gr.HTML("<p>Is this image mine, or is the model replaying its training data?</p>")
            built = [
                components.component(
                    known, tab, self._here.sets() if known.name == "references" else known.choices or ()
                )
                for known in controls.OPTIONS
            ]
            parts["baseline"] = built[[known.name for known in controls.OPTIONS].index("baseline")]
            with gr.Row():
                for name in ("count", "replace"):
                    parts[name] = components.component(calibrating[name], tab, ())
                parts["calibrate"] = gr.Button("Calibrate", elem_id=f"dejavu_calibrate_{tab}")
                components.stopping(tab)
            parts["told"] = gr.HTML(
                "<p>Calibrate measures ordinary prompts once for the loaded checkpoint, the size and the sampler above, and "
                "for the negative prompt where prompts are measured against it; from then on runs like that get a "
                "p-value, and can be flagged.</p>",
                elem_id=f"dejavu_told_{tab}",
            )
        self.infotext_fields = [
            (enabled, lambda known: True if controls.INFOTEXT in known else None),
            *(
                (component, partial(controls.pasted, name=known.name))
                for component, known in zip(built, controls.OPTIONS, strict=True)
            ),
        ]
        return [enabled, *built]

    def after(self, component: Component, elem_id: str) -> None:
        """The host has built a component: ours are tied to it, or put below it."""
        tab, parts = self.tab, self._parts
        for name in ON_PAGE.values():
            if elem_id == f"{tab}_{name}":
                parts[name] = component
        if elem_id == f"html_log_{tab}":
            self._shown = gr.HTML("", elem_id=f"dejavu_panel_{tab}")
        if elem_id == f"generation_info_{tab}":
            parts["info"] = component
        if self._shown is not None and "info" in parts:
            info = parts.pop("info")
            info.change(self._here.session.panel_of, inputs=[info], outputs=[self._shown])
        if not self._bound and {"calibrate", "told", *ON_PAGE.values()} <= parts.keys():
            self._bound = True
            inputs = [parts[name] for name in ON_PAGE.values()]
            parts["calibrate"].click(self._calibrate, inputs=inputs, outputs=[parts["told"]])

    def _calibrate(self, *values: object) -> str:
        return calibrate_from_page(self._here, dict(zip(ON_PAGE, values, strict=True)))
