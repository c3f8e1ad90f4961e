"""Models in diffusers layout, single-file checkpoints and hub ids, as a denoiser for the core.

Stable Diffusion 1.x, 2.x and XL, epsilon- and v-prediction. diffusers and transformers are imported
only here and only when a model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import logging
import math
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionRule, scaled_keys, watched_attention
from ..conditioning import Conditioning, EncoderInput, Reencoding, TokenRow, align
from ..denoiser import PredictionType, PromptTooLong, denoised_from_output, model_input, over_pixels, seeded_noise
from ..gradients import BYTES_A_LATENT_PIXEL, RECOMPUTED_FROM, recomputing
from ..guidance import GuidanceRule, GuidedStep
from ..memory import OutOfMemory, free_memory, in_pieces, ran_out, too_large
from ..prompt_weights import encode_weighted
from ..weights import Identity, digest, fingerprint, named, of_module, of_text_encoder, sampled

EVALUATION = 2**29  # bytes that the activations of one evaluation may take; larger batches are cut
EVALUATION_BYTES = 16_000  # a latent pixel takes in half precision: 15,000 in SD1.5, 9,500 in SDXL
DECODER_BYTES = 10_000  # a picture's pixel keeps for a backward pass through the decoder in half precision
CHUNK = 75
MAX_CHUNKS = 8
MAX_CHARACTERS = 100_000  # of a prompt: tokenizers take memory by them, and 600 tokens are far fewer
LARGEST_SIDE = 1024  # of a latent, in latent pixels
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # where a folder's parts may come from
_INDEX = "model_index.json"
_LAYERS = 4  # of 'state_dict' that weights may lie in
_UNUSED = ("safety_checker",)  # of a folder's parts
_CONFIGURATIONS = ("*.json", "*/*.json", "*.txt", "*/*.txt", "*.py", "*/*.py")  # what --config needs of a hub id
_TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
_FAMILIES = {
    "StableDiffusionPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "StableDiffusionXLPipeline": "stabilityai/stable-diffusion-xl-base-1.0",
}
# Of vocabulary and merges. With these two fingerprints are what they were when they did not take tokenizers in:
# the one that Stable Diffusion 1.x, 2.x and XL are published with (CLIP's), and the bundled model's.
_KNOWN_TOKENIZERS = ("e33fa5d1d14a388e", "baad3e40aed93a66")
_WORDS_READ_BACK = 50  # of a tokenizer's own vocabulary, to see whether it can read
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ModelError(ValueError):
    """The model cannot be used; the text says why and what to do."""


class DiffusersModel:
    """A loaded pipeline: encodes prompts, denoises, decodes.

    As a denoiser it takes x [B, C, H, W] and sigma [B] in the scale x = x0 + sigma * noise and returns
    the denoised prediction in fp32.
    """

    prediction_type: PredictionType

    def __init__(self, pipeline: Any, name: str, prompt_weights: bool = False) -> None:
        self.name = name
        self.prompt_weights = prompt_weights
        self.pipeline = pipeline
        self._unet, self._vae = pipeline.unet, pipeline.vae
        self._encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
        if getattr(pipeline, "text_encoder_2", None) is not None:
            self._encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        self._scheduler_config = dict(pipeline.scheduler.config)
        prediction = self._scheduler_config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"{name} predicts {prediction!r}; only epsilon and v_prediction models can be measured here"
            )
        self.prediction_type = prediction
        if self._unet.config.in_channels != self._unet.config.out_channels:
            raise ModelError(_takes_pictures(name))
        for tokenizer, encoder in self._encoders:
            if why := _misfit(tokenizer, encoder.get_input_embeddings().num_embeddings):
                raise ModelError(f"the tokenizer of {name} {why}: get the model again, whole")
        if self._vae.dtype == torch.float16 and self._vae.config.get("force_upcast"):
            self._vae.float()  # SDXL's overflows in float16
        for module in self._modules():
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                if not torch.isfinite(parameter).all():
                    raise ModelError(f"the weights of {name} contain NaN or infinity: the file is broken, get it again")
        self.device = self._unet.device
        self.latent_shape = (int(self._unet.config.in_channels), *_latent_size(self._unet.config.sample_size, name))
        self.alphas_cumprod: Tensor = _alphas_cumprod(self._scheduler_config)
        self._identity: tuple[Identity, str] | None = None
        self.patches = ""

    def _modules(self) -> list[torch.nn.Module]:
        return [self._unet, self._vae, *(encoder for _, encoder in self._encoders)]

    @property
    def fingerprint(self) -> Identity:
        """Of the UNet; see :mod:`sd_dejavu.weights`. Its former name is of the text encoders and tokenizers too."""
        return self._identities()[0]

    @property
    def text_encoder(self) -> str:
        """16 digits of the text encoders' weights, and of the tokenizers where they are others than the published."""
        return self._identities()[1]

    def _identities(self) -> tuple[Identity, str]:
        if self._identity is None:
            unet = sampled(of_module(self._unet))
            encoders = [encoder for _, encoder in self._encoders]
            asked = (tokenizer_digest(tokenizer) for tokenizer, _ in self._encoders)
            tokenizers = [own.encode() for own in asked if own not in _KNOWN_TOKENIZERS]
            parts = (named(unet), *(named(sampled(of_module(encoder))) for encoder in encoders), *tokenizers)
            former = digest(self.prediction_type.encode(), *parts)
            read = fingerprint(sampled(part for encoder in encoders for part in of_text_encoder(of_module(encoder))))
            known = digest(read.encode(), *tokenizers) if tokenizers else read
            self._identity = Identity(fingerprint(unet, self.prediction_type), former), known
        return self._identity

    # ------------------------------------------------------------------------------- denoising

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        at_once = max(1, EVALUATION // self._bytes(EVALUATION_BYTES, x[0, 0].numel()))
        at_once = conditioning.pictures_at_once(len(x), at_once)
        if len(x) <= at_once:
            return self._denoised(x, sigma, conditioning)
        parts = [(begin, min(begin + at_once, len(x))) for begin in range(0, len(x), at_once)]
        return torch.cat([self._denoised(x[a:b], sigma[a:b], conditioning.of_pictures(a, b, len(x))) for a, b in parts])

    def _bytes(self, of_half: int, pixels: int) -> int:
        """What so many latent pixels take, from what one takes in half precision."""
        return of_half * pixels * self._unet.dtype.itemsize // 2

    def _denoised(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self._unet.dtype
        rule = conditioning.attention
        rows = conditioning.rows if rule is None else rule.rows(conditioning.rows)
        if rows.shape[0] == 1:
            rows = rows.expand(x.shape[0], -1, -1)
        extras = {
            k: (v.expand(x.shape[0], *v.shape[1:]) if v.shape[0] == 1 else v).to(dtype)
            for k, v in conditioning.extras.items()
        }
        with self.attending(rule):
            output = self._unet(
                model_input(x, sigma).to(dtype),
                self._timestep(sigma),
                encoder_hidden_states=rows.to(dtype),
                added_cond_kwargs=extras or None,
                return_dict=False,
            )[0]
        return denoised_from_output(output, x, sigma, self.prediction_type)

    def attending(self, rule: AttentionRule | None) -> AbstractContextManager[None]:
        """While open, the UNet attends by ``rule``; it must be given ``rule.rows(...)`` of the prompt and no others."""
        return nullcontext() if rule is None else scaled_keys(self._unet, rule)

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), watched_attention(self._unet) as mass:
            self(x, sigma, conditioning)
        return mass.mean()

    def _timestep(self, sigma: Tensor) -> Tensor:
        """sigma [B] -> fractional timestep [B], linear in log sigma between the schedule's levels."""
        levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().log().to(sigma.device)
        log = sigma.float().clamp_min(1e-10).log()
        high = torch.searchsorted(levels, log.contiguous()).clamp(1, len(levels) - 1)
        low = high - 1
        share = ((log - levels[low]) / (levels[high] - levels[low])).clamp(0, 1)
        fractional = low + share
        nearest = fractional.round()
        # A level of the schedule itself must give its whole timestep, whatever the rounding of the logarithm.
        return torch.where((fractional - nearest).abs() < 1e-3, nearest, fractional)

    def sigmas(self, steps: int) -> list[float]:
        """Noise levels of ``steps`` DDIM steps (leading spacing, offset 1: the first is timestep 981 of 50), then 0."""
        total = len(self.alphas_cumprod)
        if not 1 <= steps <= total:
            raise ValueError(f"the number of steps must be between 1 and {total}, not {steps}")
        timesteps = [min(i * (total // steps) + 1, total - 1) for i in reversed(range(steps))]
        abar = self.alphas_cumprod[timesteps].double()
        return [*((1 - abar) / abar).sqrt().tolist(), 0.0]

    def noise(self, seed: int, images: int) -> Tensor:
        return seeded_noise(self.latent_shape, seed, images).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> pictures [B, 3, height, width] in 0..1, on the CPU; one after another."""
        one_by_one = in_pieces(lambda a, b: self.pictures_of(latents[a:b]).cpu(), len(latents), 1)
        return torch.cat(list(one_by_one)).clamp(0, 1)

    def pictures_of(self, latents: Tensor) -> Tensor:
        """As :meth:`decode`, but differentiable, on the model's device and not cut to 0..1."""
        scale = getattr(self._vae.config, "scaling_factor", 1.0)
        shift = getattr(self._vae.config, "shift_factor", None) or 0.0
        given = (latents / scale + shift).to(self._vae.dtype)
        pixels = given[:, 0].numel() * (self.picture_size[1] // self.latent_shape[2]) ** 2
        kept = DECODER_BYTES * pixels * self._vae.dtype.itemsize // 2
        with recomputing(_blocks(self._vae.decoder) if given.requires_grad and kept > RECOMPUTED_FROM else ()):
            pictures = self._vae.decode(given, return_dict=False)[0]
        return pictures.float() / 2 + 0.5

    @torch.no_grad()
    def latents_of(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1 -> latents [B, C, h, w] in fp32, the encoder's most likely ones; in turn."""
        return torch.cat(list(in_pieces(lambda a, b: self._latents_of(pictures[a:b]), len(pictures), 1)))

    def _latents_of(self, pictures: Tensor) -> Tensor:
        encoded = self._vae.encode((pictures * 2 - 1).to(self.device, self._vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(self._vae.config, "shift_factor", None) or 0.0
        return (latents.float() - shift) * getattr(self._vae.config, "scaling_factor", 1.0)

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what the model draws."""
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * scale, self.latent_shape[2] * scale

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        """Gradients through the model, in its own dtype.

        The UNet's blocks recompute their activations with ``checkpointing``, and where those of one picture are more
        than fits beside the weights on a card of 12 GB, or than is free.
        """
        kept = self._bytes(BYTES_A_LATENT_PIXEL, math.prod(self.latent_shape[1:]))
        free = free_memory(self.device)
        short = kept > RECOMPUTED_FROM or (free is not None and kept > free)
        with recomputing(_blocks(self._unet) if checkpointing or short else ()):
            yield

    # --------------------------------------------------------------------------------- prompts

    def encode(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, in chunks of 75 tokens, with its words and its way back.

        Brackets weigh their words where ``prompt_weights`` is set. Raises PromptTooLong for a prompt of
        more than 8 chunks.
        """
        return encode_weighted(self._encode_plain, prompt) if self.prompt_weights else self._encode_plain(prompt)

    def _encode_plain(self, prompt: str) -> Conditioning:
        if len(prompt) > MAX_CHARACTERS:
            raise PromptTooLong(
                f"the prompt is too long: {len(prompt):,} characters, at most {MAX_CHARACTERS:,} can be read; shorten it"
            )
        chunked = [_chunks(tokenizer, prompt) for tokenizer, _ in self._encoders]
        count = max(len(chunks) for chunks in chunked)
        if count > MAX_CHUNKS:
            total = sum(len(c) for c in max(chunked, key=len))
            raise PromptTooLong(
                f"the prompt is too long: {total} tokens, at most {MAX_CHUNKS * CHUNK} can be read; shorten it"
            )
        inputs, ids = [], []
        words, _ = align(prompt, [])
        for (tokenizer, encoder), chunks in zip(self._encoders, chunked, strict=True):
            chunks = chunks + [[]] * (count - len(chunks))
            pieces = [tokenizer.convert_ids_to_tokens(chunk) for chunk in chunks]
            _, owners = align(prompt, [piece for chunk in pieces for piece in chunk])
            tokens, place = [], iter(owners)
            for chunk in pieces:
                tokens.append(TokenRow(tokenizer.bos_token, "start"))
                tokens += [TokenRow(piece, "word", next(place)) for piece in chunk]
                tokens += [TokenRow(tokenizer.eos_token, "end")] * (CHUNK + 1 - len(chunk))
            numbers = torch.tensor([_padded(tokenizer, chunk) for chunk in chunks], device=self.device)
            ids.append(numbers)
            table = encoder.get_input_embeddings()
            inputs.append(EncoderInput(table(numbers).flatten(0, 1).detach().float(), tuple(tokens)))

        def encode_from(embeddings: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return self._rows_and_extras(ids, embeddings)

        with torch.no_grad():
            rows, extras = self._rows_and_extras(ids, None)
        return Conditioning(rows, extras, prompt, words, inputs[0].tokens, Reencoding(tuple(inputs), encode_from))

    def _rows_and_extras(
        self, ids: Sequence[Tensor], embeddings: Sequence[Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows [1, chunks * 77, D] from token numbers [chunks, 77], or from embeddings put in their place."""
        columns, pooled = [], None
        for number, (numbers, (_, encoder)) in enumerate(zip(ids, self._encoders, strict=True)):
            given = None if embeddings is None else embeddings[number]
            with _replaced_embeddings(encoder, given):
                output = encoder(numbers, output_hidden_states=True)
            if len(self._encoders) == 1:
                columns.append(output.last_hidden_state)
            else:
                columns.append(output.hidden_states[-2])
                pooled = getattr(output, "text_embeds", None)
        rows = torch.cat([c.float() for c in columns], dim=-1).flatten(0, 1)[None]
        if pooled is None:
            return rows, {}
        height, width = self.picture_size
        size = torch.tensor([[height, width, 0, 0, height, width]], device=rows.device, dtype=torch.float32)
        return rows, {"text_embeds": pooled[:1].float(), "time_ids": size}


def _blocks(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that keep most for a backward pass and little when recomputed: none lies within another."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [module for module in network.modules() if isinstance(module, (BasicTransformerBlock, ResnetBlock2D))]


@contextmanager
def guarded(pipeline: Any, rule: GuidanceRule) -> Iterator[None]:
    """While open, an unconditional pipeline (DDPM, DDIM; epsilon-prediction) samples one run under a guidance rule.

    Both predictions of a step are the one there is. A picture that the rule leaves alone is sampled as it would have
    been, bit for bit. Raises ModelError for other prediction types.
    """
    kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ModelError(f"this pipeline predicts {kind!r}; a rule can guide unconditional models that predict epsilon")
    evaluations = itertools.count()

    def refuse(conditioning: Conditioning) -> Tensor:
        raise ModelError("an unconditional model has no prediction under a caption")

    def steer(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        sample, timestep = given[:2]
        eps = output[0]
        abar = pipeline.scheduler.alphas_cumprod.to(sample.device)[timestep].float()
        sigma = ((1 - abar) / abar).sqrt().expand(len(sample))
        x = sample.float() / abar.sqrt().reshape(-1, 1, 1, 1)
        denoised = denoised_from_output(eps, x, sigma, "epsilon")
        steered = rule(GuidedStep(x, sigma, denoised, denoised, 1.0, next(evaluations), refuse))
        changed = eps - ((steered - denoised) / over_pixels(sigma)).to(eps.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    handle = pipeline.unet.register_forward_hook(steer)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced_embeddings(encoder: torch.nn.Module, embeddings: Tensor | None) -> Iterator[None]:
    """While open, the token embedding gives ``embeddings`` [chunks * 77, d] in place of its own output."""
    if embeddings is None:
        yield
        return
    table = encoder.get_input_embeddings()  # type: ignore[operator]
    handle = table.register_forward_hook(lambda module, args, output: embeddings.reshape(output.shape).to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def _chunks(tokenizer: Any, prompt: str) -> list[list[int]]:
    """Token numbers without start and end, 75 a chunk; one empty chunk for the empty prompt."""
    # verbose=False: the tokenizer warns of more than 77 tokens, which are split into chunks here.
    numbers = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return [numbers[i : i + CHUNK] for i in range(0, len(numbers), CHUNK)] or [[]]


def _merges(tokenizer: Any) -> list[str]:
    """The merges of a byte-level tokenizer in their order, each as 'left right'; kept elsewhere by each version."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__) if pair]
    found = json.loads(backend.to_str())["model"].get("merges", [])
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in found]


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hexadecimal digits from a tokenizer's vocabulary and merges."""
    read = [sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), _merges(tokenizer)]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]


def _misfit(tokenizer: Any, embeddings: int) -> str:
    """Why a tokenizer is not that of a text encoder with so many embeddings; empty where it may well be.

    transformers makes up a vocabulary where it finds none, under which every prompt reads alike.
    """
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    if highest >= embeddings or len(vocabulary) < 0.95 * embeddings:
        return f"does not fit its text encoder: {len(vocabulary):,} tokens for {embeddings:,} embeddings"
    whole = sorted(token[: -len("</w>")] for token in vocabulary if token.endswith("</w>") and len(token) > 5)
    words = [word for word in whole if word.isascii() and word.isalpha() and word.islower()]
    asked = words[:: max(1, len(words) // _WORDS_READ_BACK)]
    read = [tokenizer(word, add_special_tokens=False).input_ids for word in asked]
    known = sum(ids == [vocabulary[f"{word}</w>"]] for word, ids in zip(asked, read, strict=True))
    return "cannot read the words of its own vocabulary" if known < len(asked) / 2 else ""


def _latent_size(side: Any, name: str) -> tuple[int, int]:
    """(height, width) of a latent, from a UNet's ``sample_size``."""
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    if len(sides) != 2 or not all(type(one) is int and 1 <= one <= LARGEST_SIDE for one in sides):
        raise ModelError(
            f"{name} does not say what size it draws: the sample_size of its UNet is {side!r} and must be a whole number "
            f"between 1 and {LARGEST_SIDE}"
        )
    return sides


def _padded(tokenizer: Any, chunk: list[int]) -> list[int]:
    body = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
    return body + [tokenizer.pad_token_id] * (CHUNK + 2 - len(body))


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """The schedule a DDIM scheduler builds from a pipeline's scheduler configuration."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(config).alphas_cumprod.float()


# ------------------------------------------------------------------------------------------ loading


def bundled_model_folder() -> Path:
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def load(
    model: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    config: str | None = None,
    prompt_weights: bool = False,
    lora: str | None = None,
    lora_strength: float = 1.0,
) -> DiffusersModel:
    """The bundled model (None), a diffusers folder, a single-file checkpoint, or a hub id named by the user.

    ``config`` names a diffusers folder (or hub id) with the configuration files and tokenizer that a
    single-file checkpoint lacks. ``prompt_weights`` reads '(word:1.3)' in prompts. ``lora`` is a .safetensors file
    in diffusers' or kohya's layout, merged into the weights at ``lora_strength``. Only a hub id given here reaches the
    network. Raises ModelError with a sentence when the model or the LoRA cannot be found or used.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: use one of {', '.join(_DTYPES)}")
    place = _device(device)
    path = bundled_model_folder() if model is None else Path(model)
    name = "bundled model" if model is None else str(model)
    try:
        with quiet():
            pipeline = _load_pipeline(path, name, _DTYPES[dtype], config)
            _refuse_incomplete(pipeline, name)
            if lora is not None:
                _merge_lora(pipeline, Path(lora), lora_strength, name)
            return DiffusersModel(pipeline.to(place), name, prompt_weights)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{name} is broken, or holds Python objects beside its weights, which could run code and are not loaded: "
            "use a .safetensors file"
        ) from error
    except Exception as error:  # the loaders raise dozens of types; all mean that this is not a usable model
        if ran_out(error):
            raise OutOfMemory(f"{name} does not fit: {too_large(error)}") from error
        first_line = str(error).strip().split("\n")[0][:300]
        raise ModelError(f"{name} cannot be loaded as a Stable Diffusion model: {first_line}") from error


def _device(name: str) -> torch.device:
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown: use cpu, cuda, cuda:1 or mps") from error
    if place.type not in counts:
        raise ModelError(f"device {name!r} cannot be used here: use cpu, cuda, cuda:1 or mps")
    if (place.index or 0) >= counts[place.type]:
        raise ModelError(f"device {name!r} was asked for, but this PyTorch sees no such device: use --device cpu")
    return place


def _refuse_incomplete(pipeline: Any, name: str) -> None:
    """diffusers leaves tensors that a file lacks without values."""
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            lacking = [key for key, parameter in module.named_parameters() if parameter.is_meta]
            if lacking:
                raise ModelError(_incomplete(name, part, lacking))


def _merge_lora(pipeline: Any, file: Path, strength: float, name: str) -> None:
    """Adds a LoRA to the weights of the UNet and the text encoders, which keep their names and shapes."""
    if file.suffix != ".safetensors":
        raise ModelError(f"the LoRA {file} is no .safetensors file, the only kind that is read: convert it first")
    if not file.is_file():
        raise ModelError(f"there is no LoRA {file}: check the path")
    if importlib.util.find_spec("peft") is None:
        raise ModelError("merging a LoRA needs the package peft: pip install 'sd-dejavu[finetune]'")
    try:  # warnings are of keys that fit no part of the model: told below, if it is all of them
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    except Exception as error:  # the loaders raise many types; all mean that the file is no LoRA for this model
        told = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        raise ModelError(f"the LoRA {file} cannot be merged into {name}: {told}") from error
    if not pipeline.get_list_adapters():
        raise ModelError(f"the LoRA {file} holds nothing for {name}: it was made for another kind of model")
    pipeline.fuse_lora(components=sorted(pipeline.get_list_adapters()), lora_scale=strength, safe_fusing=True)
    pipeline.unload_lora_weights()


def _takes_pictures(name: str) -> str:
    return f"{name} takes a picture beside the prompt (inpainting or editing); such models cannot be measured here"


def _incomplete(name: str, part: str, lacking: Sequence[str]) -> str:
    return f"{name} is incomplete: it lacks {len(lacking)} of the tensors of its {part}, such as {lacking[0]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Loading without the libraries' progress bars, remarks and warnings; what goes wrong still raises."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity(logging.CRITICAL)
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, had_bars in before:
            library.set_verbosity(level)
            if had_bars:
                library.enable_progress_bar()


def _dtype_argument() -> str:
    """diffusers 0.42 renamed 'torch_dtype'."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def _load_pipeline(path: Path, name: str, dtype: torch.dtype, config: str | None) -> Any:
    if path.is_dir():
        return _load_folder(path, name, dtype)
    if path.is_file():
        return _load_single_file(path, name, dtype, config)
    if not _is_hub_id(name) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelError(
            f"the model {name} does not exist: give a diffusers folder, a checkpoint file or a hub id (owner/name)"
        )
    return _load_folder(_from_hub(name), name, dtype)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _from_hub(name: str) -> Path:
    """A model's files. diffusers sees them only where their index names nothing that would make it run code."""
    import diffusers
    from huggingface_hub import hf_hub_download

    try:
        index = Path(hf_hub_download(name, _INDEX))
        _pipeline_class(index.parent)
        return Path(diffusers.DiffusionPipeline.download(name, revision=index.parent.name))
    except ModelError:
        raise
    except Exception as error:  # the hub's own types, the network's and the operating system's
        raise ModelError(
            f"the model {name} is neither a folder nor a file here, and it could not be fetched from the hub: "
            "check its name and the network"
        ) from error


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> Any:
    cls = _pipeline_class(folder)
    _refuse_missing(folder, name)
    options: dict[str, Any] = {_dtype_argument(): dtype, "safety_checker": None, "requires_safety_checker": False}
    return cls.from_pretrained(folder, **options, **_text_encoders(folder, name, dtype), local_files_only=True)


def _text_encoders(folder: Path, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loaded one by one: within a pipeline, transformers fills tensors that a file lacks with random numbers."""
    import transformers

    loaded = {}
    for part, class_name in _TEXT_ENCODERS.items():
        if (folder / part).is_dir():
            encoder, report = getattr(transformers, class_name).from_pretrained(
                folder / part, local_files_only=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ModelError(_incomplete(name, part, sorted(report["missing_keys"])))
            loaded[part] = encoder.to(dtype)
    return loaded


def _pipeline_class(folder: Path) -> Any:
    """The class that reads a diffusers folder, whole or of configurations alone. Every folder goes through here.

    diffusers imports what lies beside a model: a custom pipeline, a part's own class, and before 0.38 even a
    ``None.py`` that nothing names. So a folder with any code in it is refused.
    """
    import diffusers

    parts = _read_json(folder / _INDEX, f"{folder} is no diffusers folder: it holds no {_INDEX}")
    name = parts.get("_class_name")
    if name not in _PIPELINES:
        raise ModelError(
            f"{folder} holds a {name or 'pipeline without a name'}; Stable Diffusion 1.x, 2.x and XL can be read"
        )
    for part, origin in parts.items():
        foreign = isinstance(origin, list) and (not origin or origin[0] not in _LIBRARIES)
        if foreign or not part.isidentifier():
            raise ModelError(
                f"{folder} brings its own code for its {part}, which is not run: this model cannot be read"
            )
    for file in (*folder.glob("*"), *folder.glob("*/*")):
        calls_code = file.suffix.lower() == ".py" or (
            file.match("*config*.json") and "auto_map" in _read_json(file, f"{file} is no file")
        )
        if calls_code:
            raise ModelError(
                f"{folder} brings its own code ({file.relative_to(folder)}), which is not run: this model cannot be read"
            )
    return getattr(diffusers, name)


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(missing)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is broken: it is no JSON that can be read") from error
    return found if isinstance(found, dict) else {}


def _refuse_missing(folder: Path, name: str) -> None:
    """A part that the index names must be there: the libraries make up some of those that are not."""
    for part, origin in _read_json(folder / _INDEX, f"{folder} holds no {_INDEX}").items():
        if isinstance(origin, list) and origin[0] is not None and part not in _UNUSED:
            place = folder / part
            if not place.is_dir() or not any(place.iterdir()):
                raise ModelError(f"{name} is incomplete: it has no {part}; get the model again, whole")


def _load_single_file(path: Path, name: str, dtype: torch.dtype, config: str | None) -> Any:
    import diffusers

    shapes = _shapes(path)
    family = _family(shapes, name)
    if config is None:
        folder = _cached_configuration(family, shapes, name)
    elif Path(config).is_dir():
        folder = Path(config)
    elif _is_hub_id(config):
        folder = _configuration_from_hub(config, name)
    else:
        raise ModelError(f"the configuration {config} does not exist: give a diffusers folder or a hub id (owner/name)")
    family = _pipeline_class(folder).__name__
    # Without local_files_only diffusers asks the hub for a configuration it does not find.
    try:
        pipeline = getattr(diffusers, family).from_single_file(
            path, config=str(folder), local_files_only=True, safety_checker=None, **{_dtype_argument(): dtype}
        )
    except NotImplementedError as error:  # a tensor that was given no value cannot be cast
        raise ModelError(f"{name} is incomplete: it lacks tensors that its configuration asks for") from error
    if "v_pred" in shapes and pipeline.scheduler.config.get("prediction_type") != "v_prediction":
        raise ModelError(
            f"{name} predicts v, but its configuration says otherwise: name one for v-prediction with --config"
        )
    return pipeline


def _configuration_from_hub(config: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config, allow_patterns=list(_CONFIGURATIONS)))
    except Exception as error:  # the hub's own types, the network's and the operating system's
        raise ModelError(
            f"the configuration {config} for {name} could not be fetched from the hub: check its name and the network"
        ) from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, without their values. Pickles are read as weights only."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a broken file makes the reader fail in many ways
        raise pickle.UnpicklingError(str(error)) from error
    for _ in range(_LAYERS):
        if "state_dict" in state:
            state = state["state_dict"]
    if "state_dict" in state:
        raise ModelError(f"{path} holds a 'state_dict' within a 'state_dict' without an end: the file is broken")
    return {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _family(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    """The pipeline of a checkpoint in the original format; SDXL's carry a second text encoder."""
    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is None:
        raise ModelError(
            f"{name} holds no whole Stable Diffusion 1.x, 2.x or XL model (a LoRA or a part of one, perhaps)"
        )
    if first[1] != 4:
        raise ModelError(_takes_pictures(name))
    is_xl = any(key.startswith("conditioner.embedders.1.") for key in shapes)
    return "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"


def _cached_configuration(family: str, shapes: dict[str, tuple[int, ...]], name: str) -> Path:
    """The family's configuration where an earlier download has left it; the network is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    hint = "name a diffusers folder or hub id of the same family with --config"
    if any(key.startswith("cond_stage_model.model.") for key in shapes):
        raise ModelError(
            f"{name} is a Stable Diffusion 2.x file, which does not tell epsilon- from v-prediction: {hint}"
        )
    try:
        folder = Path(snapshot_download(_FAMILIES[family], local_files_only=True))
        _pipeline_class(folder)
    except (LocalEntryNotFoundError, ModelError) as error:
        raise ModelError(
            f"{name} holds weights only, and the configuration and tokenizer of its family are not on this machine: "
            f"{hint}"
        ) from error
    return folder
