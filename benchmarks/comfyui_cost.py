"""What the monitor costs in a real ComfyUI: interleaved pairs of runs in one server, with it and without.

The smallest checkpoint in Stable Diffusion 1.5 format, made here with random weights, draws 512 x 512 pictures; the
order within a pair changes from pair to pair. Needs ComfyUI (see the README's tests).

    python benchmarks/comfyui_cost.py [--pairs 15] [--steps 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

import graphs  # noqa: E402
import miniature  # noqa: E402
from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402
from watched import watched  # noqa: E402


def seconds(server: ComfyServer, seed: int, steps: int, monitored: bool) -> float:
    graph = graphs.text_to_image(seed=seed, steps=steps, size=512)
    if monitored:
        watched(graph)
    began = time.perf_counter()
    server.run(graph, timeout=600)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    install = find_install()
    if install is None:
        raise SystemExit("ComfyUI was not found: install it where $DEJAVU_COMFYUI says")
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder), ROOT)
        miniature.write_all(home / "models")
        with ComfyServer(install, home) as server:
            for monitored in (False, True):
                seconds(server, 1, arguments.steps, monitored)  # warm up
            ratios = []
            for pair in range(arguments.pairs):
                order = (False, True) if pair % 2 else (True, False)
                took = {monitored: seconds(server, 100 + pair, arguments.steps, monitored) for monitored in order}
                ratios.append(took[True] / took[False])
    result = {
        "pairs": arguments.pairs,
        "what": f"miniature SD1.5 checkpoint, 512 x 512, {arguments.steps} steps, cfg 7, CPU",
        "median_ratio": float(np.median(ratios)),
        "quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
