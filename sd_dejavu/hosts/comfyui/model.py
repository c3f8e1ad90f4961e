"""ComfyUI's models as a denoiser for the core, and as something to run a function on before sampling."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...calibration.ordinary_prompts import general_prompts
from ...calibration.profile import UNKNOWN_ENCODER
from ...calibration.recombined import recombined
from ...core.attention import AttentionRule, watched_attention
from ...core.conditioning import Conditioning
from ...core.denoiser import PredictionType, seeded_noise
from ...core.guidance import GuidedStep
from ...demo import bundled
from ...weights import Identity, Named, digest, named, of_text_encoder, sampled, unpatched
from ...weights import fingerprint as fingerprint_of
from ..aliases import normal
from .api import CLIP, BaseModel, Entry, Executor, Guider, HostConditioning, ModelPatcher, Options
from .attention import attending
from .gradients import checkpointed, differentiable, make_room, must_recompute, plain_attention
from .run_options import uncached
from .text import SOURCE, encode, lost_its_patches, options_with

FINGERPRINT = "dejavu_fingerprint"  # attachment of the bundled model: its name in the profiles that come with it
_CHANGING = ("model_function_wrapper", "sampler_pre_cfg_function")  # options that change a prediction
T = TypeVar("T")
BEGAN = "dejavu_began"  # key in a run's model options that holds what the host made its conditionings for


def why_no_images(latents: Tensor) -> str:
    """Why these latents of the host are not [B, C, H, W], nor that with a time axis of length 1; empty where they are."""
    if latents.ndim not in (4, 5):
        return (
            "only images can be measured, and this run draws sound, or several streams packed into one "
            f"({latents.ndim} dimensions)"
        )
    if latents.ndim == 5 and latents.shape[2] != 1:
        return f"only single images can be measured, and this run draws a video ({latents.shape[2]} latents long)"
    return ""


def as_images(latents: Tensor) -> Tensor:
    """[B, C, H, W] of the host's latents, which may have a time axis of length 1. Raises ValueError for others."""
    if why := why_no_images(latents):
        raise ValueError(why)
    return latents.squeeze(2) if latents.ndim == 5 else latents


def as_host(images: Tensor, dimensions: int) -> Tensor:
    """Images [B, C, H, W] in the number of dimensions of the host's latents."""
    return images.unsqueeze(2) if dimensions == 5 else images


def remember_beginning(patcher: ModelPatcher, key: str) -> None:
    """Let every run of this clone keep what the host made its conditionings for, in the model options of the run."""

    def sampler_sample(
        executor: Executor,
        guider: Guider,
        sigmas: Tensor,
        extra_args: Options,
        callback: object,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        seed = extra_args.get("seed")
        extra_args["model_options"][BEGAN] = beginning(guider, noise, latent_image, denoise_mask, seed)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, key, sampler_sample)


def beginning(
    guider: Guider, noise: Tensor, latent_image: Tensor | None, denoise_mask: Tensor | None, seed: object
) -> dict[str, object]:
    """What the host hands to a model for each conditioning of a run, and what other packs had put to the prompt's."""
    shapes = getattr(guider.inner_model, "latent_shapes", None)
    prompts = guider.original_conds.get("positive") or [{}]
    return {
        "model_conds": prompts[0].get("model_conds", {}),
        "noise": noise,
        "latent_image": latent_image,
        "denoise_mask": denoise_mask,
        "seed": seed,
        **({} if shapes is None else {"latent_shapes": shapes}),
    }


def prediction_type_of(sampling: object) -> PredictionType:
    """What the network puts out, from the host's model_sampling object. Raises ValueError for others."""
    if isinstance(sampling, comfy.model_sampling.COSMOS_RFLOW):
        return "epsilon"  # a flow in the network's scale; x = x0 + sigma * noise is what the sampler and we see
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        return "v_prediction"
    if isinstance(sampling, comfy.model_sampling.CONST):
        return "flow"
    if isinstance(sampling, comfy.model_sampling.EPS):
        return "epsilon"
    raise ValueError(f"models that sample by {type(sampling).__mro__[1].__name__} cannot be measured")


