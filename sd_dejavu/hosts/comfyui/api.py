"""What this pack uses of ComfyUI, as types for annotations alone: the host has few of its own.

Classes and their members bear the host's names. What only some of its releases have is read by ``getattr`` with a
default and does not stand here; nothing is checked against these types while the pack runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

Entry = dict[str, Any]  # of a conditioning: what goes with its rows, or all of it as a run has processed it
HostConditioning = list[list[Any]]  # CONDITIONING: [rows, Entry] of each
Options = dict[str, Any]  # model_options of a run, transformer_options among them
Chunks = Sequence[Sequence[tuple[Any, ...]]]  # of (number in the vocabulary or vector of its own, weight)


class Latent(TypedDict, total=False):
    samples: Tensor
    batch_index: Sequence[int]


class GuidanceArguments(TypedDict, total=False):  # what a sampler_post_cfg_function is given
    denoised: Tensor
    cond: list[Entry]
    uncond: list[Entry] | None
    cond_denoised: Tensor
    uncond_denoised: Tensor
    empty_cond: list[Entry] | None  # these two with perpendicular guidance
    empty_cond_denoised: Tensor
    cond_scale: float
    input: Tensor
    sigma: Tensor
    model_options: Options


class ModelSampling(Protocol):
    timestep: Callable[[Tensor], Tensor]
    noise_scaling: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


class BaseModel(nn.Module):
    diffusion_model: nn.Module
    model_sampling: ModelSampling
    latent_format: object
    current_patcher: Any  # a ModelPatcher, with the hooks that are in force
    manual_cast_dtype: torch.dtype | None
    get_dtype: Callable[[], torch.dtype]
    process_latent_in: Callable[[Tensor], Tensor]
    process_latent_out: Callable[[Tensor], Tensor]
    extra_conds: Callable[..., dict[str, Any]]


class ModelPatcher(Protocol):  # MODEL; the host loads other networks by it too
    model: BaseModel
    load_device: torch.device
    patches: Mapping[str, Sequence[tuple[Any, ...]]]
    patches_uuid: object
    object_patches: Mapping[str, object]
    attachments: Mapping[str, object]
    backup: Mapping[str, Any]
    clone: Callable[[], ModelPatcher]
    is_clone: Callable[[object], bool]
    get_model_object: Callable[[str], Any]
    add_wrapper_with_key: Callable[[str, str, Callable[..., Tensor]], None]
    set_additional_models: Callable[[str, list[ModelPatcher]], None]
    set_attachments: Callable[[str, object], None]


class TextModel(nn.Module):
    current_weight_patches_uuid: object
    reset_clip_options: Callable[[], None]
    set_clip_options: Callable[[dict[str, Any]], None]
    encode_token_weights: Callable[[Mapping[str, Chunks]], tuple[Any, ...]]


class CLIP(Protocol):
    patcher: ModelPatcher
    cond_stage_model: TextModel
    tokenizer: object
    layer_idx: int | None
    tokenize: Callable[[str], Mapping[str, Chunks]]
    encode_from_tokens_scheduled: Callable[[Mapping[str, Chunks]], HostConditioning]
    load_model: Callable[[], object]


class VAE(Protocol):
    patcher: ModelPatcher
    first_stage_model: Any  # a network with an encode and a decode of its own
    device: torch.device
    vae_dtype: torch.dtype
    latent_dim: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    process_input: Callable[[Tensor], Tensor]
    process_output: Callable[[Tensor], Tensor]
    memory_used_decode: Callable[[tuple[int, ...], torch.dtype], float]
    spacial_compression_encode: Callable[[], int]
    throw_exception_if_invalid: Callable[[], None]


class ClipVision(Protocol):
    patcher: ModelPatcher
    model: nn.Module
    load_device: torch.device
    image_size: int
    image_mean: Sequence[float]
    image_std: Sequence[float]


class Guider(Protocol):
    model_patcher: ModelPatcher
    inner_model: BaseModel
    model_options: Options
    original_conds: Mapping[str, list[Entry]]
    conds: dict[str, list[Entry]]


class Executor(Protocol):  # what a wrapper is given, to go on with
    class_obj: Guider

    def __call__(self, *arguments: Any, **named: Any) -> Tensor: ...


class Layer(nn.Module):  # one that the host hands its weights when it runs
    weight: Any
    bias: Any
    comfy_cast_weights: bool
    weight_function: Sequence[object]
    bias_function: Sequence[object]
