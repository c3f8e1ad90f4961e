"""Work on a training set in runs of Automatic1111 and Forge.

Prompts are measured inside the first evaluation of a run, which ends there; images are drawn by the host as any image
is. The LoRA stands in the prompt, as users put it there; the base model is a run without it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.conditioning import Conditioning
from ...run.measure import Measurement
from ...training.tasks import Task, Trained, Variant, Work, top_word
from .calibration import PIXELS_PER_LATENT
from .guidance import GuidedModel
from .hosted import Before, Image, Options, Processing
from .run import Host, drawn
from .text import as_typed

SAMPLER, SCHEDULER, BATCH = "Euler", "Automatic", 8


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
                raise ValueError(f"the host could not load {self.lora}: its log says why")
            model = TrainedModel(self.host, step, [float(self.host.sigma(step)[0])] + [0.0] * self.steps)
            with torch.no_grad():
                self.result = self._do(model)
        except Exception as error:
            self.fault = error
        if self.fault is not None or not self.draws:
            raise sd_samplers_common.InterruptedException


Watch = Callable[[Processing, Piece], AbstractContextManager[None]]  # while it is open a run is for its piece


class Runs:
    """Makes a run of the host for each piece of work: the engine of an audit, and of a repair."""

    def __init__(
        self,
        host: Host,
        size: tuple[int, int],
        watch: Watch,
        tag: Callable[[Variant], AbstractContextManager[str]],
        stopped: str,
    ) -> None:
        """``size`` is (width, height) in pixels. While ``tag`` is open, what it gives stands in a prompt for a variant's
        LoRA, empty without one. ``stopped`` is told when the user ends a run."""
        self._host, self._size, self._watch, self._tag, self._stopped = host, size, watch, tag, stopped

    def engine(
        self, tasks: Sequence[Task], load: Callable[[Variant], Trained], work: Work
    ) -> Iterator[tuple[Task, list[Options]]]:
        for task in tasks:
            if task.kind == "images":
                yield task, [self._drawn(task, caption, work.wanted) for caption in task.prompts]
            else:
                yield task, self.within(task.variant, work.wanted, partial(work, task=task))

    def within(self, variant: Variant, wanted: Measurement, do: Callable[[TrainedModel], Any]) -> Any:
        """What ``do`` gives of a variant, in a run that draws nothing. Raises ValueError where the user stops it."""
        found, _ = self._run(variant, "", wanted, 1, do, draws=False)
        return found

    def _drawn(self, task: Task, caption: str, wanted: Measurement) -> Options:
        def word(model: TrainedModel) -> str | None:
            try:
                return top_word(model, model.encode(caption), wanted) if task.words else None
            except ValueError:  # where no gradient can be taken, the images are drawn all the same
                return None

        found, generated = self._run(task.variant, as_typed(caption), wanted, wanted.images, word, draws=True)
        return {"images": [_png(image) for image in generated], "word": found}

    def _run(
        self,
        variant: Variant,
        prompt: str,
        wanted: Measurement,
        images: int,
        do: Callable[[TrainedModel], Any],
        draws: bool,
    ) -> tuple[Any, list[Image]]:
        """(what the work gave, the images that were drawn)."""
        from modules import processing, shared

        width, height = self._size
        with self._tag(variant) as tag:
            p = processing.StableDiffusionProcessingTxt2Img(
                prompt=f"{prompt} {tag}".strip(),
                negative_prompt="",
                seed=wanted.seed,
                batch_size=images,
                steps=wanted.steps,
                cfg_scale=wanted.guidance_scale,
                width=width,
                height=height,
                sampler_name=SAMPLER,
                scheduler=SCHEDULER,
                do_not_save_samples=True,
                do_not_save_grid=True,
            )
            p.sd_model = self._host.chosen_model()
            # With what was encoded before, the host would not bring the text encoder to where the LoRA acts on it.
            p.cached_c, p.cached_uc = [None, None, None], [None, None, None]
            piece = Piece(self._host, wanted.steps, do, tag, draws)
            with self._watch(p, piece), closing(p):
                processed = drawn(p)
        if piece.fault is not None:
            raise piece.fault
        state = shared.state
        if state.interrupted or state.skipped or state.stopping_generation:
            raise ValueError(self._stopped)
        return piece.result, processed.images[processed.index_of_first_image :][:images]


def tag_of(lora: str, strength: float) -> str:
    """How a prompt names one of the host's LoRAs. Raises ValueError where none can."""
    if set(lora) & set(":>"):
        raise ValueError(f"a prompt cannot name the LoRA {lora!r}: rename its file, without ':' and '>'")
    return f"<lora:{lora}:{strength:g}>"


def _png(image: Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
