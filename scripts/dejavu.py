"""Déjà Vu for Automatic1111 and Forge: the accordion, the callbacks and the routes. The work is done in sd_dejavu."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from fastapi import Body, HTTPException
from modules import call_queue, paths, processing, script_callbacks, scripts, shared, ui_common, ui_components

from sd_dejavu.calibration import store
from sd_dejavu.hosts.webui import audit, controls, references, run
from sd_dejavu.report import panel, wording

Found = TypeVar("Found")

TITLE = "Déjà Vu"
SLIDER_LIMIT = 5000  # of wider ranges a slider picks nothing
HOST = run.this_host()
log = logging.getLogger("dejavu")
FOLDER = Path(paths.data_path) / "dejavu" / "calibration"
REFERENCES = Path(paths.data_path) / "dejavu" / "references"
AUDITS = Path(paths.data_path) / "dejavu" / "audits"


class Session:
    """The run that is being sampled, and what is shown of the last one. The host samples one at a time."""

    def __init__(self) -> None:
        self.watching: run.Run | run.Calibration | audit.Piece | None = None
        self.wanted: controls.Wanted | None = None
        self.panel = ""
        self.documents: list[dict[str, Any]] = []
        self._p: Any = None  # the host's processing object of that run
        self._job: float | None = None  # when the host's job began that the run is part of

    def begin(self, p: Any) -> None:
        """A run of its own begins; what was known of the last one goes."""
        if isinstance(self.watching, run.Run):
            self.watching.end()  # a fault of the host's has cut it short
        self.watching = self.wanted = None
        self.panel, self.documents = "", []
        self._p, self._job = p, _job()

    def is_within(self, p: Any) -> bool:
        """Whether ``p`` is drawn in the midst of the run that is watched: another extension repaints a face, say."""
        return isinstance(self.watching, run.Run) and p is not self._p and _job() is not None and _job() == self._job

    def run_of(self, p: Any) -> run.Run | None:
        """The watched run, where ``p`` is what it draws."""
        return self.watching if isinstance(self.watching, run.Run) and p is self._p else None


def _job() -> float | None:
    """When the host's job began; a fault ends all of a job."""
    began: float | None = getattr(shared.state, "time_start", None)
    return began


SESSION = Session()


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
        text = (
            f"No verdict: {error}" if isinstance(error, ValueError) else f"No verdict: {type(error).__name__}: {error}"
        )
        log.warning("[Déjà Vu] %s", text, exc_info=not isinstance(error, ValueError))
        SESSION.panel += str(panel.paragraph(text))
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
            with gr.Row():
                self.parts["count"] = gr.Number(
                    1000, label="ordinary prompts", precision=0, elem_id=f"dejavu_count_{tab}"
                )
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
        for name in ("width", "height", "steps", "sampling", "scheduler", "neg_prompt"):
            if elem_id == f"{tab}_{name}":
                self.parts[name] = component
        if elem_id == f"html_log_{tab}":
            self.shown = gr.HTML("", elem_id=f"dejavu_panel_{tab}")
        if elem_id == f"generation_info_{tab}":
            self.parts["info"] = component
        if self.shown is not None and "info" in self.parts:
            self.parts.pop("info").change(lambda: SESSION.panel, inputs=[], outputs=[self.shown])
        needed = ["count", "told", "width", "height", "steps", "sampling", "scheduler", "neg_prompt"]
        if not self.bound and "calibrate" in self.parts and all(name in self.parts for name in needed):
            self.bound = True
            inputs = [self.parts[name] for name in needed if name != "told"]
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
            SESSION.documents.append({"picture": before + image, "pass": title, **report.as_json()})
        SESSION.panel += str(panel.panel(named))
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
    if choices or known.kind is str:
        return gr.Dropdown(choices, value=default if default in choices else None, **shown)
    if known.maximum is None or known.maximum > SLIDER_LIMIT:
        return gr.Number(default, precision=0 if known.kind is int else None, **shown)
    step = 0.001 if known.kind is float else 1
    return gr.Slider(known.minimum or 0, known.maximum, value=default, step=step, **shown)


def _choices(known: Any) -> list[str]:
    return _sets() if known.name == "references" else list(known.choices)


