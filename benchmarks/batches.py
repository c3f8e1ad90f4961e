"""What a flag at alpha means for a batch: the share of ordinary prompts that are flagged, by the number of images.

Fresh ordinary captions of the bundled model, measured at the first step with as many noises as the largest batch has
images. A prompt is flagged where any image of the batch is, by the calibration with the images it holds, and by the
same with one image of each null.

    python benchmarks/batches.py [--prompts 300] [--json benchmarks/results/batches.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sd_dejavu.calibration.profile import Null, Profile
from sd_dejavu.core.statistics import wilson
from sd_dejavu.core.verdict import Verdict
from sd_dejavu.demo import bundled
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.run.judge import judge
from sd_dejavu.run.measure import Measurement, measure, setting_of

BATCHES = (1, 4, 8)
ALPHAS = (0.01, 0.05)


def flagged(scores: Sequence[float], prompt: str, alpha: float, profile: Profile) -> bool:
    verdicts = [Verdict(prompt, score, None, None, alpha, batch=len(scores)) for score in scores]
    found = [judge(verdict, profile.setting, profile).flagged for verdict in verdicts]
    assert None not in found
    return any(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, whole = load(), Profile.load(bundled.CALIBRATION)
    prompts, scores = bundled.held_out_ordinary(given.prompts, seed=4242), []
    for start in range(0, len(prompts), 25):  # noises of their own
        wanted = Measurement(images=max(BATCHES), seed=90_000 + start)
        assert whole.setting.mismatch(setting_of(model, wanted), "first step") is None
        scores += [found.scores.tolist() for found in measure(model, prompts[start : start + 25], wanted)]
    single = replace(whole, nulls=tuple(Null(n.style, {k: v[:1] for k, v in n.scores.items()}) for n in whole.nulls))
    rows = []
    for name, profile in (("4 images of each ordinary prompt", whole), ("1 image of each", single)):
        for batch in BATCHES:
            for alpha in ALPHAS:
                hits = sum(flagged(row[:batch], p, alpha, profile) for p, row in zip(prompts, scores, strict=True))
                share = hits / len(prompts)
                rows.append({"calibration": name, "batch": batch, "alpha": alpha, "share": share})
                rows[-1]["interval"] = wilson(share, len(prompts))
                print(f"{name}, batch of {batch}, alpha {alpha}: {share:.4f}")
    if given.json:
        given.json.write_text(json.dumps({"prompts": len(prompts), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
