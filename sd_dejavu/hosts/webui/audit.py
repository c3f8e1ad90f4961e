"""The audit of a training set in Automatic1111 and Forge, in runs of the host's own.

Captions are measured inside the first evaluation of a run, which ends there; the worst are drawn by the host as any
image is. The LoRA stands in the prompt, as users put it there; the base model is a run without it. What is finished is
kept below one folder, each audit in a folder of its own, so one that was stopped goes on.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibration.first_step import PROMPTS_A_SEED
from ...calibration.ordinary_prompts import general_prompts
from ...core.conditioning import Conditioning
from ...core.settings import Checked, Option, named, option, options_of
from ...kept import file_digest
from ...report.audit_html import AuditPage, render_audit
from ...report.audit_rows import as_json, settings_shown, thumbnails_of
from ...run.measure import Measurement
from ...training.audit import Audit, AuditSettings, Subject, audit, entries_of, identity, ordinary_for, sampled
from ...training.ledger import Ledger
from ...training.tasks import Task, Trained, Variant, Work, nothing_apart, top_word
from . import references
from .calibration import PIXELS_PER_LATENT, check_size
from .guidance import GuidedModel, checkpoint_of
from .hosted import Before, Image, Options, Processing
from .run import Host, drawn
from .text import as_typed

NO_LORA = "none"
SAMPLER, SCHEDULER, BATCH = "Euler", "Automatic", 8
A_PIECE = PROMPTS_A_SEED  # prompts of a run: as few as can be, for the page to tell how far it is, and to end it soon


@dataclass(frozen=True)
class Audited(Checked):
    """What is audited, and at what size."""

    references: str = option("", "the training set with its captions: a reference set of it")
    lora: str = option(NO_LORA, "the LoRA whose training set it is; none: the checkpoint itself")
    strength: float = option(1.0, "strength of the LoRA", minimum=0, maximum=2, exclusive=True)
    width: int = option(512, "width that was trained on, in pixels", minimum=64, maximum=2048)
    height: int = option(512, "height that was trained on, in pixels", minimum=64, maximum=2048)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.width, self.height)


_NOT_HERE = ("sweep", "strength_steps", "partition", "score", "negative", "baseline", "alpha")
_SETTINGS: tuple[type, ...] = (Audited, AuditSettings, Measurement)
OPTIONS: tuple[Option, ...] = tuple(o for kind in _SETTINGS for o in options_of(kind) if o.name not in _NOT_HERE)


@dataclass(frozen=True)
class Asked:
    what: Audited
    wanted: AuditSettings
    measurement: Measurement


@dataclass(frozen=True)
class Finding:
    """An audit with what is needed to show it."""

    audit: Audit
    subject: Subject
    asked: Asked
    checkpoint: str

    def as_json(self) -> Options:
        return as_json(self.audit, self.checkpoint, _loras_of(self.asked))

    def page(self) -> str:
        """The report with its images as a whole page of its own."""
        asked, audit = self.asked, self.audit
        shown = settings_shown(audit, asked.wanted, asked.measurement, self.subject)
        thumbnails = thumbnails_of(audit, self.subject)
        lora = ", ".join(_loras_of(asked))
        return render_audit(AuditPage(audit, self.checkpoint, lora, asked.what.references, thumbnails, shown))


def read(values: Mapping[str, object]) -> Asked:
    """From values by their names; what is missing has its default. Raises ValueError naming what is wrong."""
    given = {**named(values, OPTIONS, "an audit"), "partition": A_PIECE}
    made = [kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in _SETTINGS]
    return Asked(*made)


def loras() -> list[str]:
    """The host's own LoRAs by their names; none where its extension for them is not there."""
    return sorted(getattr(sys.modules.get("networks"), "available_networks", {}))


def refresh_loras() -> None:
    """Have the host look for LoRA files again."""
    if (networks := sys.modules.get("networks")) is not None:
        networks.list_available_networks()


def run_audit(
    host: Host,
    asked: Asked,
    sets: Path,
    kept: Path,
    watch: Callable[[Processing, Piece], AbstractContextManager[None]],
    tell: Callable[[str, int, int], None],
) -> Finding:
    """``sets`` holds the reference sets, ``kept`` what was measured; while ``watch`` is open a run is for its piece.

    Raises ValueError where there is nothing to measure, or the user stops it.
    """
    from modules import sd_vae, shared

    what, measurement = asked.what, asked.measurement
    guard = references.guard_of(sets, what.references)
    tag = _tag(what)
    entries = sampled(entries_of(guard.references), asked.wanted.sample, measurement.seed)
    subject = Subject(entries, guard.references, guard.features)
    ordinary = ordinary_for(entries, asked.wanted.nulls, general_prompts)
    sd_model = host.chosen_model()
    begun = identity(
        entries,
        ordinary,
        asked.wanted,
        measurement,
        model=checkpoint_of(sd_model),
        vae=str(sd_vae.get_loaded_vae_name()),
        clip_skip=shared.opts.CLIP_stop_at_last_layers,
        lora=_identity_of(what.lora) if tag else "",
        strength=what.strength,
        width=what.width,
        height=what.height,
    )
    runs = _Runs(host, asked, tag, watch)
    found = audit(
        subject,
        [],
        ordinary,
        nothing_apart,
        Work(measurement, BATCH),
        Ledger.below(kept, begun),
        asked.wanted,
        runs.engine,
        tell,
        bool(tag),
    )
    return Finding(found, subject, asked, sd_model.sd_checkpoint_info.name_for_extra)


