"""What is used of the objects of Automatic1111 and Forge, for the type checker; comments name the host of what one has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

Cond = Tensor | dict[str, Tensor]
Options: TypeAlias = dict[str, Any]  # the hosts' dictionaries of many kinds, and JSON objects
Guided: TypeAlias = dict[str, Any]  # what Forge tells after guidance
Component: TypeAlias = Any  # of Gradio, of which two major versions are in use
App: TypeAlias = Any  # of FastAPI
Image: TypeAlias = Any  # of Pillow


class Unet(Protocol):  # Forge
    model: Any
    lora_loader: Any
    model_options: Options
    controlnet_linked_list: object | None
    extra_concat_condition: Tensor | None

    def clone(self) -> Unet: ...
    def set_model_sampler_post_cfg_function(self, function: Callable[[Guided], Tensor]) -> None: ...


class Checkpoint(Protocol):  # the hosts' sd_model
    sd_checkpoint_info: Any
    first_stage_model: Any
    model: Any  # Automatic1111
    scale_factor: float  # Automatic1111
    parameterization: str  # Automatic1111
    alphas_cumprod: Tensor  # Automatic1111
    forge_objects: Any  # Forge: unet, clip, vae


class Chunk(Protocol):
    tokens: list[int]
    fixes: list[tuple[int, Any]]  # textual inversions, after which token


class Engine(Protocol):  # a text encoder with its tokenizer
    id_end: int
    clip_skip: int  # Forge
    minimal_clip_skip: int  # Forge

    def process_texts(self, texts: list[str]) -> tuple[list[list[Chunk]], int]: ...
    def __call__(self, texts: list[str]) -> Tensor | tuple[Tensor, Tensor]: ...


class Denoiser(Protocol):
    p: Processing
    inner_model: Any
    sampler: Any
    step: int
    cond_scale_miltiplier: float  # Automatic1111
    classic_ddim_eps_estimation: bool  # Forge


class Before(Protocol):  # what is told before an evaluation
    x: Tensor
    image_cond: Tensor | None
    sigma: Tensor
    text_cond: Cond
    text_uncond: Cond
    denoiser: Denoiser


class After(Protocol):  # what Automatic1111 tells after one
    x: Tensor
    inner_model: object


class Processing(Protocol):
    """The host's processing object: one call of its ``process_images``, however many batches and passes it has."""

    prompts: list[str]
    negative_prompts: list[str]
    all_prompts: list[str]
    all_hr_prompts: list[str]  # with the hires fix
    seeds: list[int]
    all_seeds: list[int]
    batch_size: int
    width: int
    height: int
    steps: int
    cfg_scale: float
    sampler_name: str
    extra_generation_params: Options
    override_settings: Options
    cached_c: Any
    cached_uc: Any
    scripts: Any
    sd_model: Checkpoint
    sampler: Any
    rng: Any
    dejavu_changes: Mapping[str, object]  # ours, where an axis of the plot sets it

    def comment(self, text: str) -> None:
        """Shows a line below the images."""
        ...


class Processed(Protocol):
    images: list[Image]
    index_of_first_image: int


class State(Protocol):
    """The host's account of the job that it is at."""

    job_timestamp: str
    time_start: float | None
    textinfo: str | None
    job_count: int
    job_no: int
    sampling_step: int
    sampling_steps: int

    def begin(self, job: str) -> None: ...
    def end(self) -> None: ...
    def interrupt(self) -> None: ...


class Request(Protocol):  # of Starlette
    headers: Mapping[str, str]
    receive: Callable[[], Awaitable[Mapping[str, object]]]

    def stream(self) -> AsyncIterator[bytes]: ...
