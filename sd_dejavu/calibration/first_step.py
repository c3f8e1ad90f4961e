"""First-step scores of ordinary prompts, measured as a prompt to be judged is: on its model, size and noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Model
from ..core.memory import OutOfMemory, one_by_one
from ..core.sampling import first_readings
from ..detectors import scores
from .ordinary_prompts import style_of
from .profile import Null

SEED_BASE = 1_000_000  # far from the seeds people type
PROMPTS_A_SEED = 25


def seed_of(number: int) -> int:
    """The seed that the ordinary prompt of this number is measured with: every 25 prompts share one.

    >>> seed_of(0), seed_of(24), seed_of(25)
    (1000000, 1000000, 1000025)
    """
    return SEED_BASE + number // PROMPTS_A_SEED * PROMPTS_A_SEED


def first_step_nulls(
    model: Model,
    prompts: Sequence[str],
    base: Conditioning,
    sigma: float,
    images: int,
    batch_size: int,
    on_prompt: Callable[[], None] = lambda: None,
    on_left_out: Callable[[str, str], None] | None = None,
) -> dict[int, Null]:
    """Of each ordinary prompt, by its number: the scores of ``images`` images at noise level ``sigma``, against ``base``.

    The style of a null is what :func:`style_of` calls it, as with the prompts to be judged. ``on_prompt`` is called
    after each prompt and may raise to interrupt. A prompt for which memory does not suffice is left out, and
    ``on_left_out`` told why; without that, or where none is left, OutOfMemory is raised.
    """
    at_once = {name: score for name, score in scores().items() if score.of_first_step}
    reads = {score.detector: score.read for score in at_once.values()}
    nulls: dict[int, Null] = {}
    fault: OutOfMemory | None = None
    for start in range(0, len(prompts), PROMPTS_A_SEED):
        noise = model.noise(seed_of(start), images)

        def rows(part: Sequence[str], noise: Tensor = noise) -> list[dict[str, Tensor]]:
            encoded = [model.encode(prompt) for prompt in part]
            found = first_readings(model, encoded, base, noise, sigma, reads, batch_size)
            return [{name: values[number] for name, values in found.items()} for number in range(len(part))]

        together = prompts[start : start + PROMPTS_A_SEED]
        for number, row in enumerate(one_by_one(rows, together), start):
            if isinstance(row, OutOfMemory):
                if on_left_out is None:
                    raise row
                fault = row
                on_left_out(prompts[number], str(row))
            else:
                found = {name: tuple(row[score.detector].tolist()) for name, score in at_once.items()}
                nulls[number] = Null(style_of(prompts[number]), found)
            on_prompt()
    if not nulls and fault is not None:
        raise fault
    return nulls
