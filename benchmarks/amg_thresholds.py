"""Chooses AMG's settings for grey values, ``GREY``, on the bundled model's tuning pairs. No held-out pair is drawn.

The rule. Plain runs, each from a noise of its own, tell at each step how near the denoised prediction comes to any
reference image. An image is steered when and only when its plain run passes lambda_t = threshold + rise
exp(-rate t) at some step. Of a grid of such curves, all falling to at least BELOW_A_COPY under the likeness of a
copy at the end, those are taken that even MARGIN lower steer at most STEERED of 100 ordinary captions; of these, the
one that steers the tuning pairs' copies earliest (mean step of the first time; the number of steps where never), and
of equal ones the lowest in the mean. The highest ordinary run at every step is no bound to go by: one of the 100 runs
ends nearer than a copy, at .82, and a curve above it leaves copies alone. The dissimilarity strength is then the
lowest of a grid that leaves no copy among the tuning pairs' images (where none does, the one that leaves fewest).
The other strengths are the paper's.

Other ordinary captions, from which nothing is chosen, then count how many are steered. The reference images are
those of all pairs, the held-out ones among them, as in use.

    python benchmarks/amg_thresholds.py [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sd_dejavu.core.denoiser import Model, initial_latent
from sd_dejavu.core.guidance import GuidedStep
from sd_dejavu.core.similarity import COPY_THRESHOLD
from sd_dejavu.demo import bundled
from sd_dejavu.demo.evaluation import Share, bundled_guard, copies
from sd_dejavu.demo.world import Pair
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations import Outcome
from sd_dejavu.mitigations.anti_memorization_guidance import AntiMemorization, Settings, threshold_at, time_of
from sd_dejavu.mitigations.guard import Guard
from sd_dejavu.run.measure import Measurement, sampled_with

STEERED, MARGIN, BELOW_A_COPY = 0.05, 0.01, 0.05
# The curves: lambda at t = 1 and at t = 0, and rates. All fall towards the end: a threshold above lambda would turn
# the published strength, which is proportional to s - threshold, around.
STARTS, ENDS = np.arange(0.70, 1.005, 0.01), np.arange(0.60, COPY_THRESHOLD - BELOW_A_COPY + 0.005, 0.01)
RATES = (-0.5, -1.0, -2.0, -3.0, -5.0, -8.0)
DISSIMILARITIES = (100.0, 200.0, 300.0, 500.0, 1000.0)
# Seeds of captions and of noises that no calibration, comparison or test draws from.
FITTED, CHECKED = (100, 1001), (60, 1002)  # ordinary captions: how many, of which seed
PAIR_NOISES, FITTED_NOISES, CHECKED_NOISES = 20_000, 30_000, 40_000
WANTED = Measurement(images=1)
DECIMALS = 3


class Nearness:
    """A guidance rule that changes nothing and keeps each step's similarity to the nearest reference image."""

    def __init__(self, model: Model, guard: Guard) -> None:
        self._model, self._guard = model, guard
        self.similarities: list[float] = []

    def __call__(self, step: GuidedStep) -> Tensor:
        plain = step.plain
        features = self._guard.features(self._model.images_of(plain))
        self.similarities.append(float(self._guard.references.search(features, 1).similarity[0, 0]))
        return plain


def drawn(model: Model, caption: str, seed: int, rule: Any) -> Tensor:
    """The image [1, 3, H, W] of a caption under a rule, from the noise of this seed."""
    x = initial_latent(model.noise(seed, 1), model.sigmas(WANTED.steps)[0], model.prediction_type)
    nan = float("nan")
    latents = sampled_with(model, Outcome(model.encode(caption), nan, nan, rule=lambda: rule), x, WANTED).latents
    assert latents is not None  # sampled_with always samples
    return model.decode(latents)


def plain_runs(
    model: Model, guard: Guard, captions: list[str], noises: int, what: str
) -> tuple[np.ndarray, list[Tensor]]:
    """Similarities [captions, steps] to the nearest reference image along plain runs, and their images."""
    curves, images = [], []
    for number, caption in enumerate(tqdm(captions, desc=what)):
        rule = Nearness(model, guard)
        images.append(drawn(model, caption, noises + number, rule))
        curves.append(rule.similarities)
    return np.array(curves), images


