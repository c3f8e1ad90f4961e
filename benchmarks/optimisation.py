"""Conditioning optimisation against the published loop at equal loss, side by side in one run.

Published (Wen et al., ICLR 2024, reference code): every iteration evaluates the unconditional and the
conditional half in one batch and differentiates through it. Ours computes the unconditional half once.
Both minimise the mean of per-image norms with Adam, learning rate 0.05, to the same target.

    python benchmarks/optimisation.py [--prompts 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from sd_dejavu.calibration.profile import Profile
from sd_dejavu.conditioning import Conditioning
from sd_dejavu.demo import bundled
from sd_dejavu.denoiser import Predictions
from sd_dejavu.detectors.magnitude import magnitude
from sd_dejavu.hosts.diffusers import load
from sd_dejavu.measure import Measurement, start_of_run
from sd_dejavu.mitigations.optimise_conditioning import Settings, optimise
from sd_dejavu.sampling import predict

ITERATIONS = 30


def published(model, x, sigma, conditioning: Conditioning, empty: Conditioning, target: float) -> list[float]:
    fixed = conditioning.row_mask("start")[None, :, None]
    start = conditioning.rows.detach()
    rows = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([rows], lr=0.05)
    losses = []
    for _ in range(ITERATIONS + 1):
        mixed = torch.where(fixed, start, rows)
        images = x.shape[0]
        both = Conditioning(torch.cat([empty.rows.expand(images, -1, -1), mixed.expand(images, -1, -1)]))
        without, with_prompt = model(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        loss = magnitude(Predictions(with_prompt, without, sigma)).mean()
        losses.append(float(loss.detach()))
        if losses[-1] <= target or len(losses) > ITERATIONS:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, wanted = load(), Measurement()
    target = Profile.load(bundled.CALIBRATION).quantile(0.5, "first step", wanted.images)
    x, sigma = start_of_run(model, wanted)
    empty = model.encode("")
    ratios, ours, theirs, gaps = [], 0.0, 0.0, []
    for number, prompt in enumerate(bundled.held_out_memorised()[: arguments.prompts + 1]):
        conditioning = model.encode(prompt)
        began = time.perf_counter()
        base = predict(model, x, sigma, empty)
        mine = optimise(model, x, sigma, conditioning, base, target, Settings(iterations=ITERATIONS)).losses
        middle = time.perf_counter()
        reference = published(model, x, sigma, conditioning, empty, target)
        end = time.perf_counter()
        if number == 0:
            continue  # warm-up
        ratios.append((end - middle) / (middle - began))
        ours, theirs = ours + middle - began, theirs + end - middle
        gaps.append(max(abs(a - b) for a, b in zip(mine, reference, strict=False)))
    result = {
        "prompts": len(ratios),
        "seconds_ours": ours,
        "seconds_published": theirs,
        "times_faster_median": float(np.median(ratios)),
        "largest_difference_of_losses": max(gaps),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
