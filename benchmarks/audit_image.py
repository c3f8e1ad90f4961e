"""The documentation's image of an audit: a LoRA that overfits eight images, audited with eight more it never saw.

python benchmarks/audit_image.py [--out docs]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sd_dejavu.cli.main import main as sd_dejavu
from sd_dejavu.demo import world

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

from browser import chromium  # noqa: E402

SHOWN, UNSEEN = range(8), range(20, 28)


def write_set(folder: Path, numbers: list[int]) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        caption, scene, _ = world.ordinary(np.random.default_rng(9000 + number), "sentence")
        Image.fromarray(world.draw_scene(scene)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_set(folder / "trained" / "40_shown", list(SHOWN))
        write_set(folder / "training-set", [*SHOWN, *UNSEEN])
        recipe = "--rank 16 --learning-rate 2e-3 --batch-size 8 --epochs 5 --filter none"
        loras, out = str(folder / "loras"), str(folder / "out")
        done = sd_dejavu(["finetune", "--dataset", str(folder / "trained"), "--out", loras, *recipe.split()])
        sizes = "--nulls 400 --images 2 --steps 25 --strength-steps 2 --worst 6"
        audited = ["audit", "--dataset", str(folder / "training-set"), "--lora", loras, "--out", out, *sizes.split()]
        if done or sd_dejavu(audited):
            raise SystemExit(1)
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1000, "height": 1150})
            page.goto((folder / "out" / "report.html").as_uri())
            page.screenshot(path=str(arguments.out / "audit.png"))


if __name__ == "__main__":
    main()
