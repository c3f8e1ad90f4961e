"""What the extension costs in a real Automatic1111 and Forge: interleaved pairs of runs in one server, on and off.

The miniature checkpoint in Stable Diffusion 1.5 format draws images on one core; the order within a pair changes from
pair to pair. Needs the hosts (see docs/developers.md).

    python benchmarks/webui_cost.py [--pairs 15] [--steps 8] [--size 256] [--json FILE]
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

import miniature  # noqa: E402
from webui_server import KINDS, Kind, WebUIServer, find_install, make_home  # noqa: E402


def seconds(server: WebUIServer, seed: int, steps: int, size: int, watched: bool) -> float:
    script = {"alwayson_scripts": {"Déjà Vu": {"args": [{"enabled": watched}]}}}
    began = time.perf_counter()
    server.txt2img(seed=seed, steps=steps, width=size, height=size, timeout=600, **script)
    return time.perf_counter() - began


def ratios(kind: Kind, pairs: int, steps: int, size: int) -> list[float]:
    install = find_install(kind)
    if install is None:
        raise SystemExit(f"{kind.name} was not found: install it where ${kind.variable} says")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        miniature.write_sd15_everywhere(home / "models" / "Stable-diffusion" / miniature.SD15_EVERYWHERE)
        make_home(home / "data", ROOT, models=home / "models")
        with WebUIServer(kind, install, home / "data", page=False) as server:
            for watched in (False, True):
                seconds(server, 1, steps, size, watched)  # warm up
            found = []
            for pair in range(pairs):
                order = (False, True) if pair % 2 else (True, False)
                took = {watched: seconds(server, 100 + pair, steps, size, watched) for watched in order}
                found.append(took[True] / took[False])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, object] = {
        "pairs": arguments.pairs,
        "what": f"miniature SD1.5 checkpoint, {arguments.size} x {arguments.size}, {arguments.steps} steps, cfg 7, CPU",
    }
    for kind in KINDS.values():
        found = ratios(kind, arguments.pairs, arguments.steps, arguments.size)
        quartiles = [float(q) for q in np.quantile(found, [0.25, 0.75])]
        result[kind.folder] = {"median_ratio": float(np.median(found)), "quartiles": quartiles}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
