"""Déjà Vu for Automatic1111 and Forge: the accordion, the callbacks and the routes. The work is done in sd_dejavu."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from fastapi import HTTPException, Request
from modules import call_queue, paths, processing, script_callbacks, scripts, shared, ui_common, ui_components

from sd_dejavu.calibration import store
from sd_dejavu.hosts.webui import audit, calibration, controls, door, references, run, session
from sd_dejavu.report import panel, wording
from sd_dejavu.settings import named, of_text, options_of

Asked = TypeVar("Asked")
Found = TypeVar("Found")

TITLE = "Déjà Vu"
HOST = run.this_host()
log = logging.getLogger("dejavu")
FOLDER = Path(paths.data_path) / "dejavu" / "calibration"
REFERENCES = Path(paths.data_path) / "dejavu" / "references"
AUDITS = Path(paths.data_path) / "dejavu" / "audits"
FOLDERS = (paths.data_path, paths.script_path, paths.models_path, Path.home())  # not to be named to clients
CALIBRATING = {known.name: known for known in options_of(calibration.Calibrating)}
ON_PAGE = {  # of them, where the page has a component of the host's or of ours
    "count": "count",
    "width": "width",
    "height": "height",
    "steps": "steps",
    "sampler_name": "sampling",
    "scheduler": "scheduler",
    "negative_prompt": "neg_prompt",
    "replace": "replace",
    "without": "without",
}
SESSION = session.Session(shared.state)


def _lacking() -> list[str]:
    """What nothing can be measured without and this host has not."""
    needed = {"on_cfg_denoiser": script_callbacks, "process_before_every_sampling": scripts.Script}
    if HOST.name != "Forge":
        needed["on_cfg_denoised"] = script_callbacks
    return [name for name, owner in needed.items() if not hasattr(owner, name)]


@contextmanager
def _guarded(p: Any) -> Iterator[None]:
    """Our own faults never cost a picture, and are told."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        text = f"No verdict: {kind}{door.sentence(error, FOLDERS)}"
        log.warning("[Déjà Vu] %s", text, exc_info=not isinstance(error, ValueError))
        SESSION.shown.panel += str(panel.paragraph(text))
        p.comment(f"{TITLE}: {text}")


