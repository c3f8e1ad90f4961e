"""ComfyUI's models as a denoiser for the core, and as something to run a function on before sampling."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ...attention import AttentionRule, watched_attention
from ...calibration.ordinary_prompts import ordinary_prompts
from ...conditioning import Conditioning
from ...demo import bundled
from ...denoiser import PredictionType, seeded_noise
from ...guidance import GuidedStep
from ..aliases import normal
from .attention import attending
from .gradients import checkpointed, differentiable, make_room, plain_attention
from .text import SOURCE, encode

FINGERPRINT = "dejavu_fingerprint"  # attachment of a model whose fingerprint is known


def prediction_type_of(sampling: Any) -> PredictionType:
    """What the network puts out, from the host's model_sampling object. Raises ValueError for others."""
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
    """A model during a run of the host, as the core's denoiser.

    ``entry`` is the host's processed conditioning whose rows are replaced; control nets, areas, masks and whatever
    else it carries stay as they are.
    """

    def __init__(
        self,
        patcher: Any,
        inner: Any,
        entry: dict[str, Any],
        model_options: dict[str, Any],
        sigmas: Tensor | Sequence[float],
        x: Tensor,
    ) -> None:
        self._patcher, self._inner, self._entry = patcher, inner, entry
        self._options = model_options
        self._sigmas = [float(s) for s in sigmas]
        self._device, self.latent_shape, self._images = x.device, tuple(x.shape[1:]), x.shape[0]
        self.prediction_type = prediction_type_of(inner.model_sampling)
        self.clip = source.clip if (source := entry.get(SOURCE)) is not None else None
        self.name = "the loaded model"
        self._plain_attention = False

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._patcher)

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
            raise ValueError("the text encoder is not at hand: encode the prompt with the Déjà Vu Text Encode node")
        return encode(self.clip, prompt)

    def decode(self, latents: Tensor) -> Tensor:
        raise ValueError("pictures are decoded by the host's own nodes")

    def pictures_of(self, latents: Tensor) -> Tensor:
        raise ValueError("pictures are decoded by the host's own nodes")

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), watched_attention(self._inner.diffusion_model) as mass:
            self(x, sigma, conditioning)
        return mass.mean()

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.calculate([self.entry_with(conditioning, x)], x, sigma, conditioning.attention)

    def calculate(
        self, entries: list[dict[str, Any]], x: Tensor, sigma: Tensor, attention: AttentionRule | None = None
    ) -> Tensor:
        """The host's own prediction for a list of its processed conditionings."""
        options = attending(self._options, attention)
        if self._plain_attention:
            transformer = {**options.get("transformer_options", {}), "optimized_attention_override": plain_attention}
            options = {**options, "transformer_options": transformer}
        (found,) = comfy.samplers.calc_cond_batch(self._inner, [entries], normal(x), normal(sigma), options)
        return found.float()

    def entry_with(self, conditioning: Conditioning, x: Tensor) -> dict[str, Any]:
        """The entry with other rows, and with the pooled vector that belongs to them."""
        entry = dict(self._entry)
        held = {}
        for name, cond in entry["model_conds"].items():
            value = getattr(cond, "cond", None)
            held[name] = cond._copy_with(normal(value)) if isinstance(value, Tensor) else cond
        kept = conditioning.rows if conditioning.attention is None else conditioning.attention.rows(conditioning.rows)
        rows = normal(kept).to(x.device)
        held["c_crossattn"] = comfy.conds.CONDCrossAttn(rows)
        pooled = conditioning.extras.get("pooled_output")
        if pooled is not None and "y" in held:
            height, width = x.shape[-2] * 8, x.shape[-1] * 8
            sizes = {"width": width, "height": height, "prompt_type": "positive"}
            settings = {**sizes, **entry, "device": x.device, "noise": x, "pooled_output": normal(pooled)}
            held["y"] = comfy.conds.CONDRegular(self._inner.encode_adm(**settings))
        entry["model_conds"] = held
        # The host reuses what it computed for a conditioning of the same number.
        return {**entry, "cross_attn": rows, "uuid": uuid.uuid4()}

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        """Gradients through the model and, where it is at hand, the text encoder."""
        modules = [self._inner, *([self.clip.cond_stage_model] if self.clip is not None else [])]
        before = self._plain_attention
        make_room(self._patcher, self._images * prod(self.latent_shape[1:]))
        try:
            self._plain_attention = True
            with differentiable(modules), checkpointed(self._inner.diffusion_model, checkpointing):
                yield
        finally:
            self._plain_attention = before


