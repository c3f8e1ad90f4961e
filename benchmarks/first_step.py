"""First-step check of 100 prompts against the published procedure, side by side in one run.

Published (Wen et al., ICLR 2024, reference code): every prompt alone, all 50 steps with guidance, conditional
and unconditional prediction in one batch, and the decoder at the end. Ours: the first step only, one
unconditional prediction for all prompts, prompts batched. Same prompts, noises, number of images.

    python benchmarks/first_step.py [--images 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch

from sd_dejavu.core.conditioning import stack
from sd_dejavu.core.denoiser import initial_latent
from sd_dejavu.core.statistics import auc
from sd_dejavu.demo import bundled
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.run.measure import Measurement, measure


@torch.no_grad()
def published(model, prompts: list[str], wanted: Measurement) -> list[float]:
    """The reference loop; scores are means over all steps and images."""
    noise, sigmas, empty = model.noise(wanted.seed, wanted.images), model.sigmas(wanted.steps), model.encode("")
    scores = []
    for prompt in prompts:
        both = stack([empty, model.encode(prompt)]).repeat(wanted.images)
        x = initial_latent(noise, sigmas[0], model.prediction_type)
        norms = []
        for level, following in pairwise(sigmas):
            sigma = torch.full((2 * wanted.images,), level)
            unconditional, with_prompt = model(torch.cat([x, x]), sigma, both).chunk(2)
            norms.append(((with_prompt - unconditional) / level).flatten(1).norm(dim=1).mean())
            denoised = unconditional + wanted.guidance_scale * (with_prompt - unconditional)
            x = denoised + following / level * (x - denoised)
        model.decode(x)
        scores.append(float(torch.stack(norms).mean()))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, wanted = load(), Measurement(images=arguments.images)
    positives = bundled.held_out_memorised()
    positives, negatives = positives[:50], bundled.held_out_ordinary(100 - len(positives[:50]), seed=4242)
    prompts = [*positives, *negatives]
    measure(model, prompts[:4], wanted)  # warm up
    began = time.perf_counter()
    first = [float(m.scores.mean()) for m in measure(model, prompts, wanted)]
    ours = time.perf_counter() - began
    began = time.perf_counter()
    full = published(model, prompts, wanted)
    theirs = time.perf_counter() - began
    split = len(positives)
    result = {
        "prompts": len(prompts),
        "images": wanted.images,
        "seconds_first_step": ours,
        "seconds_published": theirs,
        "times_faster": theirs / ours,
        "auc_first_step": auc(first[:split], first[split:]),
        "auc_published": auc(full[:split], full[split:]),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
