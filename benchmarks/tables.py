"""The documented tables and figure for the bundled model: graded repetition, explanation, calibration, and
what the two ratings of images say of ordinary captions.

    python benchmarks/tables.py [--only NAME ...] [--out DIR]

Writes one JSON file a table into DIR (default benchmarks/results), and prints each table.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from sd_dejavu.calibration.ordinary_prompts import style_of
from sd_dejavu.calibration.profile import Profile
from sd_dejavu.core.statistics import auc, kolmogorov_two_samples, tpr_at_fpr
from sd_dejavu.core.verdict import View
from sd_dejavu.demo import bundled
from sd_dejavu.demo.evaluation import (
    Share,
    false_copies,
    fresh_verdicts,
    graded,
    held_out_pairs,
    ordinary_caption_score,
    trigger_named,
)
from sd_dejavu.demo.world import STYLES
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.run.measure import Measurement, measure


def graded_table(model, profile, wanted) -> list[dict]:
    with tqdm(desc="graded") as bar:
        rows = graded(model, profile, replace(wanted, images=2), bar.update)
    return [{**asdict(r), "flagged": share(r.flagged), "copies": share(r.copies)} for r in rows]


def explanation_table(model, profile, wanted) -> list[dict]:
    pairs = held_out_pairs("hard")
    return [
        {"view": view, "trigger named": share(trigger_named(model, wanted, view, pairs))} for view in get_args(View)
    ]


def calibration_table(model, profile, wanted) -> list[dict]:
    """Fresh ordinary captions against the nulls that judge them (two-sample test), and false positives in each style."""
    rows = []
    verdicts = fresh_verdicts(model, profile, wanted, bundled.held_out_ordinary(1000, seed=31337))
    for style in (None, *STYLES):
        chosen = [v for v in verdicts if v.p_value is not None and style in (None, style_of(v.prompt))]
        nulls = profile.null_scores(wanted.score, wanted.images, chosen[0].null_style)
        distance, p = kolmogorov_two_samples([v.score for v in chosen if v.score is not None], nulls)
        flagged = Share(sum(bool(v.flagged) for v in chosen), len(chosen))
        rows.append({"style": style or "all", "flagged": share(flagged), "ks distance": distance, "ks p": p})
    return rows


def detection_by_kind_table(model, profile, wanted) -> list[dict]:
    """First step, four images: the hard half apart from the rest."""
    negatives = [float(m.scores.mean()) for m in measure(model, bundled.held_out_ordinary(1000, seed=4242), wanted)]
    rows = []
    for name, kinds in (("hard", ("hard",)), ("other", ("scene", "photo"))):
        captions = bundled.held_out_memorised(kinds)
        positives = [float(m.scores.mean()) for m in measure(model, captions, wanted)]
        rows.append(
            {
                "captions": name,
                "count": len(captions),
                "ordinary": len(negatives),
                "auc": auc(positives, negatives),
                "tpr at 1% fpr": tpr_at_fpr(positives, negatives),
            }
        )
    return rows


def copy_metric_table(model, profile, wanted) -> list[dict]:
    captions = bundled.held_out_ordinary(60, seed=99)
    return [
        {
            "images": "ordinary captions",
            "called copies": share(false_copies(model, replace(wanted, images=2), captions)),
        }
    ]


def caption_score_table(model, profile, wanted) -> list[dict]:
    """Images drawn from hard pairs' captions without their triggers: what mitigated images can come up to."""
    pairs = held_out_pairs("hard")
    found = ordinary_caption_score(model, replace(wanted, images=1), pairs)
    return [{"images": "captions without triggers", "count": len(pairs), "caption score": found}]


TABLES = {
    "detection-by-kind": detection_by_kind_table,
    "graded": graded_table,
    "explanation": explanation_table,
    "calibration": calibration_table,
    "copy-metric": copy_metric_table,
    "caption-score": caption_score_table,
}


def share(value: Share) -> dict:
    return {"hits": value.hits, "count": value.count, "share": value.share, "interval": value.interval}


def markdown(rows: list[dict]) -> str:
    def cell(value: object) -> str:
        if isinstance(value, dict):
            return f"{value['share']:.2f} ({value['interval'][0]:.2f}-{value['interval'][1]:.2f}), n={value['count']}"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(key, "")) for key in head) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, profile, wanted = load(), Profile.load(bundled.CALIBRATION), Measurement()
    for name in arguments.only:
        rows = TABLES[name](model, profile, wanted)
        (arguments.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"\n{name}\n\n{markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