@dataclass(frozen=True)
class HostStep(GuidedStep):
    """``host`` is what the host made of both predictions, with whatever other packs add to its guidance."""

    host: Tensor

    @property
    def plain(self) -> Tensor:
        return self.host


class ComfyModel:
    """A model during a run of the host, as the core's denoiser of images [B, C, H, W].

    ``entry`` is the host's processed conditioning of a prompt. For other prompts the host makes one in its place;
    control nets, areas, masks, ranges, hooks and whatever else belongs to the run stay as they are. ``x`` is a latent
    of the run, as the host has it. Raises ValueError where the run draws no single images.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        inner: BaseModel,
        entry: Entry,
        model_options: Options,
        sigmas: Tensor | Sequence[float],
        x: Tensor,
    ) -> None:
        self._patcher, self._inner, self.entry = patcher, inner, entry
        self._options = model_options
        self._sigmas = [float(s) for s in sigmas]
        self._dimensions = x.ndim
        self._device, self.latent_shape, self._images = x.device, tuple(as_images(x).shape[1:]), x.shape[0]
        self._own: list[tuple[Tensor, list[Entry]]] = []  # stand-ins for entries of the host
        self.negative: list[Entry] = []  # the run's own, processed, where the model was made for a node
        self.prediction_type = prediction_type_of(inner.model_sampling)
        self.clip: CLIP | None = source.clip if (source := entry.get(SOURCE)) is not None else None
        self.name = "the loaded model"
        self._plain_attention = False

    @property
    def fingerprint(self) -> Identity:
        return fingerprint(self._patcher)

    @property
    def text_encoder(self) -> str:
        """16 digits of the text encoder's weights, LoRAs included; empty where it is not at hand."""
        return "" if self.clip is None else text_encoder_of(self.clip)

    @property
    def patches(self) -> str:
        """What the run adds to the checkpoint that moves its predictions, as far as the host tells."""
        transformer = self._options.get("transformer_options", {})
        found = {place for kind in ("patches", "patches_replace") for place in transformer.get(kind) or ()}
        found |= {name for name in _CHANGING if self._options.get(name)}
        found |= {place for place in self._patcher.object_patches if place.startswith("diffusion_model")}
        found |= {name for name in ("control", "hooks", "gligen") if self.entry.get(name) is not None}
        found |= {"reference latents"} if self.entry.get("model_conds", {}).get("ref_latents") is not None else set()
        return ", ".join([*sorted(found), *self._encoder_patches()])

    def _encoder_patches(self) -> list[str]:
        if self.clip is None:
            return [UNKNOWN_ENCODER]
        chosen = self.clip.layer_idx
        return [] if chosen is None or chosen == _usual_layer(self.clip) else [f"clip skip {-chosen}"]

    @property
    def brought_along(self) -> tuple[Path, ...]:
        """Profiles that came with the model: the bundled one has some."""
        return bundled.CALIBRATIONS if FINGERPRINT in self._patcher.attachments else ()

    def sigmas(self, steps: int) -> list[float]:
        """The run's own noise levels, whatever the number of steps asked for."""
        return self._sigmas

    def noise(self, seed: int, images: int) -> Tensor:
        return seeded_noise(self.latent_shape, seed, images).to(self._device)

    def encode(self, prompt: str) -> Conditioning:
        """Raises ValueError where the text encoder is not at hand."""
        if self.clip is None:
            raise ValueError(
                "the text encoder is not at hand: link CLIP to the Monitor, or encode the prompt with Text Encode (Déjà Vu)"
            )
        if lost_its_patches(self.clip):
            raise ValueError(
                "the host has moved the text encoder out of memory, and its LoRAs with it: start ComfyUI with --highvram, or "
                "leave the LoRAs off the text encoder"
            )
        return encode(self.clip, prompt)

    def decode(self, latents: Tensor) -> Tensor:
        raise ValueError("images are decoded by the host's own nodes")

    def images_of(self, latents: Tensor) -> Tensor:
        raise ValueError("images are decoded by the host's own nodes")

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), watched_attention(self._inner.diffusion_model) as mass:
            self(x, sigma, conditioning)
        return mass.mean()

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for rows, entries in self._own:
            if conditioning.rows is rows:
                return self.calculate(entries, x, sigma, images=conditioning.images)
        if conditioning.attention is not None and not isinstance(self._inner.diffusion_model, UNetModel):
            raise ValueError("the host lets nobody change this model's attention: choose another way to mitigate")
        entry = self.entry_with(conditioning, x)
        return self.calculate([entry], x, sigma, conditioning.attention, conditioning.images)

    def of_the_host(self, entries: list[Entry]) -> Conditioning:
        """A conditioning that stands for the host's own processed ``entries``, whatever they hold.

        The model predicts with the entries themselves wherever it is given this very conditioning.
        """
        found = Conditioning(torch.zeros(1, 1, 1))
        self._own.append((found.rows, entries))
        return found

    def calculate(
        self,
        entries: list[Entry],
        x: Tensor,
        sigma: Tensor,
        attention: AttentionRule | None = None,
        images: tuple[int, int] | None = None,
    ) -> Tensor:
        """The host's own prediction for a list of its processed conditionings, on the device that the run began on.

        ``images`` are those of the run's batch that x holds, where it does not hold all.
        """
        if images is not None:
            entries = [_of_images(entry, *images, self._images) for entry in entries]
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            self._refuse_other_weights(entries)
        # Other devices evaluate without gradients, and have no work to share here.
        options = {name: value for name, value in self._options.items() if name != "multigpu_clones"}
        options = attending(uncached(options), attention)
        if self._plain_attention:
            transformer = {**options.get("transformer_options", {}), "optimized_attention_override": plain_attention}
            options = {**options, "transformer_options": transformer}
        given = normal(as_host(x, self._dimensions))
        (found,) = comfy.samplers.calc_cond_batch(self._inner, [entries], given, normal(sigma), options)
        return as_images(found).float()

    def entry_with(self, conditioning: Conditioning, x: Tensor) -> Entry:
        """The entry that the host makes for another prompt in this run, where its rows lie as those of the prompt do.

        Differentiable in the rows and in the pooled vector. x [B, C, H, W] is what it will be evaluated at.
        """
        rows = conditioning.rows if conditioning.attention is None else conditioning.attention.rows(conditioning.rows)
        given = options_with(self.entry, conditioning)
        # The host reuses what it computed for a conditioning of the same number.
        began = dict(self._options.get(BEGAN, {}))
        given |= {"cross_attn": rows, "uuid": uuid.uuid4(), "model_conds": began.pop("model_conds", {})}
        place = self.entry.get("cross_attn")
        for name in ("cross_attn", "pooled_output"):
            if isinstance(value := given.get(name), Tensor):
                given[name] = value.to(value.device if place is None else place.device)
        noise, latents = began.pop("noise", None), as_host(x, self._dimensions)
        if noise is None or noise.shape[1:] != latents.shape[1:] or conditioning.rows.shape[0] > 1:
            noise = latents
        (made,) = comfy.samplers.encode_model_conds(
            self._inner.extra_conds,
            [{name: _normal(value) for name, value in given.items()}],
            normal(noise),
            x.device,
            "positive",
            **{name: _normal(value) for name, value in began.items()},
        )
        held = {
            name: cond._copy_with(_normal(cond.cond)) if hasattr(cond, "_copy_with") else cond
            for name, cond in made["model_conds"].items()
        }
        return {**made, "model_conds": held}

    def _refuse_other_weights(self, entries: list[Entry]) -> None:
        """The host may not change weights for a conditioning's hooks while gradients are taken through them."""
        current = self._inner.current_patcher.current_hooks
        if any(entry.get("hooks") != current for entry in entries):
            raise ValueError("the hooks of this prompt's conditioning change the weights, so no gradients are taken")

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        """Gradients through the model and, where it is at hand, the text encoder.

        The network's blocks recompute their activations with ``checkpointing``, and where memory is too short for them.
        """
        modules = [self._inner, *([self.clip.cond_stage_model] if self.clip is not None else [])]
        before = self._plain_attention
        pixels = prod(self.latent_shape[1:])
        make_room(self._patcher, self._images, pixels)
        recomputing = checkpointing or must_recompute(self._patcher, pixels)
        try:
            self._plain_attention = True
            with differentiable(modules), checkpointed(self._inner.diffusion_model, recomputing):
                yield
        finally:
            self._plain_attention = before