def _sets() -> list[str]:
    return [controls.NO_REFERENCES, *references.names(REFERENCES)]


# -------------------------------------------------------------------------------------- calibration


def calibrate(
    count: int, width: int, height: int, steps: int, sampler: str, scheduler: str, negative: str
) -> tuple[Any, Path]:
    """Measure ordinary prompts for the loaded checkpoint; (profile, where it is kept). Raises ValueError."""
    if not 20 <= count <= 100_000:
        raise ValueError(f"ordinary prompts must be from 20 to 100,000, not {count}")
    p = processing.StableDiffusionProcessingTxt2Img(
        prompt="",
        negative_prompt=negative,
        seed=1,
        steps=steps,
        width=width,
        height=height,
        sampler_name=sampler,
        scheduler=scheduler,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    p.sd_model = shared.sd_model

    def tell(done: int) -> None:
        shared.state.textinfo = f"{TITLE}: {done} of {count} ordinary prompts"

    measuring = SESSION.watching = run.Calibration(HOST, count, steps, negative, tell)
    shared.state.begin(job="dejavu-calibrate")
    try:
        processing.process_images(p)
    finally:
        SESSION.watching = None
        shared.state.end()
    if measuring.profile is None:
        raise ValueError(f"nothing was measured: {measuring.fault or 'it was stopped'}")
    path = store.path_for(measuring.profile.setting, FOLDER)
    path.parent.mkdir(parents=True, exist_ok=True)
    measuring.profile.save(path)
    return measuring.profile, path


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


def _calibrate(*arguments: Any) -> tuple[Any, Path]:
    return _in_turn(lambda: calibrate(*arguments))


def _told(profile: Any, path: Path) -> str:
    return f"{wording.calibrated(profile)} Kept as {path.name}."


def _calibrate_from_page(*arguments: Any) -> str:
    count, width, height, steps, sampler, scheduler, negative = arguments
    try:
        text = _told(*_calibrate(int(count), int(width), int(height), int(steps), sampler, scheduler, negative))
    except ValueError as error:
        text = f"No calibration: {error}"
    return str(panel.paragraph(text))


# -------------------------------------------------------------------------------------------- audit


def audit_here(values: dict[str, Any]) -> audit.Finding:
    """Audit the training set that these values name. Raises ValueError."""
    asked = audit.read(values)

    def tell(stage: str, done: int, total: int) -> None:
        shared.state.textinfo = f"{TITLE}: {stage}, {done} of {total} prompts"

    shared.state.begin(job="dejavu-audit")
    try:
        return audit.run_audit(HOST, asked, REFERENCES, AUDITS, partial(setattr, SESSION, "watching"), tell)
    finally:
        shared.state.end()


def _audit_from_page(*values: Any) -> str:
    named = dict(zip((known.name for known in audit.OPTIONS), values, strict=True))
    try:
        return str(panel.framed(_in_turn(lambda: audit_here(named)).page(), "What the audit found"))
    except ValueError as error:
        return str(panel.paragraph(f"No audit: {error}"))


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
    @app.get("/dejavu/reports")
    def reports() -> list[dict[str, Any]]:
        """The reports on the last run that was watched: one for each picture and pass."""
        return SESSION.documents

    @app.post("/dejavu/calibrate")
    def calibrate_here(
        count: int = Body(1000),
        width: int = Body(512),
        height: int = Body(512),
        steps: int = Body(20),
        sampler_name: str = Body("Euler"),
        scheduler: str = Body("Automatic"),
        negative_prompt: str = Body(""),
    ) -> dict[str, Any]:
        """Calibrate for the loaded checkpoint."""
        try:
            profile, path = _calibrate(count, width, height, steps, sampler_name, scheduler, negative_prompt)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return {"file": path.name, "prompts": len(profile.nulls), "text": _told(profile, path)}

    @app.post("/dejavu/audit")
    def audit_named(values: dict[str, Any] = Body(...)) -> dict[str, Any]:
        """Audit a training set; the arguments are those of the tab, by their names."""
        try:
            document: dict[str, Any] = _in_turn(lambda: audit_here(values)).as_json()
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return document


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
                axis = grid.AxisOption(label, option.kind, partial(change, name=option.name), choices=choices)
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