def _loras_of(asked: Asked) -> list[str]:
    return [] if asked.what.lora == NO_LORA else [asked.what.lora]


def _tag(what: Audited) -> str:
    """What the prompt holds for the LoRA; empty without one. Raises ValueError where the host does not know it."""
    if what.lora == NO_LORA:
        return ""
    if what.lora not in loras():
        raise ValueError(f"there is no LoRA {what.lora!r}: choose one of the list in the tab")
    if set(what.lora) & set(":>"):
        raise ValueError(f"a prompt cannot name the LoRA {what.lora!r}: rename its file, without ':' and '>'")
    return f"<lora:{what.lora}:{what.strength:g}>"


def _identity_of(lora: str) -> str:
    file = Path(sys.modules["networks"].available_networks[lora].filename)
    return f"{lora} {file_digest(file)}"


# ---------------------------------------------------------------------------------------------- runs


class TrainedModel(GuidedModel):
    """The model of a run with the encoder's end of its autoencoder; it reads captions as they are."""

    @property
    def image_size(self) -> tuple[int, int]:
        return self.latent_shape[-2] * PIXELS_PER_LATENT, self.latent_shape[-1] * PIXELS_PER_LATENT

    def encode(self, prompt: str) -> Conditioning:
        self.host.load_encoders(self.step)
        return super().encode(as_typed(prompt))

    def decode(self, latents: Tensor) -> Tensor:
        """One by one, as a decoder asks for more memory than the model does."""
        return torch.cat([self.images_of(latent[None]).detach().clamp(0, 1).cpu() for latent in latents])

    def latents_of(self, images: Tensor) -> Tensor:
        return self.host.latents_of(self.step, images)


class Piece:
    """For one run: some work at its first evaluation, where the run ends unless it is to draw."""

    def __init__(self, host: Host, steps: int, do: Callable[[TrainedModel], object], lora: str, draws: bool) -> None:
        self.host, self.steps, self.lora, self.draws = host, steps, lora, draws
        self.result: Any = None
        self.fault: Exception | None = None
        self._do = do
        self._begun = False

    def before(self, params: Before) -> None:
        from modules import sd_samplers_common

        if self._begun:
            return
        self._begun = True
        try:
            step = self.host.step(params).of([0])
            if self.lora and not self.host.loras(step):
                raise ValueError(f"the host could not load the LoRA {self.lora}: its log says why")
            model = TrainedModel(self.host, step, [float(self.host.sigma(step)[0])] + [0.0] * self.steps)
            with torch.no_grad():
                self.result = self._do(model)
        except Exception as error:
            self.fault = error
        if self.fault is not None or not self.draws:
            raise sd_samplers_common.InterruptedException


class _Runs:
    """Makes a run of the host for each piece of work."""

    def __init__(
        self, host: Host, asked: Asked, tag: str, watch: Callable[[Processing, Piece], AbstractContextManager[None]]
    ) -> None:
        self._host, self._asked, self._tag, self._watch = host, asked, tag, watch

    def engine(
        self, tasks: Sequence[Task], load: Callable[[Variant], Trained], work: Work
    ) -> Iterator[tuple[Task, list[Options]]]:
        for task in tasks:
            yield task, self._drawn(task) if task.kind == "images" else self._measured(task, work)

    def _measured(self, task: Task, work: Work) -> list[Options]:
        found: list[Options]
        found, _ = self._run("" if task.variant.base else self._tag, 1, lambda model: work(model, task), draws=False)
        return found

    def _drawn(self, task: Task) -> list[Options]:
        (caption,) = task.prompts

        def word(model: TrainedModel) -> str | None:
            try:
                return top_word(model, model.encode(caption), self._asked.measurement)
            except ValueError:  # where no gradient can be taken, the images are drawn all the same
                return None

        prompt = f"{as_typed(caption)} {self._tag}".strip()
        found, generated = self._run(prompt, self._asked.measurement.images, word, draws=True)
        return [{"images": [_png(image) for image in generated], "word": found}]

    def _run(self, prompt: str, images: int, do: Callable[[TrainedModel], Any], draws: bool) -> tuple[Any, list[Image]]:
        """(what the work gave, the images that were drawn)."""
        from modules import processing, shared

        what, measurement = self._asked.what, self._asked.measurement
        p = processing.StableDiffusionProcessingTxt2Img(
            prompt=prompt,
            negative_prompt="",
            seed=measurement.seed,
            batch_size=images,
            steps=measurement.steps,
            cfg_scale=measurement.guidance_scale,
            width=what.width,
            height=what.height,
            sampler_name=SAMPLER,
            scheduler=SCHEDULER,
            do_not_save_samples=True,
            do_not_save_grid=True,
        )
        p.sd_model = self._host.chosen_model()
        # With what was encoded before, the host would not bring the text encoder to where the LoRA acts on it.
        p.cached_c, p.cached_uc = [None, None, None], [None, None, None]
        lora = what.lora if self._tag and self._tag in prompt else ""
        piece = Piece(self._host, measurement.steps, do, lora, draws)
        with self._watch(p, piece), closing(p):
            processed = drawn(p)
        if piece.fault is not None:
            raise piece.fault
        state = shared.state
        if state.interrupted or state.skipped or state.stopping_generation:
            raise ValueError("it was stopped; started again, it goes on where it stood")
        return piece.result, processed.images[processed.index_of_first_image :][:images]


def _png(image: Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
