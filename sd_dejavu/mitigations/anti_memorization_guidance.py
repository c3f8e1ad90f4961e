"""Anti-Memorization Guidance (AMG): steer away from the nearest reference image, only while it is near.

Chen, Liu, Xu: *Towards Memorization-Free Diffusion Models*, CVPR 2024. At each evaluation, with the guided noise
prediction eps and x0_hat = (x_t - sqrt(1 - abar) eps) / sqrt(abar), n the nearest reference image and s its
similarity to x0_hat (cosine of features, or the negative normalised L2 distance, equations 8 and 9):

    eps <- eps + 1{s > lambda_t} (G_spe + G_dup + G_sim)                                         (10)
    G_spe = -s1 (eps(x, y) - eps(x)),      s1 = clip(c1 s, 0, s0 - 1)           despecification  (13, 14)
    G_dup = -s2 (eps(x, y_n) - eps(x)),    s2 = clip(c2 s, 0, s0 - s1 - 1)      deduplication    (15, 16)
    G_sim = c3 sqrt(1 - abar) grad_{x_t} s                                      dissimilarity    (17)

s0 is the guidance scale, y_n the caption of n. eps is taken as a constant in the gradient, which flows through the
decoder and the feature network only. lambda_t = threshold + rise * exp(-rate t), low early, when x0_hat is vague.

In this project's scale x = x_t / sqrt(abar), so abar = 1 / (1 + sigma^2), eps = (x - D) / sigma and x0_hat = D. With
eps constant dx0_hat/dx_t = 1 / sqrt(abar) = sqrt(1 + sigma^2), so sqrt(1 - abar) grad_{x_t} s = sigma grad_D s, and
D' = x - sigma eps' gives

    D' = D - 1{s > lambda_t} [ s1 (D_c - D_u) + s2 (D_n - D_u) + c3 sigma^2 grad_D s ].

t is the place, 0 to 1, of sigma in the training schedule of Stable Diffusion or of DDPM. Rectified flow has
x = (1 - s) x0 + s noise, hence x / (1 - s) = x0 + sigma noise with sigma = s / (1 - s): at that level all of the above
holds for it, with the same D. Towards pure noise (s = 1) that sigma has no bound, nor has the last term, which nobody
has tried there: levels above the training schedule's highest (14.6 for Stable Diffusion) count as that. Each image of a batch is
judged by itself; one that no step finds near is left as it is, bit for bit.

Paper and published code differ, and the paper's formula is what is done: the code weakens guidance at every step
with a positive similarity (here: only above lambda_t, so ordinary images stay), measures the similarity again
after each term, searches for a caption in every tenth step only, and leaves the first 21 images unguarded. Its
c3 is no constant but 100 (s - 0.3) exp((1000 - t) / 170), t in 0..1000: the schedule 'published'.
The code's numbers (guidance scale 7.5) are c1 = 13, c2 = 6.5 / 0.3, lambda_t = 0.3 + 0.1 exp(-5 t), the defaults
here; for normalised L2 on CIFAR-10's DDPM, lambda_t = -1.95 + 0.45 exp(-6.25 t), see :data:`DDPM`.

An unconditional model has D_c = D_u = D_n: the first two terms vanish, the third works as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.conditioning import Conditioning, stack
from ..core.denoiser import Model, PredictionType, noise_to_signal, over_pixels
from ..core.gradients import LossScale, scaled_gradients
from ..core.guidance import GuidedStep
from ..core.memory import in_pieces
from ..core.schedule import Schedule
from ..core.settings import Checked, option
from ..reference.features import Features
from . import Mitigation, Outcome, Start
from .guard import Guard

TrainingSchedule = Literal["stable diffusion", "ddpm"]
Strength = Literal["constant", "published"]
STEEPNESS = 1000 / 170  # of the published strength, with t in 0..1
GRADIENT_SCALE = 2.0**12  # exact in fp32; in a half-precision decoder the gradients would underflow without it


@dataclass(frozen=True)
class Settings(Checked):
    """A strength of 0 switches its term off."""

    despecification: float = option(13.0, "the paper's c1: less guidance towards the prompt", minimum=0, maximum=1e6)
    deduplication: float = option(
        6.5 / 0.3,
        "the paper's c2: away from what the nearest reference image's caption gives; one more evaluation",
        minimum=0,
        maximum=1e6,
    )
    dissimilarity: float = option(
        100.0, "the paper's c3: down the gradient of the similarity to the nearest image", minimum=0, maximum=1e9
    )
    dissimilarity_strength: Strength = option(
        "published",
        "constant: c3 at every step, as in the paper; published: c3 (s - threshold) exp((1 - t) 1000 / 170), as in "
        "its code",
        choices=get_args(Strength),
    )
    threshold: float = option(0.3, "similarity above which the guidance acts, early on", minimum=-100, maximum=1)
    threshold_rise: float = option(0.1, "how much higher it is at the end", minimum=-100, maximum=100)
    threshold_rate: float = option(
        5.0, "the rise goes as exp(-rate t), t from 1 down to 0; below 0 it falls", minimum=-1e3, maximum=1e3
    )
    training_schedule: TrainingSchedule = option(
        "stable diffusion", "the noise levels in which t is counted", choices=get_args(TrainingSchedule)
    )


DDPM = Settings(
    despecification=0,
    deduplication=0,
    dissimilarity=10,  # not published; what the tests' model that memorises needs
    dissimilarity_strength="constant",
    threshold=-1.95,
    threshold_rise=0.45,
    threshold_rate=6.25,
    training_schedule="ddpm",
)
# The likeness of grey values runs higher than SSCD's and, unlike it, is high for vague early predictions too: the
# threshold falls with the steps. Chosen on the bundled model's tuning pairs by benchmarks/amg_thresholds.py, so that
# about one ordinary image in twenty is steered.
GREY = Settings(dissimilarity=300, threshold=0.555, threshold_rise=0.185, threshold_rate=-0.5)


def preset(features: Features) -> Settings:
    """The numbers for a kind of features: the published ones for SSCD, which others of unit length begin from too."""
    if features.metric == "normalised L2":
        return replace(DDPM, training_schedule="stable diffusion")
    return GREY if features.name.split()[0] == "grey" else Settings()


def level_of(sigma: Tensor, prediction_type: PredictionType, schedule: TrainingSchedule) -> Tensor:
    """A run's noise levels [B] in the scale x0 + sigma * noise, at most the training schedule's highest."""
    levels = _levels(schedule)
    highest = levels.sigma(torch.tensor(len(levels) - 1)).item()
    return noise_to_signal(sigma, prediction_type).clamp_max(highest)


@cache
def _levels(schedule: TrainingSchedule) -> Schedule:
    if schedule == "ddpm":
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Schedule((1 - betas).cumprod(0))


def time_of(sigma: Tensor, schedule: TrainingSchedule) -> Tensor:
    """sigma [B] -> its place t [B] in the training schedule, 0 to 1; linear in log sigma between the levels."""
    levels = _levels(schedule)
    return levels.timestep(sigma) / len(levels)


def threshold_at(t: Tensor, settings: Settings) -> Tensor:
    """lambda_t [B]."""
    return settings.threshold + settings.threshold_rise * (-settings.threshold_rate * t).exp()


def strengths(s: Tensor, scale: float, settings: Settings) -> tuple[Tensor, Tensor]:
    """s1 and s2 [B]: together they never take more than leaves a guidance of 1."""
    room = torch.full_like(s, max(scale - 1, 0.0))
    s1 = torch.minimum(settings.despecification * s, room).clamp_min(0)
    s2 = torch.minimum(settings.deduplication * s, room - s1).clamp_min(0)
    return s1, s2


class AntiMemorization:
    """The rule of one run. ``acted`` holds, an evaluation each, which images were steered, [B] booleans.

    ``images`` decodes latents [B, C, H, W] to images in 0..1, differentiably (identity for a pixel model);
    ``encode`` makes a conditioning of a caption, None where there are no captions to encode. ``prediction_type`` tells
    what scale the run's noise levels have. ``differentiable`` is open while the gradient is taken: hosts in inference
    mode need it. Images are decoded one by one.
    """

    def __init__(
        self,
        guard: Guard,
        images: Callable[[Tensor], Tensor],
        encode: Callable[[str], Conditioning] | None,
        settings: Settings,
        prediction_type: PredictionType,
        differentiable: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._guard, self._images, self._settings = guard, images, settings
        self._prediction_type, self._differentiable = prediction_type, differentiable
        self._encode = encode if settings.deduplication else None
        self._encoded: dict[str, Conditioning] = {}
        self.acted: list[Tensor] = []

    def __call__(self, step: GuidedStep) -> Tensor:
        plain, settings = step.plain, self._settings
        with torch.no_grad():
            embedded = in_pieces(lambda a, b: self._guard.features(self._images(plain[a:b])), len(plain), 1)
            found = self._guard.references.search(torch.cat(list(embedded)), 1)
        s, index = found.similarity[:, 0].to(plain.device), found.index[:, 0]
        sigma = level_of(step.sigma, self._prediction_type, settings.training_schedule)
        t = time_of(sigma, settings.training_schedule)
        acts = s > threshold_at(t, settings)
        self.acted.append(acts)
        near = acts.nonzero()[:, 0]
        if not len(near):
            return plain
        s1, s2 = strengths(s, step.scale, settings)
        away = over_pixels(s1) * (step.conditional - step.unconditional)
        if self._encode is not None and bool((s2[near] > 0).any()):
            captions = [self._guard.captions[i] for i in index[near.to(index.device)].tolist()]
            away = away + over_pixels(s2) * self._towards(step, near.tolist(), captions)
        if settings.dissimilarity:
            c3 = torch.full_like(s, settings.dissimilarity)
            if settings.dissimilarity_strength == "published":
                c3 = c3 * (s - settings.threshold) * (STEEPNESS * (1 - t)).exp()
            with self._differentiable():
                slope = similarity_gradient(self._guard, self._images, plain[near], index[near.to(index.device)])
            away = away.index_add(0, near, over_pixels(c3[near] * sigma[near] ** 2) * slope)
        return torch.where(acts[:, None, None, None], plain - away.to(plain.dtype), plain)

    def _towards(self, step: GuidedStep, near: list[int], captions: list[str]) -> Tensor:
        """D_n - D_u [B, C, H, W] under each near image's caption; 0 for the others, and without a caption.

        Captions of one length share an evaluation.
        """
        assert self._encode is not None
        for caption in captions:
            if caption.strip() and caption not in self._encoded:
                self._encoded[caption] = self._encode(caption)
        wanted = {place: self._encoded[c] for place, c in zip(near, captions, strict=True) if c in self._encoded}
        found = torch.zeros_like(step.unconditional)
        for length in sorted({c.rows.shape[1] for c in wanted.values()}):
            places = [place for place, c in wanted.items() if c.rows.shape[1] == length]
            filled = [wanted[place if place in places else places[0]] for place in range(len(step.x))]
            towards = step.predict(stack(filled)) - step.unconditional
            found[places] = towards[places].to(found.dtype)
        return found


def similarity_gradient(guard: Guard, images: Callable[[Tensor], Tensor], latents: Tensor, index: Tensor) -> Tensor:
    """grad_D s [B, C, H, W] of the similarity of each decoded latent [B, C, H, W] to reference ``index`` [B]."""
    scale = LossScale(GRADIENT_SCALE)

    def slope(start: int, stop: int) -> Tensor:
        leaf = latents[start:stop].detach().float().clone().requires_grad_(True)

        def similarity() -> Tensor:
            return guard.references.similarity(guard.features(images(leaf)), index[start:stop])

        return scaled_gradients(similarity, [leaf], scale)[1][0]

    with torch.inference_mode(False):
        return torch.cat(list(in_pieces(slope, len(latents), 1)))


def _apply(model: Model, conditioning: Conditioning, start: Start, settings: Settings) -> Outcome:
    if start.guard is None:
        raise ValueError("anti-memorization guidance compares with reference images: name a reference set")
    rule = partial(AntiMemorization, start.guard, model.images_of, model.encode, settings, model.prediction_type)
    score = start.score(model, conditioning)
    return Outcome(conditioning, score, score, rule=rule)


MITIGATIONS = (
    Mitigation(
        "amg",
        "steer away from the nearest reference image while it is near",
        touches="guidance",
        cost="decoding, features and a search a step; where it acts, a backward pass through both and an evaluation",
        settings=Settings,
        work=_apply,
        release=(0, 1),
        needs_references=True,
        remark="without guidance its third term acts alone; on flow by the noise over the signal, s / (1 - s)",
    ),
)