class DejaVuScript(scripts.Script):
    def __init__(self) -> None:
        self.shown: Any = None
        self.parts: dict[str, Any] = {}
        self.bound = False

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    # ------------------------------------------------------------------------------- interface

    def ui(self, is_img2img: bool) -> list[Any]:
        tab = self.tab = "img2img" if is_img2img else "txt2img"
        with _accordion(tab) as enabled:
            gr.HTML("<p>Is this picture mine, or is the model replaying its training data?</p>")
            components = [_component(known, tab, _choices(known)) for known in controls.OPTIONS]
            self.parts["without"] = components[[known.name for known in controls.OPTIONS].index("without")]
            with gr.Row():
                for name in ("count", "replace"):
                    self.parts[name] = _component(CALIBRATING[name], tab, [])
                self.parts["calibrate"] = gr.Button("Calibrate", elem_id=f"dejavu_calibrate_{tab}")
                stop = gr.Button("Stop", elem_id=f"dejavu_stop_{tab}")
            self.parts["told"] = gr.HTML(
                "<p>Calibrate measures ordinary prompts once for the loaded checkpoint, the size, the sampler and the "
                "negative prompt above; from then on runs like that get a p-value, and can be flagged.</p>",
                elem_id=f"dejavu_told_{tab}",
            )
            stop.click(lambda: shared.state.interrupt(), inputs=[], outputs=[])
        self.infotext_fields = [
            (enabled, lambda known: True if controls.INFOTEXT in known else None),
            *(
                (component, partial(controls.pasted, name=known.name))
                for component, known in zip(components, controls.OPTIONS, strict=True)
            ),
        ]
        return [enabled, *components]

    def after_component(self, component: Any, **kwargs: Any) -> None:
        tab = "img2img" if self.is_img2img else "txt2img"
        elem_id = kwargs.get("elem_id") or ""
        for name in ON_PAGE.values():
            if elem_id == f"{tab}_{name}":
                self.parts[name] = component
        if elem_id == f"html_log_{tab}":
            self.shown = gr.HTML("", elem_id=f"dejavu_panel_{tab}")
        if elem_id == f"generation_info_{tab}":
            self.parts["info"] = component
        if self.shown is not None and "info" in self.parts:
            info = self.parts.pop("info")
            info.change(SESSION.panel_of, inputs=[info], outputs=[self.shown])
        if not self.bound and {"calibrate", "told", *ON_PAGE.values()} <= self.parts.keys():
            self.bound = True
            inputs = [self.parts[name] for name in ON_PAGE.values()]
            self.parts["calibrate"].click(_calibrate_from_page, inputs=inputs, outputs=[self.parts["told"]])

    # ------------------------------------------------------------------------------------ runs

    def process(self, p: Any, *arguments: Any) -> None:
        if SESSION.is_within(p):
            return
        SESSION.begin(p)
        for name in (controls.INFOTEXT, *controls.LINES):
            p.extra_generation_params.pop(name, None)  # of a run that this one was copied from
        with _guarded(p):
            wanted = controls.read(arguments, getattr(p, "dejavu_changes", None))
            if not wanted.enabled:
                return
            if lacking := _lacking():
                raise ValueError(f"this host has no {' and no '.join(lacking)}, so nothing can be measured: update it")
            chosen = wanted.references
            guard = None if chosen == controls.NO_REFERENCES else references.guard_of(REFERENCES, chosen)
            SESSION.watching = run.Run(HOST, wanted.monitoring, FOLDER, guard)
            SESSION.wanted = wanted
            p.extra_generation_params[controls.INFOTEXT] = controls.as_infotext(wanted)

    def before_process_batch(self, p: Any, *arguments: Any, **kwargs: Any) -> None:
        """Put the published baselines in, when other extensions have said what the prompts are."""
        wanted = SESSION.wanted
        if SESSION.run_of(p) is None or wanted is None or wanted.perturb == controls.NOT_CHANGED:
            return
        with _guarded(p):
            begin = kwargs.get("batch_number", 0) * p.batch_size
            p.prompts = controls.perturbed(p.prompts, p.seeds, wanted)
            p.all_prompts = [*p.all_prompts[:begin], *p.prompts, *p.all_prompts[begin + len(p.prompts) :]]

    def process_batch(self, p: Any, *arguments: Any, **kwargs: Any) -> None:
        if watching := SESSION.run_of(p):
            watching.forget()
            for name in controls.LINES:
                p.extra_generation_params.pop(name, None)  # of the batch before

    def process_before_every_sampling(self, p: Any, *arguments: Any, **kwargs: Any) -> None:
        if watching := SESSION.run_of(p):
            with _guarded(p):
                watching.begin(p, from_picture=getattr(p, "init_latent", None) is not None)
                if HOST.name == "Forge":
                    watching.attach(p)

    def postprocess_batch(self, p: Any, *arguments: Any, **kwargs: Any) -> None:
        if watching := SESSION.run_of(p):
            with _guarded(p):
                self._report(p, watching, kwargs.get("batch_number", 0) * p.batch_size)

    def _report(self, p: Any, watching: run.Run, before: int) -> None:
        watching.end()
        reports = watching.reports()
        passes = {title for title, _, _ in reports}
        named = []
        for title, image, report in reports:
            name = f"Picture {before + image + 1}" + (f", {title}" if len(passes) > 1 else "")
            named.append((name, report))
            SESSION.shown.documents.append({"picture": before + image, "pass": title, **report.as_json()})
        SESSION.shown.panel += str(panel.panel(named))
        for line in panel.plain_text(named).splitlines():
            p.comment(f"{TITLE}: {line}")
        if shared.opts.data.get("dejavu_infotext", True):
            p.extra_generation_params.update(controls.infotexts([(image, report) for _, image, report in reports]))

    def postprocess(self, p: Any, processed: Any, *arguments: Any) -> None:
        if SESSION.run_of(p):
            SESSION.watching = None


@contextmanager
def _accordion(tab: str) -> Iterator[Any]:
    """Holds our controls, and switches them on; a host without switches on its accordions gets a checkbox in it."""
    kind = getattr(ui_components, "InputAccordion", None)
    if kind is not None:
        with kind(False, label=TITLE, elem_id=f"dejavu_{tab}") as enabled:
            yield enabled
        return
    with gr.Accordion(TITLE, open=False, elem_id=f"dejavu_{tab}"):
        yield gr.Checkbox(False, label="Enable", elem_id=f"dejavu_enabled_{tab}")


def _component(known: Any, tab: str, choices: list[str]) -> Any:
    """A component for one option of the core."""
    default = shared.opts.data.get(f"dejavu_{known.name}", known.default)
    shown = {"label": known.name.replace("_", " "), "info": known.help, "elem_id": f"dejavu_{known.name}_{tab}"}
    kind = controls.shown_as(known, choices)
    if kind == "dropdown":
        return gr.Dropdown(choices, value=default if default in choices else None, **shown)
    if kind == "checkbox":
        return gr.Checkbox(default, **shown)
    if kind == "number":
        return gr.Number(default, precision=0 if known.kind is int else None, **shown)
    step = 0.001 if known.kind is float else 1
    return gr.Slider(known.minimum or 0, known.maximum, value=default, step=step, **shown)


