"""What of the hosts' own objects is used wherever runs are kept apart: the same in Automatic1111 and in Forge."""

from __future__ import annotations

from typing import Any, Protocol


class Processing(Protocol):
    """The host's processing object: one call of its ``process_images``, however many batches and passes it has."""

    prompts: list[str]
    negative_prompts: list[str]
    all_prompts: list[str]
    seeds: list[int]
    all_seeds: list[int]
    batch_size: int
    steps: int
    cfg_scale: float
    sampler_name: str
    extra_generation_params: dict[str, Any]
    sd_model: Any
    sampler: Any
    rng: Any

    def comment(self, text: str) -> None:
        """Shows a line below the images."""
        ...


class State(Protocol):
    """The host's account of the job that it is at."""

    job_timestamp: str
    time_start: float | None

    def begin(self, job: str) -> None: ...

    def end(self) -> None: ...

    def interrupt(self) -> None: ...
