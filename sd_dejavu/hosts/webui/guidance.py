"""One step of guidance in Automatic1111 and in Forge: what they tell of it, and their model to be asked again.

host, sampler family                 sigma is     the network's result is
Automatic1111, k-diffusion and SD3   sigma        denoised
Automatic1111, DDIM, PLMS, UniPC     a timestep   eps
Forge                                sigma        denoised
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...core.attention import AttentionRule, scaled_keys, watched_attention
from ...core.conditioning import Conditioning
from ...core.denoiser import PredictionType, over_pixels, seeded_noise
from ...core.gradients import recomputing
from ...core.schedule import Schedule
from ...training.lora_files import Contents
from ...training.spectral import HostPart, Place, places_by_keys
from ...weights import Identity, Named, digest, fingerprint, of_module, of_text_encoder, sampled, unpatched
from ..aliases import differentiable
from .hosted import Before, Checkpoint, Cond, Denoiser, Options, Unet
from .text import encode, engines_of, modules_of


@dataclass
class Step:
    """An evaluation that the host is about to make; all tensors by image, the conditionings as the host has them."""

    denoiser: Denoiser
    x: Tensor
    level: Tensor  # sigma, or a timestep
    image_cond: Tensor | None
    text_cond: Cond
    text_uncond: Cond | None

    @property
    def sd_model(self) -> Checkpoint:
        return self.denoiser.p.sd_model

    def of(self, images: list[int]) -> Step:
        """The same for some of the images."""
        image_cond = None if self.image_cond is None else self.image_cond[images]
        return Step(self.denoiser, self.x[images], self.level[images], image_cond, self.text_cond, self.text_uncond)


def checkpoint_of(sd_model: Checkpoint) -> str:
    """The host's hash of the file that a model was loaded from."""
    from modules import shared

    return str(getattr(sd_model, "sd_model_hash", None) or shared.opts.sd_model_checkpoint)


def cond_of(conditioning: Conditioning, images: int, like: Cond) -> Cond:
    """A host's conditioning from the core's: its rows, and for SDXL the vector, once for each image."""
    known = like["crossattn"] if isinstance(like, dict) else like
    rows = attended_rows(conditioning).to(known.device, known.dtype).expand(images, -1, -1)
    if not isinstance(like, dict):
        return rows
    vector = conditioning.extras["vector"].to(rows).expand(images, -1)
    return {**like, "crossattn": rows, "vector": vector}


def attended_rows(conditioning: Conditioning) -> Tensor:
    """The rows that the model is given: without those that its attention rule leaves out."""
    rule = conditioning.attention
    return conditioning.rows if rule is None else rule.rows(conditioning.rows)


def rows_of(cond: Cond, places: list[int]) -> Conditioning:
    """Some rows of a host's conditioning as the core's, without words."""
    if isinstance(cond, dict):
        return Conditioning(cond["crossattn"][places], {"vector": cond["vector"][places]})
    return Conditioning(cond[places])


def patched(network: torch.nn.Module) -> list[str]:
    """Which kinds of parts have a forward that is not their class's: 'patched network', 'patched attn2'.

    Who puts the class's own back leaves it with the part, which is none.
    """
    found = set()
    for name, module in network.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            found.add(f"patched {name.rpartition('.')[2] or 'network'}")
    return sorted(found)


def _denoiser_of(params: Before) -> Denoiser:
    """The host's object that evaluates the model. Raises ValueError for a host that does not tell it."""
    denoiser: Denoiser | None = getattr(params, "denoiser", None)
    if denoiser is None:
        raise ValueError(
            "this host does not tell extensions of its denoiser, as Automatic1111 does since 1.8: update it"
        )
    return denoiser


