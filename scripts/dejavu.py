"""Déjà Vu for Automatic1111 and Forge: what their callbacks are tied to. The work is done in sd_dejavu."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from modules import script_callbacks, scripts, shared

from sd_dejavu.hosts.webui import controls, options, references, routes, run, tab
from sd_dejavu.hosts.webui.accordion import Accordion
from sd_dejavu.hosts.webui.controls import TITLE
from sd_dejavu.hosts.webui.here import Here
from sd_dejavu.hosts.webui.hosted import Component, Processing
from sd_dejavu.hosts.webui.session import Watched
from sd_dejavu.report import panel
from sd_dejavu.run.faults import caught

log = logging.getLogger("dejavu")
HERE = Here()
SESSION = HERE.session


def _guarded(watched: Watched) -> AbstractContextManager[None]:
    """Our own faults never cost an image, and are told."""

    def tell(fault: str) -> bool:
        text = f"No verdict: {HERE.sentence(fault)}"
        watched.shown.faults += str(panel.paragraph(text))
        watched.p.comment(f"{TITLE}: {text}")
        return True

    return caught((), tell)


class DejaVuScript(scripts.Script):
    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    @cached_property
    def accordion(self) -> Accordion:
        return Accordion(HERE, "img2img" if self.is_img2img else "txt2img")

    def ui(self, is_img2img: bool) -> list[Component]:
        components = self.accordion.build()
        self.infotext_fields = self.accordion.infotext_fields
        return components

    def after_component(self, component: Component, **kwargs: Any) -> None:
        self.accordion.after(component, kwargs.get("elem_id") or "")

    def process(self, p: Processing, *arguments: object) -> None:
        watched = SESSION.begin(p)
        if watched.within:  # perhaps copied from the run around it, whose infotext is not ours to change
            p.extra_generation_params = dict(p.extra_generation_params)
        for name in (controls.INFOTEXT, *controls.LINES):
            p.extra_generation_params.pop(name, None)  # of a run that this one was copied from
        with _guarded(watched):
            wanted = controls.read(arguments, getattr(p, "dejavu_changes", None))
            if not wanted.enabled:
                return
            if lacking := HERE.lacking():
                raise ValueError(f"this host has no {' and no '.join(lacking)}, so nothing can be measured: update it")
            chosen = wanted.references
            guard = None if chosen == controls.NO_REFERENCES else references.guard_of(HERE.references, chosen)
            watched.watching = run.Run(HERE.host, wanted.monitoring, HERE.calibrations, guard, watched.within)
            watched.wanted = wanted
            p.extra_generation_params[controls.INFOTEXT] = controls.as_infotext(wanted)

    def before_process_batch(self, p: Processing, *arguments: object, **kwargs: Any) -> None:
        """Put the published baselines in, when other extensions have said what the prompts are."""
        watched = SESSION.of(p)
        if watched is None or watched.wanted is None or watched.wanted.perturb == controls.NOT_CHANGED:
            return
        with _guarded(watched):
            begin = kwargs.get("batch_number", 0) * p.batch_size
            typed, hires = p.prompts, getattr(p, "all_hr_prompts", None)
            p.prompts = controls.perturbed(typed, p.seeds, watched.wanted)
            if hires:
                own = hires[begin : begin + len(typed)]
                own = p.prompts if own == typed else controls.perturbed(own, p.seeds, watched.wanted)
                p.all_hr_prompts = [*hires[:begin], *own, *hires[begin + len(own) :]]
            p.all_prompts = [*p.all_prompts[:begin], *p.prompts, *p.all_prompts[begin + len(p.prompts) :]]

    def process_batch(self, p: Processing, *arguments: object, **kwargs: Any) -> None:
        if (watched := SESSION.of(p)) and watched.run:
            watched.run.forget()
            for name in controls.LINES:
                p.extra_generation_params.pop(name, None)  # of the batch before

    def process_before_every_sampling(self, p: Processing, *arguments: object, **kwargs: Any) -> None:
        if (watched := SESSION.of(p)) and watched.run:
            with _guarded(watched):
                watched.run.begin(p, from_image=getattr(p, "init_latent", None) is not None)
                if HERE.host.name == "Forge":
                    run.read_forge(p, SESSION.after_forge)

    def postprocess_batch(self, p: Processing, *arguments: object, **kwargs: Any) -> None:
        if (watched := SESSION.of(p)) and watched.run:
            with _guarded(watched):
                watched.run.end()
                before = kwargs.get("batch_number", 0) * p.batch_size
                watched.tell(before, shared.opts.data.get("dejavu_infotext", True), not HERE.has_panel)

    def postprocess(self, p: Processing, processed: object, *arguments: object) -> None:
        SESSION.close(p)


for name, function in {
    "on_cfg_denoiser": SESSION.before,
    "on_cfg_denoised": SESSION.after_automatic1111,
    "on_app_started": lambda demo, app: routes.add_routes(HERE, app),
    "on_ui_tabs": lambda: tab.audit_tab(HERE),
    "on_ui_settings": options.add_settings,
    "on_before_ui": lambda: options.add_axes(HERE),
}.items():
    if hasattr(script_callbacks, name):
        getattr(script_callbacks, name)(function)
    else:
        log.warning("[Déjà Vu] this host has no %s: what needs it is left out", name)