def _of_images(entry: Entry, start: int, stop: int, count: int) -> Entry:
    """The entry for some images of a batch of ``count``: the host would give each of them what the first ones have."""

    def part(value: object) -> object:
        return value[start:stop] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    conds = {
        name: cond._copy_with(part(cond.cond)) if hasattr(cond, "_copy_with") else cond
        for name, cond in entry["model_conds"].items()
    }
    changed = {name: part(entry[name]) for name in ("mask",) if name in entry}
    if entry.get("control") is not None:
        changed["control"] = _control_of_images(entry["control"], part)
    return {**entry, **changed, "model_conds": conds, "uuid": uuid.uuid4()}


def _control_of_images(control: Any, part: Callable[[object], object]) -> object:
    """A control net's copy with hints of these images alone; the run's own keeps what it has prepared for all."""
    copied = copy.copy(control)
    copied.cond_hint = None
    copied.cond_hint_original = part(getattr(control, "cond_hint_original", None))
    if getattr(control, "previous_controlnet", None) is not None:
        copied.previous_controlnet = _control_of_images(control.previous_controlnet, part)
    return copied


def _normal(value: Any) -> Any:
    """The same with every tensor such as may be saved for backward, in lists too."""
    if isinstance(value, Tensor):
        return normal(value)
    if type(value) in (list, tuple):
        return type(value)(_normal(part) for part in value)
    return value