class Automatic1111:
    """Reads and asks Automatic1111's guidance."""

    name = "Automatic1111"

    def step(self, params: Before) -> Step:
        """From the parameters of its callback before an evaluation: the images come last, for the negative prompt."""
        uncond, denoiser = params.text_uncond, _denoiser_of(params)
        images = (uncond["crossattn"] if isinstance(uncond, dict) else uncond).shape[0]
        image_cond = params.image_cond[-images:] if isinstance(params.image_cond, Tensor) else None
        return Step(denoiser, params.x[-images:], params.sigma[-images:], image_cond, params.text_cond, uncond)

    def sigma(self, step: Step) -> Tensor:
        if not self._timesteps(step):
            return step.level
        return Schedule(step.sd_model.alphas_cumprod).sigma(step.level)

    def denoised(self, step: Step, output: Tensor) -> Tensor:
        """The x0 prediction, up to what both predictions of a step have in common."""
        return -over_pixels(self.sigma(step)) * output.float() if self._timesteps(step) else output.float()

    def common(self, step: Step) -> Tensor:
        """What :meth:`denoised` leaves out of the x0 prediction, [B, C, H, W]."""
        return self.scaled(step, step.x) if self._timesteps(step) else torch.zeros_like(step.x)

    def output(self, step: Step, denoised: Tensor) -> Tensor:
        """The other way round, for the host to go on with."""
        return -denoised / over_pixels(self.sigma(step)) if self._timesteps(step) else denoised

    def scaled(self, step: Step, x: Tensor) -> Tensor:
        """x as the core has it, with noise of variance sigma^2."""
        return x * (1 + over_pixels(self.sigma(step)) ** 2).sqrt() if self._timesteps(step) else x

    def unscaled(self, step: Step, x: Tensor) -> Tensor:
        """The other way round: x as the host's sampler has it."""
        return x / (1 + over_pixels(self.sigma(step)[:1]) ** 2).sqrt() if self._timesteps(step) else x

    def predict(self, step: Step, x: Tensor, cond: Cond) -> Tensor:
        """The denoised prediction at x (the core's scale) and the step's level; one row of cond for each of x."""
        x = self.unscaled(step, x)
        image_cond = step.image_cond[:1].expand(x.shape[0], *step.image_cond.shape[1:])  # type: ignore[index,union-attr]
        level = step.level[:1].expand(x.shape[0])
        if step.sd_model.model.conditioning_key == "crossattn-adm":
            given = {"c_crossattn": [cond], "c_adm": image_cond}
        elif isinstance(cond, dict):
            given = {**cond, "c_concat": [image_cond]}
        else:
            given = {"c_crossattn": [cond], "c_concat": [image_cond]}
        found = step.denoiser.inner_model(x, level, cond=given)
        return self.denoised(Step(step.denoiser, x, level, None, cond, None), found)

    def network(self, step: Step) -> torch.nn.Module:
        found: torch.nn.Module = step.sd_model.model.diffusion_model
        return found

    @contextmanager
    def attending(self, step: Step, rule: AttentionRule) -> Iterator[None]:
        """While open, an evaluation of the host's attends to its prompts by ``rule``: theirs are the first rows."""
        prompts = (step.text_cond["crossattn"] if isinstance(step.text_cond, dict) else step.text_cond).shape[0]
        place = [0, 0]  # where the rows of this call begin and end among those of the evaluation

        def call(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            place[:] = place[1], place[1] + given[0].shape[0]

        handle = self.network(step).register_forward_pre_hook(call)
        try:
            with scaled_keys(self.network(step), rule, lambda batch: torch.arange(place[0], place[1]) < prompts):
                yield
        finally:
            handle.remove()

    def prediction_type(self, step: Step) -> PredictionType:
        if getattr(step.sd_model, "is_sd3", False):
            return "flow"
        return "v_prediction" if step.sd_model.parameterization == "v" else "epsilon"

    def refusal(self, step: Step) -> str | None:
        """Why no gradient can be taken here, or None."""
        from modules import sd_unet, shared

        if sd_unet.current_unet is not None:
            return "no gradient can be taken through a compiled (TensorRT) unet: choose 'None' under SD Unet"
        if getattr(shared.cmd_opts, "lowvram", False):
            return "no gradient can be taken under --lowvram: use --medvram, or none of both"
        return None

    @contextmanager
    def encoding(self, step: Step) -> Iterator[None]:
        """While open, the text encoders can be asked in the midst of a run."""
        yield

    @contextmanager
    def differentiable(self, step: Step) -> Iterator[None]:
        with torch.enable_grad():
            yield

    def images_of(self, step: Step, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, height, width] in 0..1; differentiable, unlike the host's own way."""
        decoder = step.sd_model.first_stage_model
        given = (latents / step.sd_model.scale_factor).to(next(decoder.parameters()).dtype)
        images: Tensor = decoder.decode(given).float() / 2 + 0.5
        return images

    @contextmanager
    def decoding(self, step: Step) -> Iterator[None]:
        """While open, :meth:`images_of` can be differentiated."""
        with torch.enable_grad():
            yield

    def chosen_model(self) -> Checkpoint:
        """The checkpoint that runs are made with, loaded."""
        from modules import shared

        return shared.sd_model

    def latents_of(self, step: Step, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] in 0..1 -> latents [B, C, H, W] as the model has them."""
        return _encoded(step, images)

    def load_encoders(self, step: Step) -> None:
        """The text encoders are where their LoRAs act: here they always are."""

    def loras(self, step: Step) -> str:
        import sys

        loaded = getattr(sys.modules.get("networks"), "loaded_networks", [])
        return str([(n.name, n.te_multiplier, n.unet_multiplier) for n in loaded]) if loaded else ""

    def patches(self, step: Step) -> list[str]:
        """Hypernetworks; and what puts a forward of its own into the network (ControlNet) or its attention (IP-Adapter)."""
        from modules import shared

        found = [f"hypernetwork {one.name} {one.multiplier:g}" for one in getattr(shared, "loaded_hypernetworks", [])]
        return [*found, *patched(self.network(step))]

    def clip_skip(self, step: Step) -> str:
        """Where the text encoder is not read at the layer that the model is meant for, in words."""
        from modules import shared

        model, chosen = step.sd_model, int(shared.opts.CLIP_stop_at_last_layers)
        if getattr(model, "is_sdxl", False):
            of_one = chosen != 2 and getattr(shared.opts, "sdxl_clip_l_skip", False)
            return f"clip skip {chosen} of CLIP-L" if of_one else ""
        heeded = not (getattr(model, "is_sd2", False) or getattr(model, "is_sd3", False))
        return f"clip skip {chosen}" if heeded and chosen > 1 else ""

    def weights(self, step: Step) -> tuple[list[Named], list[Named]]:
        """The network's and the text encoders', as they were before LoRAs were added in place."""
        encoders = [modules_of(engine) for engine in engines_of(step.sd_model)]
        return list(_before_loras(self.network(step))), [part for one in encoders for part in _before_loras(one)]

    def places(self, step: Step, contents: Contents, lora: str) -> dict[str, Place]:
        """The place of each module of one of the host's LoRAs that it would put on this model, by name.

        Raises ValueError where the host cannot read the file.
        """
        import sys

        networks = sys.modules["networks"]
        try:
            read = networks.load_network(lora, networks.available_networks[lora])
        except Exception as error:
            raise ValueError(f"the host cannot read the LoRA {lora}: {type(error).__name__}") from error
        own = {key: module.name for module in contents.modules for key in module.keys}
        encoders = [modules_of(engine) for engine in engines_of(step.sd_model)]
        parts = []
        for number, module in enumerate([self.network(step), *encoders]):
            names = {id(inner): name for name, inner in module.named_modules()}
            tensors = {name: tensor for name, tensor, _ in _before_loras(module)}
            keys = {
                own[one.network_key]: _weight_of(one, names[id(one.sd_module)])
                for one in read.modules.values()
                if one.network_key in own and id(one.sd_module) in names and one.shape is not None
            }
            part = "unet" if number == 0 else "text_encoder" if number == 1 else f"text_encoder_{number}"
            parts.append(HostPart(part, keys, tensors.get))
        found = places_by_keys(contents, parts)
        # The host adds LoRAs in place.
        return {name: replace(place, weight=place.weight.clone()) for name, place in found.items()}

    def _timesteps(self, step: Step) -> bool:
        return type(step.denoiser).__name__ == "CFGDenoiserTimesteps"


class Forge:
    """Reads and asks Forge's guidance."""

    name = "Forge"

    def step(self, params: Before) -> Step:
        image_cond = params.image_cond if isinstance(params.image_cond, Tensor) else None
        return Step(_denoiser_of(params), params.x, params.sigma, image_cond, params.text_cond, params.text_uncond)

    def sigma(self, step: Step) -> Tensor:
        return step.level

    def denoised(self, step: Step, output: Tensor) -> Tensor:
        return output.float()

    def common(self, step: Step) -> Tensor:
        return torch.zeros_like(step.x)

    def output(self, step: Step, denoised: Tensor) -> Tensor:
        return denoised

    def scaled(self, step: Step, x: Tensor) -> Tensor:
        return x

    def unscaled(self, step: Step, x: Tensor) -> Tensor:
        """x as the host's sampler has it: those of timesteps go by unit variance, and tell callbacks otherwise."""
        if not step.denoiser.classic_ddim_eps_estimation:
            return x
        return x / (1 + over_pixels(step.level[:1]) ** 2).sqrt()

    def predict(self, step: Step, x: Tensor, cond: Cond) -> Tensor:
        from backend.sampling.condition import Condition, compile_conditions
        from backend.sampling.sampling_function import calc_cond_uncond_batch

        unet = self._unet(step)
        entries = compile_conditions(cond)
        image_cond = unet.extra_concat_condition if unet.extra_concat_condition is not None else step.image_cond
        for entry in entries:
            if isinstance(image_cond, Tensor) and image_cond.shape[2:] == x.shape[2:]:
                entry["model_conds"]["c_concat"] = Condition(image_cond[:1].expand(x.shape[0], *image_cond.shape[1:]))
            if unet.controlnet_linked_list is not None:
                entry["control"] = unet.controlnet_linked_list
        level = step.level[:1].expand(x.shape[0])
        if not torch.is_inference_mode_enabled():
            level = level.clone()
        found, _ = calc_cond_uncond_batch(unet.model, entries, None, x, level, unet.model_options)
        return found.float()

    def network(self, step: Step) -> torch.nn.Module:
        found: torch.nn.Module = self._unet(step).model.diffusion_model
        return found

    @contextmanager
    def attending(self, step: Step, rule: AttentionRule) -> Iterator[None]:
        """While open, an evaluation of the host's attends to its prompts by ``rule``: the host marks their rows."""
        marks: list[int] = []

        def call(module: torch.nn.Module, given: tuple[Tensor, ...], named: Options) -> None:
            marks[:] = named["transformer_options"]["cond_or_uncond"]

        def prompts(batch: int) -> Tensor:
            return torch.tensor([mark == 0 for mark in marks]).repeat_interleave(batch // len(marks))

        handle = self.network(step).register_forward_pre_hook(call, with_kwargs=True)
        try:
            with scaled_keys(self.network(step), rule, prompts):
                yield
        finally:
            handle.remove()

    def prediction_type(self, step: Step) -> PredictionType:
        kind = self._unet(step).model.predictor.prediction_type
        types: dict[str, PredictionType] = {"epsilon": "epsilon", "v_prediction": "v_prediction", "const": "flow"}
        if kind not in types:
            raise ValueError(f"models with {kind} predictions cannot be measured")
        return types[kind]

    def refusal(self, step: Step) -> str | None:
        return None  # weights that cannot be aliased are refused one by one

    @contextmanager
    def encoding(self, step: Step) -> Iterator[None]:
        """While open, the text encoders can be asked in the midst of a run, where they may have been unloaded."""
        with ExitStack() as stack:
            for engine in engines_of(step.sd_model):
                stack.enter_context(_reading_where_it_lies(modules_of(engine)))
            yield

    @contextmanager
    def differentiable(self, step: Step) -> Iterator[None]:
        encoders = [modules_of(engine) for engine in engines_of(step.sd_model)]
        with self.encoding(step), differentiable([self._unet(step).model, *encoders]):
            yield

    def images_of(self, step: Step, latents: Tensor) -> Tensor:
        vae = self._vae(step)
        given = vae.first_stage_model.process_out(latents).to(vae.device, vae.vae_dtype)
        images: Tensor = vae.first_stage_model.decode(given).float() / 2 + 0.5
        return images.to(latents.device)

    @contextmanager
    def decoding(self, step: Step) -> Iterator[None]:
        with differentiable([self._vae(step).first_stage_model]):
            yield

    def _vae(self, step: Step) -> Any:
        """The decoder, where the host computes; with the unet, which the run goes on with."""
        from backend import memory_management

        vae = step.sd_model.forge_objects.vae
        memory_management.load_models_gpu([self._unet(step), vae.patcher])
        return vae

    def chosen_model(self) -> Checkpoint:
        """The checkpoint that runs are made with: the host loads another one only when a run begins."""
        from modules import sd_models

        model, _ = sd_models.forge_model_reload()
        return model

    def latents_of(self, step: Step, images: Tensor) -> Tensor:
        """Images [B, 3, height, width] in 0..1 -> latents [B, C, H, W] as the model has them."""
        from backend import memory_management

        latents = _encoded(step, images)
        memory_management.load_models_gpu([self._unet(step)])  # may have been moved out for the autoencoder
        return latents

    def load_encoders(self, step: Step) -> None:
        """The host takes LoRAs off a text encoder that it moves out: this brings it back with them."""
        from backend import memory_management

        memory_management.load_models_gpu([self._unet(step), step.sd_model.forge_objects.clip.patcher])

    def loras(self, step: Step) -> str:
        current = str(getattr(step.sd_model, "current_lora_hash", ""))
        return "" if current == "[]" else current

    def patches(self, step: Step) -> list[str]:
        unet = self._unet(step)
        transformer = unet.model_options.get("transformer_options", {})
        found = [place for kind in ("patches", "patches_replace") for place in transformer.get(kind) or ()]
        found += [
            name for name in ("model_function_wrapper", "sampler_pre_cfg_function") if unet.model_options.get(name)
        ]
        return sorted([*found, *(["control"] if unet.controlnet_linked_list is not None else [])])

    def clip_skip(self, step: Step) -> str:
        """Where the text encoder is not read at the layer that the model is meant for, in words."""
        skips = {e.clip_skip for e in engines_of(step.sd_model) if e.clip_skip > e.minimal_clip_skip}
        return f"clip skip {max(skips)}" if skips else ""

    def weights(self, step: Step) -> tuple[list[Named], list[Named]]:
        """The network's and the text encoders', as they were before LoRAs were added in place."""
        unet, clip = self._unet(step), step.sd_model.forge_objects.clip.patcher
        kept = unet.lora_loader.backup
        network = unpatched(of_module(self.network(step)), lambda key: kept.get(f"diffusion_model.{key}"))
        return list(network), list(unpatched(of_module(clip.model), clip.lora_loader.backup.get))

    def places(self, step: Step, contents: Contents, lora: str) -> dict[str, Place]:
        """The place of each module of one of the host's LoRAs that it would put on this model, by name."""
        from backend.patcher.lora import model_lora_keys_clip, model_lora_keys_unet

        network, encoders = ({name: tensor for name, tensor, _ in one} for one in self.weights(step))
        network = {f"diffusion_model.{name}": tensor for name, tensor in network.items()}
        clip = step.sd_model.forge_objects.clip.patcher.model
        parts = (
            HostPart("unet", model_lora_keys_unet(self._unet(step).model, {}), network.get),
            HostPart("text_encoder", model_lora_keys_clip(clip, {}), encoders.get),
        )
        return places_by_keys(contents, parts)

    def _unet(self, step: Step) -> Unet:
        return step.denoiser.inner_model.inner_model.forge_objects.unet


def _weight_of(module: Any, name: str) -> str | tuple[str, tuple[int, int, int]]:
    """Which weight of what is called ``name`` a module of a LoRA is for, as Automatic1111 has read it; queries, keys
    and values may lie in one, below each other."""
    whole, rows = module.sd_module, module.shape[0]
    weight = "in_proj_weight" if isinstance(whole, torch.nn.MultiheadAttention) else "weight"
    if len(getattr(whole, weight)) == rows:
        return f"{name}.{weight}"
    return f"{name}.{weight}", (0, "qkv".index(module.sd_key.removesuffix("_proj")[-1]) * rows, rows)


def _before_loras(module: torch.nn.Module) -> Iterator[Named]:
    """A module's weights in Automatic1111, which keeps them beside those that it adds LoRAs to."""

    def kept(name: str) -> Tensor | None:
        place, _, part = name.rpartition(".")
        layer, which = module.get_submodule(place), 0
        if place.endswith("out_proj"):
            around = module.get_submodule(place.rpartition(".")[0])
            layer, which = (around, 1) if isinstance(around, torch.nn.MultiheadAttention) else (layer, 0)
        found = getattr(layer, "network_bias_backup" if part == "bias" else "network_weights_backup", None)
        found = found[which] if isinstance(found, tuple) else found
        return found if part in ("weight", "bias", "in_proj_weight") else None

    return unpatched(of_module(module), kept)


def _encoded(step: Step, images: Tensor) -> Tensor:
    """The hosts draw from the encoder's posterior: always the same, and without touching the run's random numbers."""
    from modules import sd_samplers_common

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        latents: Tensor = sd_samplers_common.images_tensor_to_samples(images, 0, step.sd_model)
    return latents.to(step.x.device).float()


@contextmanager
def _reading_where_it_lies(encoder: torch.nn.Module) -> Iterator[None]:
    """While open, Forge sends tokens to where the encoder's weights are: in the midst of a run it may be unloaded."""
    from backend import memory_management

    device, known = next(encoder.parameters()).device, memory_management.text_encoder_device
    memory_management.text_encoder_device = lambda: device
    try:
        yield
    finally:
        memory_management.text_encoder_device = known


def _heed_interruption() -> None:
    """Raises the host's own exception when the user has ended or skipped this run."""
    from modules import sd_samplers_common, shared

    if shared.state.interrupted or shared.state.skipped:
        raise sd_samplers_common.InterruptedException


class GuidedModel:
    """A host's model at one step, as the core's denoiser; it can be asked at that step's noise level only."""

    def __init__(self, host: Automatic1111 | Forge, step: Step, levels: list[float]) -> None:
        self.host, self.step, self._levels = host, step, levels
        self.latent_shape = tuple(step.x.shape[1:])
        self.prediction_type: PredictionType = host.prediction_type(step)
        self.name = "the loaded checkpoint"

    @property
    def fingerprint(self) -> Identity:
        """Of the checkpoint's network, and of the LoRAs that are in use; formerly the host's hash of the file."""
        network, _ = self._identities()
        known, loras = checkpoint_of(self.step.sd_model), self.host.loras(self.step).encode()
        if not loras:
            return Identity(network, known)
        return Identity(digest(network.encode(), loras), f"{known}-{digest(loras)[:8]}")

    @property
    def text_encoder(self) -> str:
        """16 digits of the text encoders' weights without LoRAs; empty where they cannot be read."""
        return self._identities()[1]

    def _identities(self) -> tuple[str, str]:
        """Of the network and of the text encoders, read once for a checkpoint: the hosts load others in its place."""
        model = self.step.sd_model
        known, found = _identities.get(model, ((), ("", "")))
        loaded = checkpoint_of(model), self.prediction_type
        if known != loaded:
            network, encoders = self.host.weights(self.step)
            found = fingerprint(sampled(network), self.prediction_type), _told(encoders)
            _identities[model] = loaded, found
        return found

    @property
    def patches(self) -> str:
        """What the run adds to the checkpoint, as far as the host tells: clip skip, control nets, patched networks."""
        return ", ".join(filter(None, [self.host.clip_skip(self.step), *self.host.patches(self.step)]))

    @property
    def brought_along(self) -> tuple[Path, ...]:
        return ()

    def sigmas(self, steps: int) -> list[float]:
        return self._levels

    def noise(self, seed: int, images: int) -> Tensor:
        return seeded_noise(self.latent_shape, seed, images).to(self.step.x)

    def encode(self, prompt: str) -> Conditioning:
        _heed_interruption()
        like = self.step.text_cond
        with self.host.encoding(self.step):
            return encode(self.step.sd_model, prompt, like["vector"] if isinstance(like, dict) else None)

    def decode(self, latents: Tensor) -> Tensor:
        raise ValueError("images are decoded by the host itself")

    def images_of(self, latents: Tensor) -> Tensor:
        return self.host.images_of(self.step, latents)

    def decoding(self) -> AbstractContextManager[None]:
        """While open, :meth:`images_of` can be differentiated. Raises ValueError where nothing can be."""
        if why := self.host.refusal(self.step):
            raise ValueError(why)
        return self.host.decoding(self.step)

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), watched_attention(self.host.network(self.step)) as mass:
            self(x, sigma, conditioning)
        return mass.mean()

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        _heed_interruption()
        count = x.shape[0] // conditioning.rows.shape[0]
        if count > 1 and conditioning.rows.shape[0] > 1:
            conditioning = conditioning.repeat(count)
        rule = conditioning.attention
        with nullcontext() if rule is None else scaled_keys(self.host.network(self.step), rule):
            return self.host.predict(self.step, x, cond_of(conditioning, x.shape[0], self.step.text_cond))

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        if why := self.host.refusal(self.step):
            raise ValueError(why)
        blocks = _blocks(self.host.network(self.step)) if checkpointing else []
        with self.host.differentiable(self.step), recomputing(blocks):
            yield


_identities: WeakKeyDictionary[Checkpoint, tuple[tuple[str, ...], tuple[str, str]]] = WeakKeyDictionary()


def _told(encoders: list[Named]) -> str:
    """Empty where there are none that can be read."""
    return fingerprint(sampled(of_text_encoder(encoders))) if encoders else ""


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The network's blocks, each of which can compute its activations again; none for a network of another build."""
    lists = (getattr(network, name, ()) for name in ("input_blocks", "middle_block", "output_blocks", "joint_blocks"))
    return [
        inner
        for block in (block for part in lists for block in part)
        for inner in (block if isinstance(block, torch.nn.Sequential) else [block])
    ]