def _choices(known: Any) -> list[str]:
    return _sets() if known.name == "references" else list(known.choices)


def _sets() -> list[str]:
    return [controls.NO_REFERENCES, *references.names(REFERENCES)]


# -------------------------------------------------------------------------------------- calibration


def read_calibrating(values: dict[str, Any]) -> calibration.Calibrating:
    """From values by their names; what is missing has its default. Raises ValueError naming what is wrong."""
    from modules import sd_samplers, sd_schedulers

    asked = calibration.Calibrating(**named(values, CALIBRATING.values(), "calibrating"))
    for name, known in (("sampler_name", sd_samplers.all_samplers_map), ("scheduler", sd_schedulers.schedulers_map)):
        if getattr(asked, name) not in known:
            raise ValueError(f"this host has no {name.replace('_', ' ')} {getattr(asked, name)!r}")
    return asked


def calibrate_here(asked: calibration.Calibrating, turn: door.Turn) -> tuple[Any, Path]:
    """Measure ordinary prompts for the loaded checkpoint; (profile, where it is kept). Raises ValueError."""
    p = processing.StableDiffusionProcessingTxt2Img(
        prompt="",
        negative_prompt=asked.negative_prompt,
        seed=1,
        steps=asked.steps,
        width=asked.width,
        height=asked.height,
        sampler_name=asked.sampler_name,
        scheduler=asked.scheduler,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    p.sd_model = shared.sd_model

    def tell(done: int) -> None:
        shared.state.textinfo = f"{TITLE}: {done} of {asked.count} ordinary prompts"

    measuring = calibration.Calibration(HOST, asked, FOLDER, tell)
    with turn.job("dejavu-calibrate"):
        SESSION.watching = measuring
        try:
            run.drawn(p)
        finally:
            SESSION.watching = None
    return measuring.kept()


def _in_turn(work: Callable[[], Found]) -> Found:
    """What ``work`` gives when the host's other runs are done, and where it samples."""
    with call_queue.queue_lock:
        if HOST.name != "Forge":
            return work()
        from modules_forge import main_thread

        outcome: list[Found | Exception] = []

        def caught() -> None:  # that thread keeps to itself what is raised there
            try:
                outcome.append(work())
            except Exception as error:
                outcome.append(error)

        main_thread.run_and_wait_result(caught)
    (found,) = outcome
    if isinstance(found, Exception):
        raise found
    return found


def _told(profile: Any, path: Path) -> str:
    return f"{wording.calibrated(profile)} Kept as {path.name}."


def _calibrate_from_page(*values: Any) -> str:
    try:
        asked = read_calibrating(dict(zip(ON_PAGE, values, strict=True)))
        text = _told(*_in_turn(lambda: calibrate_here(asked, door.Turn(shared.state))))
    except ValueError as error:
        text = f"No calibration: {door.sentence(error, FOLDERS)}"
    return str(panel.paragraph(text))


# -------------------------------------------------------------------------------------------- audit


def audit_here(asked: audit.Asked, turn: door.Turn) -> audit.Finding:
    """Audit a training set. Raises ValueError."""

    def tell(stage: str, done: int, total: int) -> None:
        shared.state.textinfo = f"{TITLE}: {stage}, {done} of {total} prompts"

    with turn.job("dejavu-audit"):
        return audit.run_audit(HOST, asked, REFERENCES, AUDITS, partial(setattr, SESSION, "watching"), tell)


def _audit_from_page(*values: Any) -> str:
    shown = zip((known.name for known in audit.OPTIONS), values, strict=True)
    try:
        asked = audit.read({name: value for name, value in shown if value is not None})  # of a list nothing is chosen
        found = _in_turn(lambda: audit_here(asked, door.Turn(shared.state)))
        return str(panel.framed(found.page(), "What the audit found"))
    except ValueError as error:
        return str(panel.paragraph(f"No audit: {door.sentence(error, FOLDERS)}"))


def audit_tab() -> list[tuple[Any, str, str]]:
    """Does this LoRA copy its training set?"""
    found = {"references": lambda: references.names(REFERENCES), "lora": lambda: [audit.NO_LORA, *audit.loras()]}
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
                components.append(_component(known, "audit", list(known.choices)))
                continue
            with gr.Row():
                components.append(_component(known, "audit", offered()))
                ui_common.create_refresh_button(
                    components[-1],
                    audit.refresh_loras,
                    lambda offered=offered: {"choices": offered()},
                    f"dejavu_refresh_{known.name}_audit",
                )
        with gr.Row():
            begin = gr.Button("Audit", variant="primary", elem_id="dejavu_begin_audit")
            stop = gr.Button("Stop", elem_id="dejavu_stop_audit")
        shown = gr.HTML("", elem_id="dejavu_found_audit")
        begin.click(_audit_from_page, inputs=components, outputs=[shown])
        stop.click(lambda: shared.state.interrupt(), inputs=[], outputs=[])
    return [(tab, TITLE, "dejavu_audit")]


# ------------------------------------------------------------------------------- callbacks, routes


def before_evaluation(params: Any) -> None:
    if SESSION.watching is not None:
        SESSION.watching.before(params)


def after_evaluation(params: Any) -> None:
    if isinstance(SESSION.watching, run.Run):
        SESSION.watching.after_automatic1111(params)


def add_routes(demo: Any, app: Any) -> None:
    """As the host's own routes ours want its password where it has one, and their page no other site's."""

    @app.get("/dejavu/reports")
    def reports(request: Request) -> list[dict[str, Any]]:
        """The reports on the last run that was watched: one for each picture and pass."""
        with _at_the_door():
            door.check_user(request, app, shared.cmd_opts.api_auth)
            return SESSION.shown.documents

    @app.post("/dejavu/calibrate")
    async def calibrate(request: Request) -> dict[str, Any]:
        """Calibrate for the loaded checkpoint; a JSON object of count, width, height, steps, and more by their names."""
        profile, path = await _let_in(request, app, read_calibrating, calibrate_here)
        return {"file": path.name, "prompts": len(profile.nulls), "text": _told(profile, path)}

    @app.post("/dejavu/audit")
    async def audit_named(request: Request) -> dict[str, Any]:
        """Audit a training set; a JSON object of the tab's arguments by their names."""
        found = await _let_in(request, app, audit.read, audit_here)
        return found.as_json()


async def _let_in(
    request: Request, app: Any, read: Callable[[dict[str, Any]], Asked], work: Callable[[Asked, door.Turn], Found]
) -> Found:
    """What ``work`` gives for what is ``read`` from the body, in the host's queue and while the client is there."""
    with _at_the_door():
        options = shared.cmd_opts
        door.check_user(request, app, options.api_auth)
        door.check_site(request, options.cors_allow_origins, options.cors_allow_origins_regex)
        asked, turn = read(await door.body_of(request)), door.Turn(shared.state)
        return await door.while_there(request, turn, lambda: _in_turn(lambda: work(asked, turn)))


@contextmanager
def _at_the_door() -> Iterator[None]:
    """Our refusals and errors as HTTP answers of one sentence; what else goes wrong is told in the host's log only."""
    try:
        yield
    except door.Refused as refused:
        raise HTTPException(refused.status, str(refused), refused.headers) from None
    except ValueError as error:
        status = 409 if isinstance(error, store.HoldsMore) else 400
        raise HTTPException(status, door.sentence(error, FOLDERS)) from error
    except Exception as error:
        log.exception("[Déjà Vu] a request failed")
        raise HTTPException(500, f"this failed ({type(error).__name__}); the host's log says why") from error


def add_settings() -> None:
    section = ("dejavu", TITLE)
    known = next(option for option in controls.OPTIONS if option.name == "alpha")
    shared.opts.add_option(
        "dejavu_infotext",
        shared.OptionInfo(True, "Write verdict, score and p-value into the pictures' parameters", section=section),
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


def add_axes() -> None:
    """Our options for the X/Y/Z plot."""
    plots = [data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py"]
    for grid in plots:

        def change(p: Any, value: Any, values: Any, name: str) -> None:
            p.dejavu_changes = {**getattr(p, "dejavu_changes", {}), "enabled": True, name: value}

        known = {axis.label for axis in grid.axis_options}
        for option in controls.OPTIONS:
            label = f"[{TITLE}] {option.name.replace('_', ' ')}"
            choices = partial(list, option.choices) if option.choices else None
            choices = _sets if option.name == "references" else choices
            if label not in known:
                kind = partial(of_text, option) if option.kind is bool else option.kind  # numbers by ranges too
                axis = grid.AxisOption(label, kind, partial(change, name=option.name), choices=choices)
                grid.axis_options.append(axis)


for name, function in {
    "on_cfg_denoiser": before_evaluation,
    "on_cfg_denoised": after_evaluation,
    "on_app_started": add_routes,
    "on_ui_tabs": audit_tab,
    "on_ui_settings": add_settings,
    "on_before_ui": add_axes,
}.items():
    if hasattr(script_callbacks, name):
        getattr(script_callbacks, name)(function)
    else:
        log.warning("[Déjà Vu] this host has no %s: what needs it is left out", name)
