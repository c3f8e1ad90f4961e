"""The reference sampler as a host: the runs of the command line, of calibration and of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..calibration.profile import Profile, Setting
from ..core.conditioning import Baseline, Conditioning, Unconditional, sharing, stack
from ..core.denoiser import Denoiser, initial_latent
from ..core.guidance import GuidanceRule
from ..core.sampling import Guidance, batches, sample
from ..core.trace import Trace
from .controller import RunController
from .monitoring import Monitoring
from .state import RunState


@dataclass(frozen=True)
class Run:
    """One prompt's images: their trace, and their final latents [images, C, H, W]."""

    trace: Trace
    latents: Tensor


class ReferenceHost:
    """Prompts that are sampled together; ``empty`` is the empty prompt, where guidance has another."""

    interruptions: tuple[type[BaseException], ...] = ()

    def __init__(
        self,
        denoiser: Denoiser,
        conditionings: Sequence[Conditioning],
        guidance: Guidance,
        empty: Conditioning | None,
        images: int,
    ) -> None:
        self._denoiser, self._conditionings, self._guidance, self._empty = denoiser, conditionings, guidance, empty
        self._images = images

    def model(self, state: RunState) -> Any:
        return self._denoiser

    def prompt(self, state: RunState, model: Any) -> Conditioning:
        assert state.images is not None
        return self._conditionings[state.images[0] // self._images]

    def unconditional(self, state: RunState, model: Any, empty: bool) -> tuple[Conditioning, Unconditional] | None:
        if not empty:
            return self._guidance.unconditional, self._guidance.kind
        return None if self._empty is None else (self._empty, "empty prompt")

    def words(self, state: RunState, model: Any) -> Conditioning:
        return self.prompt(state, model)

    def identity(self, state: RunState, model: Any) -> tuple[Setting | None, Profile | None]:
        """Scores are judged when all prompts are measured (:func:`sd_dejavu.run.measure.verdict_on`)."""
        return None, None

    def refuses_restart(self) -> str:
        return "is already sampled with what was asked for"

    def progress(self) -> None:
        """Its callers are told of every step."""


def sample_prompts(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    guidance: Guidance,
    noise: Tensor,
    sigmas: Sequence[float],
    evaluations: int | None = None,
    batch_size: int = 32,
    on_prompts: Callable[[int], None] = lambda count: None,
    baseline: Baseline | None = None,
    empty: Conditioning | None = None,
) -> list[Run]:
    """Every prompt on the same noise [images, C, H, W]; prompts of one length share batches.

    The images of a prompt are sampled together, however few share an evaluation. ``evaluations`` ends each run after
    that many steps (None: to the end of ``sigmas``). ``on_prompts`` gets the prompts just done. All scores are read,
    against the ``baseline``, or what guidance has; ``empty`` is the empty prompt, where guidance has another.
    """
    images = noise.shape[0]
    x = initial_latent(noise, sigmas[0], denoiser.prediction_type)
    path = sigmas if evaluations is None else sigmas[: evaluations + 1]
    runs: dict[int, Run] = {}
    for part in batches(sharing(conditionings), 1, max(1, batch_size // images)):
        prompts = [prompt for prompt, _ in part]
        chosen = [conditionings[p] for p in prompts]
        found = sampled(denoiser, chosen, guidance, x, path, None, batch_size, baseline, empty)
        runs.update(zip(prompts, found, strict=True))
        on_prompts(len(prompts))
    return [runs[p] for p in range(len(conditionings))]


def sampled(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    guidance: Guidance,
    x: Tensor,
    sigmas: Sequence[float],
    rule: GuidanceRule | None,
    batch_size: int,
    baseline: Baseline | None = None,
    empty: Conditioning | None = None,
) -> list[Run]:
    """Prompts that may share a batch, each from x [images, C, H, W] at ``sigmas[0]``, under a rule in the place of plain
    guidance."""
    images = x.shape[0]
    wanted = Monitoring(baseline=baseline or guidance.kind, explain="never")
    states = [
        RunState(wanted, c.prompt, images=tuple(range(n * images, (n + 1) * images)), every_score=True)
        for n, c in enumerate(conditionings)
    ]
    controller = RunController(ReferenceHost(denoiser, conditionings, guidance, empty, images), wanted, states)
    together = conditionings[0] if len(conditionings) == 1 else stack(conditionings).repeat(images)
    start = x.repeat(len(conditionings), 1, 1, 1)
    latents = sample(
        denoiser, start, sigmas, together, guidance, controller.evaluation, rule=rule, batch_size=batch_size
    )
    controller.end()  # else it keeps more of each batch on the device than will be asked for
    return [Run(state.trace, part) for state, part in zip(states, latents.split(images), strict=True)]
