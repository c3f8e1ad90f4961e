"""Guidance rules for every run of the host's samplers, through a wrapper on a clone of the model.

A rule takes part as a post-cfg function, the first of them, and not as the host's one cfg function: other packs'
guidance stays in force and is what a rule calls plain, and where a rule has nothing to say the host's prediction
goes on bit for bit (a cfg function gives x - D, from which rounding does not give back D).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ...core.guidance import GuidanceRule
from ...mitigations import anti_memorization_guidance as amg
from ...mitigations import guidance_transition
from ...run.faults import caught
from .api import CLIP, VAE, BaseModel, Executor, GuidanceArguments, Guider, ModelPatcher
from .evaluation import guided_step, level_of
from .gradients import differentiable
from .model import ComfyModel, as_host, as_images, remember_beginning
from .monitor import INTERRUPTION, KEY
from .reference import HostReferences, image_device
from .run_options import in_guidance
from .text import as_typed

GOES_ON = "guidance goes on as usual, nothing is mitigated: "
KEPT = 4  # times the memory of a decoder's forward pass that its backward pass needs

MakeRule = Callable[[ComfyModel, Guider, Tensor], GuidanceRule]
"""(the model, the host's guider, the x of its first evaluation) -> a rule for this run."""


class Steering:
    """A rule for every run of the models it is attached to, made anew for each.

    ``patchers`` are networks that the rule computes with; the host loads them together with the model. ``tell`` is
    given a sentence at the end of a run, by ``summary``, or when a fault of ours lets it go on without the rule.
    """

    def __init__(
        self,
        make: MakeRule,
        summary: Callable[[Any], str] = lambda rule: "",
        tell: Callable[[str], None] = lambda text: None,
        patchers: Sequence[ModelPatcher] = (),
        clip: CLIP | None = None,
    ) -> None:
        self.make, self.summary, self.tell, self.clip = make, summary, tell, clip
        self._patchers = tuple(patchers)

    def attach(self, patcher: ModelPatcher) -> ModelPatcher:
        """A clone of the model whose runs are steered."""
        clone = patcher.clone()
        key = f"{KEY}-{uuid.uuid4().hex[:8]}"
        # A plain function: the host deep-copies what it finds, and a method would bring its object along.
        outer_sample = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        clone.add_wrapper_with_key(outer_sample, key, lambda *a, **k: self._outer_sample(*a, **k))
        remember_beginning(clone, key)
        if self._patchers:
            clone.set_additional_models(key, list(self._patchers))
        return clone

    def _outer_sample(self, executor: Executor, *arguments: object, **named: object) -> Tensor:
        run = _Run(self, executor.class_obj)
        try:
            with in_guidance(executor.class_obj.model_options, first=[lambda step: run.guided(step)]):
                return executor(*arguments, **named)
        finally:
            run.end()


class _Run:
    """One run of a sampler."""

    def __init__(self, steering: Steering, guider: Guider) -> None:
        self._steering, self._guider = steering, guider
        self._rule: GuidanceRule | None = None
        self._evaluations = 0
        self._fault = ""

    def guided(self, arguments: GuidanceArguments) -> Tensor:
        """The host's prediction, or what the rule makes of it. Faults of ours never cost an image."""
        plain = arguments["denoised"]
        if self._fault:
            return plain
        with caught((INTERRUPTION,), self._tell, GOES_ON, "there was not enough memory: take a smaller image or batch"):
            return self._guided(arguments)
        return plain

    def _tell(self, text: str) -> bool:
        self._fault = f"{GOES_ON}{text}"
        return True

    def _guided(self, arguments: GuidanceArguments) -> Tensor:
        guider, x, sigma, options = self._guider, arguments["input"], arguments["sigma"], arguments["model_options"]

        def make_model() -> ComfyModel:
            sigmas = options.get("transformer_options", {}).get("sample_sigmas", sigma[:1])
            entry = guider.conds["positive"][0]
            model = ComfyModel(guider.model_patcher, guider.inner_model, entry, options, sigmas, x)
            model.clip = model.clip or self._steering.clip
            if self._rule is None:
                self._rule = self._steering.make(model, guider, as_images(x))
            return model

        plain = arguments["denoised"]
        step = guided_step(arguments, guider, level_of(guider.conds, sigma), self._evaluations, make_model)
        if step is None or self._rule is None:
            return plain
        self._evaluations += 1
        return as_host(self._rule(step).to(plain.dtype), x.ndim)

    def end(self) -> None:
        text = self._fault or (self._steering.summary(self._rule) if self._rule is not None else "")
        if text:
            self._steering.tell(text)


def transition(settings: guidance_transition.Settings, tell: Callable[[str], None]) -> Steering:
    def summary(rule: guidance_transition.Transition) -> str:
        guiding = [] if rule.guiding is None else rule.guiding.tolist()
        return f"guidance began in {sum(guiding)} of {len(guiding)} images"

    def make(model: ComfyModel, guider: Guider, x: Tensor) -> guidance_transition.Transition:
        if why := guidance_transition.TRANSITION.refusal(model.prediction_type):
            raise ValueError(why)
        return guidance_transition.Transition(settings.before_transition)

    return Steering(make, summary, tell)


# --------------------------------------------------------------------- anti-memorization guidance


def anti_memorization(
    guard: HostReferences, vae: VAE, clip: CLIP | None, settings: amg.Settings, tell: Callable[[str], None]
) -> Steering:
    """Raises ValueError where this could never act: a VAE of another kind, or a threshold above every similarity."""
    if vae is None:
        raise ValueError("the VAE input is empty: the checkpoint that was loaded may hold no autoencoder")
    vae.throw_exception_if_invalid()
    if vae.latent_dim != 2:
        raise ValueError(
            "this VAE decodes frames along a time axis: anti-memorization guidance needs one that decodes single images"
        )
    lowest = float(amg.threshold_at(torch.ones(1), settings))
    if guard.references.metric == "normalised L2" and min(lowest, settings.threshold + settings.threshold_rise) >= 0:
        raise ValueError(
            f"similarities of this reference set ({guard.features.name}) are never above 0, so a threshold of "
            f"{settings.threshold:g} never acts: set threshold -1.95, rise 0.45 and rate 6.25, as published for it"
        )
    patchers = (vae.patcher, *guard.networks.patchers)
    modules = [patcher.model for patcher in patchers]

    def make(model: ComfyModel, guider: Guider, x: Tensor) -> amg.AntiMemorization:
        _make_room(vae, x, (guider.model_patcher, *patchers))
        images = partial(_images, vae, guider.inner_model)
        encode = None if model.clip is None else lambda caption: model.encode(as_typed(caption))
        kind = model.prediction_type
        return amg.AntiMemorization(guard, images, encode, settings, kind, lambda: differentiable(modules))

    return Steering(make, _steered, tell, patchers, clip)


def _images(vae: VAE, inner: BaseModel, latents: Tensor) -> Tensor:
    """[B, C, H, W] of the sampled model's latents -> images [B, 3, height, width] in 0..1."""
    given = inner.process_latent_out(latents).to(vae.device, vae.vae_dtype)
    return vae.process_output(vae.first_stage_model.decode(given).float()).to(image_device())


def _make_room(vae: VAE, x: Tensor, in_use: Sequence[ModelPatcher]) -> None:
    """Ask the host for the memory of a backward pass through the decoder; in inference mode, as all of its moves."""
    managed = comfy.model_management
    needed = KEPT * vae.memory_used_decode(tuple(x.shape), vae.vae_dtype) * x.shape[0]
    own = [m for m in managed.current_loaded_models if m.model is not None and any(p.is_clone(m.model) for p in in_use)]
    managed.free_memory(needed, vae.device, keep_loaded=own)


def _steered(rule: amg.AntiMemorization) -> str:
    acted = [bool(images.any()) for images in rule.acted]
    return f"steered {sum(acted)} of {len(acted)} evaluations away from a training image"
