"""The bundled model's calibration where most samplers begin, made by ComfyUI: the Calibrate node at the first example's settings.

1,000 ordinary captions at the first step, and 200 of them sampled to the end for the band under the curve. Needs
ComfyUI (see docs/developers.md).

    python benchmarks/demo_calibration.py [--out FILE]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from comfyui_server import ComfyServer, find_install, make_home  # noqa: E402
from graphs import node  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "sd_dejavu" / "demo" / "model" / "calibration-highest-sigma.json"
    )
    arguments = parser.parse_args()
    install = find_install()
    if install is None:
        raise SystemExit("ComfyUI was not found: install it where $DEJAVU_COMFYUI says")
    with tempfile.TemporaryDirectory() as folder:
        home = make_home(Path(folder), ROOT)
        with ComfyServer(install, home) as server:
            graph = {"model": node("DejaVuDemoModel", batch_size=1)}
            graph["calibrated"] = node(
                "DejaVuCalibrate",
                model=["model", 0],
                clip=["model", 1],
                latent_image=["model", 3],
                steps=20,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
                negative="",
                count=1000,
                whole_runs=200,
                cfg=7.5,
            )
            graph["shown"] = node("PreviewAny", source=["calibrated", 1])
            print(server.run(graph, timeout=3600)["calibrated"]["text"][0])
            (made,) = (home / "user" / "dejavu" / "calibration").glob("*.json")
            shutil.copyfile(made, arguments.out)


if __name__ == "__main__":
    main()