def fingerprint(patcher: Any, network: str = "diffusion_model") -> str:
    """16 hexadecimal digits from names, shapes and sampled values of the network's weights, patches included.

    ``network`` is its place in the patcher's model; empty for the whole of it, as with text encoders. Weights that a
    patch has changed in place are read from the host's backup of them.
    """
    found = _fingerprints.setdefault(patcher.model, {})
    if patcher.patches_uuid not in found:
        found[patcher.patches_uuid] = _fingerprint(patcher, network)
    return found[patcher.patches_uuid]


_fingerprints: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()


def _fingerprint(patcher: Any, network: str) -> str:
    known = patcher.attachments.get(FINGERPRINT)
    if known is not None and not patcher.patches:
        return str(known)
    digest = hashlib.sha256()
    if known is not None:
        digest.update(str(known).encode())
    else:
        for key, value in sorted(patcher.model.get_submodule(network).state_dict().items()):
            kept = patcher.backup.get(f"{network}.{key}" if network else key)
            sample_into(digest, key, kept.weight if kept is not None else value)
    for key in sorted(patcher.patches, key=str):
        for strength, patch, on_model, *_ in patcher.patches[key]:
            digest.update(f"{key}{strength}{on_model}".encode())
            for tensor in _tensors(patch):
                sample_into(digest, "", tensor)
    return digest.hexdigest()[:16]


def sample_into(digest: Any, key: str, value: Tensor) -> None:
    flat = value.detach().reshape(-1)
    chosen = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
    digest.update(f"{key}{tuple(value.shape)}".encode() + chosen.numpy().tobytes())


def _tensors(patch: Any) -> Iterator[Tensor]:
    if isinstance(patch, Tensor):
        yield patch
    elif isinstance(patch, (tuple, list)):
        for part in patch:
            yield from _tensors(part)
    elif hasattr(patch, "weights"):
        yield from _tensors(patch.weights)


def ordinary_for(patcher: Any, count: int) -> list[str]:
    """Ordinary prompts of the world that a model knows: the bundled one knows no other than its own."""
    if FINGERPRINT in patcher.attachments:
        return bundled.held_out_ordinary(count, 0)
    return [prompt for prompt, _ in ordinary_prompts(count)]


class _Body(comfy.samplers.Sampler):
    """Runs a function where a sampler would run: models loaded, conditionings processed."""

    def __init__(self, work: Callable[[Any, Tensor, Tensor], Any], make: Callable[..., ComfyModel]) -> None:
        self._work, self._make = work, make
        self.result: Any = None

    def sample(  # the host's signature
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        entry = model_wrap.conds["positive"][0]
        model = self._make(
            model_wrap.model_patcher, model_wrap.inner_model, entry, extra_args["model_options"], sigmas, noise
        )
        sampling = model_wrap.inner_model.model_sampling
        start = torch.zeros_like(noise) if latent_image is None else latent_image
        x = sampling.noise_scaling(sigmas[0], noise.clone(), start, self.max_denoise(model_wrap, sigmas))
        self.result = self._work(model, x, sigmas[0].expand(x.shape[0]))
        return start


def with_model(
    patcher: Any,
    positive: Any,
    latent: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    work: Callable[[Any, Tensor, Tensor], Any],
    make: Callable[..., ComfyModel] = ComfyModel,
) -> Any:
    """``work(model, x, sigma)`` at the start of the run that a sampler would make of this noise and these sigmas.

    ``make`` is the kind of model that ``work`` is given.
    """
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, positive)
    body = _Body(work, make)
    guider.sample(noise, latent, body, sigmas, disable_pbar=True)
    return body.result