def _usual_layer(clip: CLIP) -> int | None:
    """The layer that a CLIP is read at where nobody asks for another one, counted from its end; None for others."""
    encoders = (getattr(clip.cond_stage_model, f"clip_{name}", None) for name in "lgh")
    usual = {defaults[1] or -1 for encoder in encoders if (defaults := getattr(encoder, "options_default", None))}
    return usual.pop() if len(usual) == 1 else None


def fingerprint(patcher: ModelPatcher, network: str = "diffusion_model") -> Identity:
    """The network's identity, see :mod:`sd_dejavu.weights`; with patches (LoRAs) another one, the same in every run.

    ``network`` is its place in the patcher's model; empty for the whole of it, as with text encoders. Weights that a
    patch has changed in place are read from the host's backup of them. Read once for a model and its patches.
    """
    prediction = prediction_type_of(patcher.get_model_object("model_sampling")) if network else ""
    known = _identities.setdefault(patcher.model, {})
    key = patcher.patches_uuid, prediction
    if key not in known:
        samples = sampled(_weights(patcher, network))
        own, patches = fingerprint_of(samples, prediction), _told(patcher)
        bundled_as = patcher.attachments.get(FINGERPRINT)
        before = named(samples) if bundled_as is None else str(bundled_as).encode()
        former = str(bundled_as) if bundled_as is not None and not patches else digest(before, patches)
        known[key] = Identity(digest(own.encode(), patches) if patches else own, former)
    return known[key]


def text_encoder_of(clip: CLIP) -> str:
    """16 digits of a text encoder's weights, see :mod:`sd_dejavu.weights`. Read once for an encoder and its patches."""
    known = _text_encoders.setdefault(clip.patcher.model, {})
    if clip.patcher.patches_uuid not in known:
        own, patches = fingerprint_of(sampled(of_text_encoder(_weights(clip.patcher, "")))), _told(clip.patcher)
        known[clip.patcher.patches_uuid] = digest(own.encode(), patches) if patches else own
    return known[clip.patcher.patches_uuid]


