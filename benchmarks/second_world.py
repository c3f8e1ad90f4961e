"""What ordinary prompts say of a model that the generator does not know: the second world, on which nothing is tuned.

Its own ordinary captions that it never saw, each on a noise of its own, against nulls generated, other such captions,
nulls recombined from some, and recombined from captions of which a quarter are memorised; whether the misfit is noticed; how many of
the memorised are flagged; and how many of their images are copies when a mitigation goes to the nulls' median.

    python benchmarks/second_world.py [--json benchmarks/results/second_world.json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_dejavu.calibration.calibrate import calibrate
from sd_dejavu.calibration.misfit import stranger_nulls
from sd_dejavu.calibration.ordinary_prompts import general_prompts
from sd_dejavu.calibration.profile import ORDINARY_QUANTILE, Profile
from sd_dejavu.calibration.recombined import recombined
from sd_dejavu.core.denoiser import Model, PromptTooLong
from sd_dejavu.core.similarity import COPY_THRESHOLD, grey_correlation
from sd_dejavu.core.statistics import kolmogorov_two_samples
from sd_dejavu.demo import second_world
from sd_dejavu.demo.evaluation import Share
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations import Start, available
from sd_dejavu.run.measure import Measurement, guidance_of, measure, measure_runs, sampled_with

NULLS, GIVEN, FRESH, DRAWN = 1000, 120, 200, 40
WANTED = Measurement(images=1)
MITIGATION = "optimise-conditioning"


def images_of(rows: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] in 0..1."""
    return torch.from_numpy(rows.copy()).permute(0, 3, 1, 2).float() / 255


def scores_of(model: Model, captions: list[str], seed: int) -> list[float]:
    """First-step scores, each on a noise of its own."""
    found = []
    for number, caption in enumerate(captions):
        (measured,) = measure(model, [caption], Measurement(images=1, seed=seed + number))
        assert measured.scores is not None
        found.append(float(measured.scores.mean()))
    return found


def readable(model: Model, prompts: list[str]) -> list[str]:
    """Those with no more tokens than the model reads: words that it does not know have many."""
    kept = []
    for prompt in prompts:
        try:
            model.encode(prompt)
        except PromptTooLong:
            continue
        kept.append(prompt)
    return kept


def judged(model: Model, name: str, profile: Profile, fresh: list[float], memorised: list[float]) -> dict[str, Any]:
    nulls = profile.null_scores("first step", 1)
    distance, p = kolmogorov_two_samples(fresh, nulls)
    values = [[profile.p_value(score, profile.setting).p for score in scores] for scores in (fresh, memorised)]
    return {
        "nulls": name,
        "count": len(nulls),
        "median": profile.quantile(0.5),
        "ks distance": distance,
        "ks p": p,
        "ordinary at 0.05": asdict(Share(sum(p <= 0.05 for p in values[0]), len(fresh))),
        "memorised at 0.01": asdict(Share(sum(p <= 0.01 for p in values[1]), len(memorised))),
        "said to be strangers": stranger_nulls(fresh, nulls),
        "copies after mitigation": asdict(after_mitigation(model, profile)),
    }


def after_mitigation(model: Model, profile: Profile) -> Share:
    """Copies among one image of every fourth memorised pair, mitigated to the nulls' median."""
    noise, sigma = model.noise(WANTED.seed, 1), model.sigmas(WANTED.steps)[0]
    unconditional = guidance_of(model, WANTED).unconditional
    targets = [profile.quantile(q) for q in (0.5, ORDINARY_QUANTILE)]
    start = Start.of(model, noise, sigma, unconditional, targets[0], WANTED.seed, targets[1])
    method = available()[MITIGATION]
    hits, pairs = 0, second_world.training_pairs()[::4]
    for pair in pairs:
        outcome = method.apply(model, model.encode(pair.caption), start, method.settings())
        latents = sampled_with(model, outcome, start.x, WANTED).latents
        assert latents is not None
        own = images_of(second_world.draw_pair(pair)[None])
        hits += int(grey_correlation(model.decode(latents), own)[0, 0] >= COPY_THRESHOLD)
    return Share(hits, len(pairs))


def copies(model: Model, captions: list[str]) -> Tensor:
    """Likeness [N, 40] of one image of each caption to the memorised images."""
    own = images_of(np.stack([second_world.draw_pair(pair) for pair in second_world.training_pairs()]))
    runs = measure_runs(model, [model.encode(c) for c in captions], model.noise(0, 1), WANTED)
    return torch.cat([grey_correlation(model.decode(run.latents), own) for run in runs if run.latents is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = load(str(second_world.FOLDER))
    captions, _ = second_world.held_out(GIVEN + FRESH)
    memorised = [pair.caption for pair in second_world.training_pairs()]
    likeness = copies(model, memorised).diagonal()
    wrong = copies(model, captions[:DRAWN]).max(1).values
    found: dict[str, Any] = {
        "copies": asdict(Share(int((likeness >= COPY_THRESHOLD).sum()), len(memorised))),
        "copies of held-out captions": asdict(Share(int((wrong >= COPY_THRESHOLD).sum()), DRAWN)),
    }
    fresh = scores_of(model, captions[GIVEN:], 10_000)
    replayed = scores_of(model, memorised, 20_000)
    print(f"{found}; medians: held-out {np.median(fresh):.3f}, memorised {np.median(replayed):.3f}", flush=True)
    nulls = {
        "generated": readable(model, general_prompts(NULLS)),
        "other captions of its world": second_world.held_out(GIVEN + FRESH + NULLS)[0][GIVEN + FRESH :],
        f"recombined from {GIVEN} captions": recombined(captions[:GIVEN], NULLS),
        f"recombined from {GIVEN} captions and the 40 memorised": recombined([*captions[:GIVEN], *memorised], NULLS),
    }
    found |= {"median of held-out captions": float(np.median(fresh)), "mitigation": MITIGATION, "rows": []}
    for name, prompts in nulls.items():
        found["rows"].append(judged(model, name, calibrate(model, prompts, WANTED), fresh, replayed))
        print(found["rows"][-1], flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
