"""Runs of Automatic1111 and Forge that can begin again from other noise.

Both hosts keep a sampler's function in an object that they make anew for each sampling from noise, and call it once
with the x_T. Ours stands in its place for that one call: it begins the function a second time when a mitigation has
changed the noise, with the random numbers that samplers draw later wound back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from .hosted import Denoiser, Processing


class OtherNoise(BaseException):
    """A mitigation has changed the noise: the run begins again, ``moved`` [B, C, H, W] away in the sampler's own scale.

    No Exception, as the host's own interruption is none: the hosts keep those of callbacks to themselves.
    """

    def __init__(self, moved: Tensor) -> None:
        super().__init__("this run begins again from other noise")
        self.moved = moved


def let_begin_again(p: Processing, tell: Callable[[bool], None]) -> None:
    """The sampling that ``p``, the host's processing object, is about to begin heeds :class:`OtherNoise`.

    ``tell`` is told when it does so and when no longer; never where the host samples in another way.
    """
    sampler, func = p.sampler, p.sampler.func

    @wraps(func)  # the host reads from the signature what the function takes
    def sample(model: Denoiser, x: Tensor, *arguments: object, **named: object) -> Tensor:
        sampler.func = func
        wind_back = _winding_back(p.rng)
        tell(True)
        try:
            found: Tensor = func(model, x, *arguments, **named)
            return found
        except OtherNoise as other:
            moved = other.moved
        finally:
            tell(False)
        wind_back()
        found = func(model, x + moved.to(x), *arguments, **named)
        return found

    sampler.func = sample


def _winding_back(rng: Any) -> Callable[[], None]:
    """Winds the host's random numbers back to where they are now; a sampler may draw some before it asks the model."""
    kept = [_returning(generator) for generator in rng.generators]

    def wind_back() -> None:
        for returning in kept:
            returning()

    return wind_back


def _returning(generator: Any) -> Callable[[], object]:
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    return partial(setattr, generator, "offset", generator.offset)  # the host's own, which draws as an NVIDIA GPU does