_identities: WeakKeyDictionary[BaseModel, dict[object, Identity]] = WeakKeyDictionary()
_text_encoders: WeakKeyDictionary[BaseModel, dict[object, str]] = WeakKeyDictionary()


def _weights(patcher: ModelPatcher, network: str) -> Iterator[Named]:
    """A network's weights without patches, each with the precision it is used in where the host tells it."""
    held = patcher.model.get_submodule(network)

    def tensors() -> Iterator[Named]:
        modules = dict(held.named_modules())
        for key, value in held.state_dict().items():
            module, _, name = key.rpartition(".")
            if value.is_meta:
                continue  # it stands for what another pack holds in a way of its own
            # Under dynamic VRAM a weight lies there as in its file, and is cast to this dtype on its way to the card.
            yield key, value, getattr(modules.get(module), f"{name}_comfy_model_dtype", None)

    def kept(key: str) -> Tensor | None:
        backup = patcher.backup.get(f"{network}.{key}" if network else key)
        return None if backup is None else backup.weight

    return unpatched(tensors(), kept)


def _told(patcher: ModelPatcher) -> bytes:
    """A model's patches: where they act, how strongly, and a few values of each; nothing where there are none."""
    heads: list[tuple[str, int]] = []
    tensors: list[Named] = []
    for key in sorted(patcher.patches, key=str):
        for strength, patch, on_model, *_ in patcher.patches[key]:
            before = len(tensors)
            tensors += [("", tensor, None) for tensor in _tensors(patch)]
            heads.append((f"{key}{strength}{on_model}", len(tensors) - before))
    samples = iter(sampled(tensors))
    return b"".join(
        head.encode() + b"".join(named([sample]) for sample in islice(samples, count)) for head, count in heads
    )


def _tensors(patch: object) -> Iterator[Tensor]:
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, (tuple, list)):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)


def ordinary_for(patcher: ModelPatcher, count: int, like: Sequence[str] = ()) -> list[str]:
    """Ordinary prompts like the given ones, or else of the world that a model knows: the bundled one knows its own alone."""
    if like:
        return recombined(like, count)
    if FINGERPRINT in patcher.attachments:
        return bundled.held_out_ordinary(count, 0)
    return general_prompts(count)


class _Body(comfy.samplers.Sampler):
    """Runs a function where a sampler would run: models loaded, conditionings processed."""

    def __init__(self, work: Callable[[Any, Tensor, Tensor], object], make: Callable[..., ComfyModel]) -> None:
        self._work, self._make = work, make
        self.result: Any = None

    def sample(  # the host's signature
        self,
        model_wrap: Guider,
        sigmas: Tensor,
        extra_args: Options,
        callback: object,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        inner = model_wrap.inner_model
        began = beginning(model_wrap, noise, latent_image, denoise_mask, extra_args.get("seed"))
        options = {**extra_args["model_options"], BEGAN: began}
        model = self._make(model_wrap.model_patcher, inner, model_wrap.conds["positive"][0], options, sigmas, noise)
        model.negative = model_wrap.conds["negative"]
        start = torch.zeros_like(noise) if latent_image is None else latent_image
        x = inner.model_sampling.noise_scaling(sigmas[0], noise.clone(), start, self.max_denoise(model_wrap, sigmas))
        self.result = self._work(model, as_images(x), sigmas[0].expand(x.shape[0]))
        return start


def with_model(
    patcher: ModelPatcher,
    positive: HostConditioning,
    latent: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    work: Callable[[Any, Tensor, Tensor], T],
    make: Callable[..., ComfyModel] = ComfyModel,
    negative: HostConditioning | None = None,
) -> T:
    """``work(model, x, sigma)`` at the start of the run that a sampler would make of this noise and these sigmas.

    x is [B, C, H, W]. ``make`` is the kind of model that ``work`` is given; it has ``negative`` as the host processes
    it for this run. Raises ValueError where the run draws no single images.
    """
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, positive if negative is None else negative)
    body = _Body(work, make)
    guider.sample(noise, latent, body, sigmas, disable_pbar=True)
    found: T = body.result
    return found
