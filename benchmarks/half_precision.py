"""The words and scores of every held-out hard pair in half precision against fp32, on the bundled model.

python benchmarks/half_precision.py [--dtype float16] [--device cpu] [--images 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from sd_dejavu.demo.evaluation import half_precision, held_out_pairs
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.run.measure import Measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    full, half = (load(device=arguments.device, dtype=dtype) for dtype in ("float32", arguments.dtype))
    rows = list(half_precision(full, half, Measurement(images=arguments.images), held_out_pairs("hard")))
    same, lowest = sum(row.same_top for row in rows), min(row.correlation for row in rows)
    furthest = max(abs(row.score_ratio - 1) for row in rows)
    print(f"{arguments.dtype}: same top word in {same} of {len(rows)}, correlation at least {lowest:.5f}, ", end="")
    print(f"score off by at most {100 * furthest:.3f}%")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