def first_steps(curves: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The first step [runs] at which each run [runs, steps] is steered; the number of steps where none is."""
    passed = curves > thresholds
    return np.where(passed.any(1), passed.argmax(1), curves.shape[1])


def chosen(places: Tensor, ordinary: np.ndarray, copying: np.ndarray) -> Settings:
    """The rule's curve, from runs [runs, steps] of ordinary captions and of copies; ``places`` are t [steps]."""
    found: list[tuple[float, float, Settings]] = []
    for start, end, rate in product(STARTS, ENDS, RATES):
        if start <= end:
            continue
        rise = round(float((start - end) / (np.exp(-rate) - 1)), DECIMALS)
        settings = Settings(threshold=round(float(end) - rise, DECIMALS), threshold_rise=rise, threshold_rate=rate)
        thresholds = thresholds_of(places, settings)
        if steered(ordinary, thresholds - MARGIN).share <= STEERED:
            found.append((float(first_steps(copying, thresholds).mean()), float(thresholds.mean()), settings))
    if not found:
        raise SystemExit("no curve of the grid leaves the ordinary runs alone")
    return min(found, key=lambda trial: trial[:2])[2]


def thresholds_of(places: Tensor, settings: Settings) -> np.ndarray:
    return threshold_at(places, settings).double().numpy()


def likeness(pairs: list[Pair], images: list[Tensor]) -> list[float]:
    return [float(copies(pair, image)[0]) for pair, image in zip(pairs, images, strict=True)]


def copied(found: list[float]) -> Share:
    return Share(sum(s >= COPY_THRESHOLD for s in found), len(found))


def steered(curves: np.ndarray, thresholds: np.ndarray) -> Share:
    return Share(int((curves > thresholds).any(1).sum()), len(curves))


def told(found: list[float]) -> dict[str, Any]:
    share = copied(found)
    return {"copies": share.hits, "of": share.count, "interval": share.interval, "similarity": float(np.mean(found))}


def quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.quantile(values, q)), 4) for name, q in (("median", 0.5), ("95%", 0.95), ("max", 1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "amg_thresholds.json")
    arguments = parser.parse_args()
    model, guard = load(), bundled_guard()
    pairs = [p for p in bundled.pairs() if p.split == "tune" and p.repetitions >= 100 and p.kind != "template"]
    sigmas = torch.tensor(model.sigmas(WANTED.steps)[:-1])
    places = time_of(sigmas, Settings().training_schedule)

    near, plain = plain_runs(model, guard, [p.caption for p in pairs], PAIR_NOISES, "tuning pairs")
    fitted, _ = plain_runs(model, guard, bundled.held_out_ordinary(*FITTED), FITTED_NOISES, "ordinary")
    copying = np.array([s >= COPY_THRESHOLD for s in likeness(pairs, plain)])
    settings = chosen(places, fitted, near[copying])
    thresholds = thresholds_of(places, settings)
    print(settings, flush=True)

    tried: dict[float, list[float]] = {}
    for strength in DISSIMILARITIES:
        trial, images = replace(settings, dissimilarity=strength), []
        for number, pair in enumerate(tqdm(pairs, desc=f"dissimilarity {strength:g}")):
            rule = AntiMemorization(guard, model.images_of, model.encode, trial, model.prediction_type)
            images.append(drawn(model, pair.caption, PAIR_NOISES + number, rule))
        tried[strength] = likeness(pairs, images)
        tqdm.write(f"dissimilarity {strength:g}: {copied(tried[strength]).hits} copies")
        if not copied(tried[strength]).hits:
            break
    best = min(tried, key=lambda strength: (copied(tried[strength]).hits, strength))
    settings = replace(settings, dissimilarity=best)

    checked, _ = plain_runs(model, guard, bundled.held_out_ordinary(*CHECKED), CHECKED_NOISES, "other ordinary")
    result = {
        "rule": f"at most {STEERED:.0%} of ordinary runs steered by a curve {MARGIN} lower, the tuning pairs' copies "
        f"earliest; the lowest dissimilarity of {', '.join(f'{s:g}' for s in DISSIMILARITIES)} that leaves no copy",
        "settings": asdict(settings),
        "pairs": len(pairs),
        "plain": told(likeness(pairs, plain)),
        "by_dissimilarity": {f"{strength:g}": told(found) for strength, found in tried.items()},
        "pairs_steered": asdict(steered(near, thresholds)),
        "first_step_of_copies": first_steps(near[copying], thresholds).tolist(),
        "ordinary_steered": asdict(steered(fitted, thresholds)),
        "other_ordinary_steered": asdict(steered(checked, thresholds)),
        "curves": [
            {
                "step": n,
                "t": round(float(places[n]), 4),
                "threshold": round(float(thresholds[n]), 4),
                "ordinary": quantiles(fitted[:, n]),
                "other_ordinary": quantiles(checked[:, n]),
                "pairs": quantiles(near[:, n]),
            }
            for n in range(0, len(places), 7)
        ],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
