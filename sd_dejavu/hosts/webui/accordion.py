"""The accordion below the prompt of a tab, and what it is tied to elsewhere on the host's page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from ...core.settings import options_of
from . import components, controls, work
from .calibration import QUICK, THOROUGH, Calibrating
from .components import gr
from .here import Here
from .hosted import Component

FIRST = ("when_flagged", "explain")  # what everybody needs; the rest is behind 'more'
INTRODUCTIONS = {
    "txt2img": "Calibrate once for each checkpoint and size: it measures ordinary prompts to compare yours with. Or "
    "generate an image first, and press the button below it.",
    "img2img": "Images that begin with an image get a score and their words, but no verdict: ordinary prompts are "
    "measured from noise.",
}
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
    "guidance_scale": "cfg_scale",
    "networks": "prompt",
    "score": "score",
    "alpha": "alpha",
}


class Accordion:
    """Ours on one tab of the page; the host builds its own components before and after it."""

    def __init__(self, here: Here, tab: str) -> None:
        """``tab`` is txt2img or img2img."""
        self.tab = tab
        self.infotext_fields: list[tuple[Component, Callable[[Mapping[str, object]], object]]] = []
        self._here = here
        self._panel: list[Component] = []  # the panel, and what works on it
        self._parts: dict[str, Component] = {}
        self._bound = False

    def build(self) -> list[Component]:
        """The components, whose values the script is given, in the order that saved arguments know."""
        tab, parts = self.tab, self._parts
        options = {known.name: known for known in controls.OPTIONS}
        calibrating = {known.name: known for known in options_of(Calibrating)}
        built: dict[str, Component] = {}

        def add(name: str) -> None:
            known = options[name]
            choices = self._here.sets() if name == "references" else known.choices or ()
            built[name] = components.component(known, tab, choices)
            if name == "references":
                self._here.lists.append(built[name])

        with components.accordion(tab) as enabled:
            with gr.Row():
                for name in FIRST:
                    add(name)
            parts["told"] = gr.HTML(f"<p>{INTRODUCTIONS[tab]}</p>", elem_id=f"dejavu_told_{tab}")
            with gr.Row(visible=tab == "txt2img"):
                parts["calibrate"] = gr.Button("Calibrate", elem_id=f"dejavu_calibrate_{tab}")
            components.stopping(tab)
            with components.folded("more", f"more_{tab}"):
                with gr.Row():
                    told = f"{QUICK}: quick, p-values in steps of 1 in {QUICK}; {THOROUGH:,}: fine steps"
                    count = replace(calibrating["count"], default=QUICK, help=told)
                    parts["count"] = components.component(count, tab, ())
                    parts["replace"] = components.component(calibrating["replace"], tab, ())
                rest = [name for name in options if name not in FIRST]
                for pair in zip(rest[::2], [*rest[1::2], ""], strict=False):
                    with gr.Row():
                        for name in filter(None, pair):
                            add(name)
        parts["task"] = components.task()  # for which the host calls ``after`` at once
        parts |= {name: built[name] for name in ("baseline", "score", "alpha")}
        order = [built[known.name] for known in controls.OPTIONS]
        self.infotext_fields = [
            (enabled, lambda known: True if controls.INFOTEXT in known else None),
            *(
                (component, partial(controls.pasted, name=known.name))
                for component, known in zip(order, controls.OPTIONS, strict=True)
            ),
        ]
        return [enabled, *order]

    def after(self, component: Component, elem_id: str) -> None:
        """The host has built a component: ours are tied to it, or put below it."""
        tab, parts = self.tab, self._parts
        for name in ON_PAGE.values():
            if elem_id == f"{tab}_{name}":
                parts[name] = component
        if elem_id == f"html_log_{tab}":
            self._here.has_panel = True
            shown = gr.HTML("", elem_id=f"dejavu_panel_{tab}")
            buttons = [gr.Button(visible=False, elem_id=f"dejavu_{name}_{tab}") for name in ("calibrate_run", "judge")]
            self._panel = [shown, components.task(), *buttons]
        if elem_id == f"generation_info_{tab}":
            parts["info"] = component
        if self._panel and "info" in parts:
            self._bind_panel(parts.pop("info"))
        if not self._bound and {"task", "calibrate", "told", *ON_PAGE.values()} <= parts.keys():
            self._bound = True
            inputs = [parts["task"], *(parts[name] for name in ON_PAGE.values())]
            told = [parts["told"]]
            parts["calibrate"].click(self._calibrate, inputs=inputs, outputs=told, **components.at_work(f"told {tab}"))

    def _bind_panel(self, info: Component) -> None:
        shown, asked, calibrate, judge = self._panel
        info.change(self._here.session.panel_of, inputs=[info], outputs=[shown])
        judge.click(partial(work.judge_again, self._here), inputs=[info], outputs=[shown], show_progress="hidden")
        begin = components.at_work(f"panel {self.tab}")
        calibrate.click(self._calibrate_for_run, inputs=[asked, info], outputs=[shown], **begin)

    def _calibrate(self, task: str, *values: object) -> str:
        with self._here.page(task) as known:
            return work.calibrate_from_page(self._here, known, dict(zip(ON_PAGE, values, strict=True)))

    def _calibrate_for_run(self, asked: str, info: str) -> str:
        """``asked`` is what our script says: a name for the work, and how many ordinary prompts."""
        wanted = json.loads(asked)
        with self._here.page(str(wanted["task"])) as known:
            return work.calibrate_for_run(self._here, known, int(wanted["count"]), info)
