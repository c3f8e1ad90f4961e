"""Per-sample initial noise: optimise x_T itself until the first step's magnitude is ordinary.

Han et al., NeurIPS 2025 (see :mod:`sd_dejavu.mitigations.batch_wise_noise`), section 3.2.2: minimise || Delta ||_2
over the unit-variance noise of each image, AdamW with learning rate 0.01, until it is at most the target; the
prompt and guidance stay as they are. The paper's target is 0.9 for latents of 4 x 64 x 64; here it is the score
that still counts as ordinary, so that it fits every model and size. An image that has reached it stays where it
is. Unlike the conditioning, the noise moves the prediction without the prompt as well, so both passes are
differentiated. Noise and optimiser are fp32, the network computes in its own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.conditioning import Conditioning
from ..core.denoiser import Denoiser, Model, Predictions, initial_latent
from ..core.gradients import LossScale, scaled_gradients, together, with_gradients
from ..core.memory import in_pieces
from ..core.settings import Checked, option
from ..detectors.magnitude import magnitude
from . import Mitigation, Outcome, Start


@dataclass(frozen=True)
class Settings(Checked):
    noise_iterations: int = option(100, "largest number of updates of the noise", minimum=1, maximum=10000)
    noise_rate: float = option(0.01, "AdamW's learning rate for the noise", minimum=0, maximum=10, exclusive=True)


@dataclass(frozen=True)
class Moved:
    """The new x_T [images, C, H, W], and the magnitudes [images] before each update and at the end."""

    x: Tensor
    magnitudes: tuple[tuple[float, ...], ...]


def optimise(
    denoiser: Denoiser,
    conditioning: Conditioning,
    unconditional: Conditioning,
    x: Tensor,
    sigma: Tensor,
    target: float,
    settings: Settings = Settings(),
    on_iteration: Callable[[int, float], None] = lambda iteration, loss: None,
    batch_size: int | None = None,
) -> Moved:
    """x [B, C, H, W] at sigma [B] -> the x_T at which each image's magnitude is at most ``target``.

    Images that do not reach it in time keep the lowest magnitude seen; at most ``batch_size`` share a pass. Raises ValueError when a magnitude is
    not finite or the target is not positive.
    """
    if not target > 0:
        raise ValueError(f"the target magnitude must be positive, not {target:g}")
    unit = float(initial_latent(torch.ones(()), float(sigma[0]), denoiser.prediction_type))
    noise = (x.detach().float() / unit).requires_grad_(True)
    scale, at_once = LossScale(), together(x, batch_size)
    for given in (conditioning, unconditional):
        at_once = given.images_at_once(len(x), at_once)

    def one_pass(start: int, stop: int) -> tuple[Tensor, Tensor]:
        leaf = noise[start:stop].detach().requires_grad_(True)
        levels = sigma[start:stop]

        def values() -> Tensor:
            both = [
                denoiser(leaf * unit, levels, given.of_images(start, stop, len(x)))
                for given in (conditioning, unconditional)
            ]
            return magnitude(Predictions(both[0], both[1], levels))

        found, (gradient,) = scaled_gradients(values, [leaf], scale)
        return found, gradient

    optimizer = torch.optim.AdamW([noise], lr=settings.noise_rate)
    best, lowest = x.detach().float().clone(), torch.full((len(x),), torch.inf, device=x.device)
    seen: list[tuple[float, ...]] = []
    for iteration in range(settings.noise_iterations + 1):
        found, gradients = zip(*in_pieces(one_pass, len(x), at_once), strict=True)
        values, here = torch.cat(found), noise.detach() * unit
        if not torch.isfinite(values).all():
            raise ValueError(
                f"a magnitude became {values.tolist()} at iteration {iteration}: the model's weights may be broken"
            )
        # Nothing is done again for an image that is there: its first noise that reaches the target is the nearest.
        better = (values < lowest) & (lowest > target)
        best = torch.where(better[:, None, None, None], here, best)
        lowest = torch.where(better, values, lowest)
        seen.append(tuple(lowest.tolist()))
        on_iteration(iteration, float(lowest.mean()))
        if bool((lowest <= target).all()) or iteration == settings.noise_iterations:
            break
        noise.grad = torch.cat(gradients)
        optimizer.step()
    return Moved(best, tuple(seen))


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    score = start.score(model, conditioning)
    if score <= start.acceptable:
        return Outcome.unchanged(conditioning, score)
    if start.unconditional is None:
        raise ValueError("the conditioning without the prompt is not at hand here, so the noise cannot be changed")
    unconditional = start.unconditional

    def work() -> Moved:
        given = (model, conditioning, unconditional, start.x, start.sigma, start.acceptable, settings)
        return optimise(*given, batch_size=start.batch_size)

    found = with_gradients(model, work)
    after = start.moved(model, found.x).score(model, conditioning)
    details = {
        "losses": tuple(sum(values) / len(values) for values in found.magnitudes),
        "moved": float((found.x - start.x).norm() / start.x.norm()),
        "reached": all(value <= start.acceptable for value in found.magnitudes[-1]),
        "target": start.acceptable,
    }
    return Outcome(conditioning, score, after, details, x=found.x.to(start.x.dtype))


MITIGATIONS = (
    Mitigation(
        "per-sample-noise",
        "optimise the starting noise until the first step's magnitude is ordinary",
        touches="noise",
        cost="two forward and backward passes an iteration",
        settings=Settings,
        work=_apply,
        release=(0, 1),
    ),
)
