"""A loaded pipeline of diffusers as a denoiser for the core, whatever its family."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...core.attention import AttentionRule, scaled_keys, watched_attention
from ...core.conditioning import Conditioning
from ...core.denoiser import denoised_from_output, seeded_noise
from ...core.gradients import BYTES_A_LATENT_PIXEL, RECOMPUTED_FROM, recomputing
from ...core.memory import free_memory, in_pieces
from ...core.prompt_weights import encode_weighted
from ...weights import Identity, digest, fingerprint, named, of_module, of_text_encoder, sampled
from . import ModelError, clip
from .families import family_of_pipeline

EVALUATION = 2**29  # bytes that the activations of one evaluation may take; larger batches are cut
DECODER_BYTES = 10_000  # an image's pixel keeps for a backward pass through the decoder in half precision
# Of vocabulary and merges. With these two fingerprints are what they were when they did not take tokenizers in:
# the one that Stable Diffusion 1.x, 2.x and XL are published with (CLIP's), and the bundled model's.
_KNOWN_TOKENIZERS = ("e33fa5d1d14a388e", "baad3e40aed93a66")


class DiffusersModel:
    """A loaded pipeline: encodes prompts, denoises, decodes.

    As a denoiser it takes x [B, C, H, W] and sigma [B] in the scale of :mod:`sd_dejavu.core.denoiser` and returns the
    denoised prediction in fp32. Raises ModelError for a pipeline that cannot be measured.
    """

    def __init__(self, pipeline: Any, name: str, prompt_weights: bool = False) -> None:
        self.name = name
        self.prompt_weights = prompt_weights
        self.pipeline = pipeline
        self.family = family_of_pipeline(type(pipeline).__name__, name)
        self._unet, self._vae = getattr(pipeline, self.family.network), pipeline.vae
        self._encoders = [
            (getattr(pipeline, part.replace("text_encoder", "tokenizer")), getattr(pipeline, part))
            for part, _ in self.family.text_encoders
        ]
        self.prediction_type = self.family.prediction_type(pipeline, name)
        self.latent_shape = self.family.latent_shape(pipeline, name)
        for tokenizer, encoder in self._encoders:
            if why := clip.misfit(tokenizer, encoder.get_input_embeddings().num_embeddings):
                raise ModelError(f"the tokenizer of {name} {why}: get the model again, whole")
        if self._vae.dtype == torch.float16 and self._vae.config.get("force_upcast"):
            self._vae.float()  # SDXL's overflows in float16
        for module in self._modules():
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                if not torch.isfinite(parameter).all():
                    raise ModelError(f"the weights of {name} contain NaN or infinity: the file is broken, get it again")
        self.device = self._unet.device
        self.schedule = self.family.schedule(pipeline)
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
        at_once = max(1, EVALUATION // self._bytes(self.family.evaluation_bytes, x[0, 0].numel()))
        at_once = conditioning.images_at_once(len(x), at_once)
        if len(x) <= at_once:
            return self._denoised(x, sigma, conditioning)
        parts = [(begin, min(begin + at_once, len(x))) for begin in range(0, len(x), at_once)]
        return torch.cat([self._denoised(x[a:b], sigma[a:b], conditioning.of_images(a, b, len(x))) for a, b in parts])

    def _bytes(self, of_half: int, pixels: int) -> int:
        """What so many latent pixels take, from what one takes in half precision."""
        return of_half * pixels * self._unet.dtype.itemsize // 2

    def _denoised(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rule = conditioning.attention
        rows = conditioning.rows if rule is None else rule.rows(conditioning.rows)
        timestep = self.schedule.timestep(sigma)
        extras = {name: self._for_each(x, value) for name, value in conditioning.extras.items()}
        with self.attending(rule):
            output = self.family.output(self._unet, x, sigma, timestep, self._for_each(x, rows), extras)
        return denoised_from_output(output, x, sigma, self.prediction_type)

    def _for_each(self, x: Tensor, given: Tensor) -> Tensor:
        """[1 or B, ...] -> [B, ...] in the network's precision."""
        return (given.expand(len(x), *given.shape[1:]) if len(given) == 1 else given).to(self._unet.dtype)

    def attending(self, rule: AttentionRule | None) -> AbstractContextManager[None]:
        """While open, the UNet attends by ``rule``; it must be given ``rule.rows(...)`` of the prompt and no others."""
        return nullcontext() if rule is None else scaled_keys(self._unet, rule)

    def attention_mass(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), watched_attention(self._unet) as mass:
            self(x, sigma, conditioning)
        return mass.mean()

    def sigmas(self, steps: int) -> list[float]:
        return self.schedule.sigmas(steps)

    def noise(self, seed: int, images: int) -> Tensor:
        return seeded_noise(self.latent_shape, seed, images).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, height, width] in 0..1, on the CPU; one after another."""
        one_by_one = in_pieces(lambda a, b: self.images_of(latents[a:b]).cpu(), len(latents), 1)
        return torch.cat(list(one_by_one)).clamp(0, 1)

    def images_of(self, latents: Tensor) -> Tensor:
        """As :meth:`decode`, but differentiable, on the model's device and not cut to 0..1."""
        given = self.family.for_autoencoder(self._vae, latents).to(self._vae.dtype)
        pixels = given[:, 0].numel() * (self.image_size[1] // self.latent_shape[2]) ** 2
        kept = DECODER_BYTES * pixels * self._vae.dtype.itemsize // 2
        with recomputing(self._blocks(self._vae.decoder) if given.requires_grad and kept > RECOMPUTED_FROM else ()):
            images = self._vae.decode(given, return_dict=False)[0]
        return images.float() / 2 + 0.5

    @torch.no_grad()
    def latents_of(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 -> latents [B, C, h, w] in fp32, the encoder's most likely ones; in turn."""
        return torch.cat(list(in_pieces(lambda a, b: self._latents_of(images[a:b]), len(images), 1)))

    def _latents_of(self, images: Tensor) -> Tensor:
        encoded = self._vae.encode((images * 2 - 1).to(self.device, self._vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return self.family.from_autoencoder(self._vae, latents.float())

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what the model draws."""
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * scale, self.latent_shape[2] * scale

    @contextmanager
    def differentiable(self, checkpointing: bool = False) -> Iterator[None]:
        """Gradients through the model, in its own dtype.

        The network's blocks recompute their activations with ``checkpointing``, and where those of one image are more
        than fits beside the weights on a card of 12 GB, or than is free.
        """
        kept = self._bytes(BYTES_A_LATENT_PIXEL, math.prod(self.latent_shape[1:]))
        free = free_memory(self.device)
        short = kept > RECOMPUTED_FROM or (free is not None and kept > free)
        with recomputing(self._blocks(self._unet) if checkpointing or short else ()):
            yield

    def _blocks(self, network: torch.nn.Module) -> list[torch.nn.Module]:
        """The blocks that keep most for a backward pass and little when recomputed."""
        return [module for module in network.modules() if type(module).__name__ in self.family.blocks]

    # --------------------------------------------------------------------------------- prompts

    def encode(self, prompt: str, image_size: tuple[int, int] | None = None) -> Conditioning:
        """The conditioning of one prompt, with its words and its way back.

        Brackets weigh their words where ``prompt_weights`` is set. ``image_size`` is (height, width) in pixels, the
        model's own by default. Raises PromptTooLong for more than can be read.
        """

        def plain(text: str) -> Conditioning:
            return self.family.encode(text, self._encoders, image_size or self.image_size)

        return encode_weighted(plain, prompt) if self.prompt_weights else plain(prompt)


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
