"""The filter of training losses for the host's own LoRA training node, through wrappers on a clone of the model.

That node trains within a sampler of its own: its predictions come through the guider, as in every run, with gradients.
A sample is left out by weighing its gradient by 0 where it enters the network, and those that stay by B / kept, which
gives the gradient of the loss over them alone, whatever the loss function; predictions stay as they are, bit for bit.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import comfy.patcher_extension
import torch
from torch import Tensor

from ...core.denoiser import over_pixels
from ...training.filter import DIFFUSION_STEPS, FilterSettings, TrainingFilter, weights_of
from .api import Entry, Executor, Guider, HostConditioning, ModelPatcher, Options
from .model import ComfyModel, prediction_type_of, remember_beginning
from .monitor import KEY
from .text import conditioning_of


class HostFilter:
    """For every run of the models it is attached to that takes gradients; others are left alone.

    ``empty`` is the host's conditioning of the empty prompt. ``tell`` is given a sentence at the end of a training.
    """

    def __init__(
        self, settings: FilterSettings, empty: HostConditioning, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        rows, options = empty[0]
        self.settings, self.tell = settings, tell
        self._empty = conditioning_of(rows, options)
        self._filter: TrainingFilter | None = None
        self._names: dict[object, int] = {}

    def attach(self, patcher: ModelPatcher) -> ModelPatcher:
        """A clone of the model. Raises ValueError for settings that leave nothing out, and models that are not known."""
        self._new_filter(prediction_type_of(patcher.model.model_sampling))
        types = comfy.patcher_extension.WrappersMP
        clone = patcher.clone()
        key = f"{KEY}-{uuid.uuid4().hex[:8]}"
        # Plain functions: the host deep-copies what it finds, and a method would bring its object along.
        clone.add_wrapper_with_key(types.OUTER_SAMPLE, key, lambda *a, **k: self._outer_sample(*a, **k))
        clone.add_wrapper_with_key(types.PREDICT_NOISE, key, lambda *a, **k: self._predict_noise(*a, **k))
        remember_beginning(clone, key)
        return clone

    def _new_filter(self, prediction_type: str) -> TrainingFilter:
        # What it is given, whatever the network puts out: velocities of a flow, noise predictions of all else.
        return TrainingFilter(self.settings, "flow" if prediction_type == "flow" else "epsilon", may_empty=True)

    def _outer_sample(self, executor: Executor, *arguments: object, **named: object) -> Tensor:
        sampling = executor.class_obj.model_patcher.model.model_sampling
        self._filter, self._names = self._new_filter(prediction_type_of(sampling)), {}
        counts = self._filter.counts
        try:
            return executor(*arguments, **named)
        finally:
            self._filter = None
            if counts.seen:
                self.tell(f"left {counts.left_out} of {counts.seen} samples out of the loss")

    def _predict_noise(
        self, executor: Executor, x: Tensor, sigma: Tensor, model_options: Options | None = None, seed: object = None
    ) -> Tensor:
        options = model_options or {}
        denoised = executor(x, sigma, options, seed)
        if self._filter is not None and denoised.requires_grad:
            weights = self._weights(executor.class_obj, x, sigma, options, denoised.detach())
            denoised.register_hook(lambda gradient: gradient * weights.to(gradient))
        return denoised

    def _weights(self, guider: Guider, x: Tensor, sigma: Tensor, options: Options, denoised: Tensor) -> Tensor:
        """[B, 1, 1, 1]: 0 for what is left out."""
        assert self._filter is not None
        entries, level = guider.conds["positive"], over_pixels(sigma)
        model = ComfyModel(guider.model_patcher, guider.inner_model, entries[0], options, sigma, x)
        sampling = guider.inner_model.model_sampling
        flow = prediction_type_of(sampling) == "flow"
        timesteps = sigma * DIFFUSION_STEPS if flow else sampling.timestep(sigma).reshape(-1).round()

        def without(due: list[int]) -> Tensor:
            return (x[due] - model(x[due], sigma[due], self._empty)) / level[due]

        names = [self._name(entry) for entry in entries] if len(entries) == len(x) else None
        with torch.no_grad():
            stay = self._filter.keep((x - denoised.float()) / level, without, timesteps, names)
        return over_pixels(weights_of(stay))

    def _name(self, entry: Entry) -> str:
        """Of an image: the host gives each a conditioning of its own, whose number it keeps for the whole training."""
        return str(self._names.setdefault(entry["uuid"], len(self._names)))
