"""The documentation's images: memorised prompts drawn, their training images, and both mitigations; the graded curve.

python benchmarks/images.py [--out docs]     # reads benchmarks/results/graded.json for the curve
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd_dejavu.calibration.profile import ORDINARY_QUANTILE, Profile
from sd_dejavu.cli.cases import pixels
from sd_dejavu.demo import bundled
from sd_dejavu.demo.evaluation import held_out_pairs
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.mitigations import Start, available, optimise_conditioning, remove_trigger
from sd_dejavu.run.measure import Measurement, guidance_of, measure_runs

SIDE, GAP, LABEL = 128, 8, 210
ROWS = ("training image", "generated", "optimise-tokens", "remove-trigger")


def comparison(model, wanted: Measurement, profile: Profile) -> Image.Image:
    pairs = held_out_pairs("hard")[:4] + held_out_pairs("photo")[:3] + held_out_pairs("scene")[:2]
    noise, sigma = model.noise(wanted.seed, 1), model.sigmas(wanted.steps)[0]
    target = profile.quantile(0.5, "first step", 1)
    ordinary = profile.quantile(ORDINARY_QUANTILE, "first step", 1)
    start = Start.of(model, noise, sigma, guidance_of(model, wanted).unconditional, target, wanted.seed, ordinary)
    settings = {"optimise-tokens": optimise_conditioning.Settings(), "remove-trigger": remove_trigger.Settings()}
    size = (LABEL + len(pairs) * (SIDE + GAP), len(ROWS) * (SIDE + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, name in enumerate(ROWS):
        draw.text((GAP, GAP + row * (SIDE + GAP) + SIDE // 2 - 8), name, fill="black", font=font)
    for column, pair in enumerate(pairs):
        conditioning = model.encode(pair.caption)
        shown = [bundled.training_image(pair.caption)]
        for name in (None, *settings):
            chosen = conditioning
            if name is not None:
                chosen = available()[name].apply(model, conditioning, start, settings[name]).conditioning
            (drawn,) = measure_runs(model, [chosen], noise, wanted)
            shown.append(model.decode(drawn.latents)[0])
        for row, image in enumerate(shown):
            tile = Image.fromarray(pixels(image)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (LABEL + column * (SIDE + GAP), GAP + row * (SIDE + GAP)))
    return sheet


def curve(rows: list[dict]) -> Image.Image:
    """Share of copies and share flagged against repetitions, hard pairs and the rest."""
    width, height, left, bottom, scale = 640, 330, 60, 280, 240
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    counts = sorted({row["repetitions"] for row in rows})
    x = {n: left + 20 + i * (width - left - 60) / (len(counts) - 1) for i, n in enumerate(counts)}
    for tick in np.linspace(0, 1, 6):
        y = bottom - tick * scale
        draw.line([(left, y), (width - 20, y)], fill="#dddddd")
        draw.text((left - 36, y - 8), f"{tick:.1f}", fill="black", font=font)
    for n, place in x.items():
        draw.text((place - 8, bottom + 6), str(n), fill="black", font=font)
    draw.text((left + 160, bottom + 26), "times the pair is repeated in an epoch", fill="black", font=font)
    lines = [
        ("copies", "hard", "#0072b2"),
        ("copies", "other", "#56b4e9"),
        ("flagged", "hard", "#d55e00"),
        ("flagged", "other", "#e69f00"),
    ]
    for number, (key, kind, colour) in enumerate(lines):
        points = [(x[r["repetitions"]], bottom - r[key]["share"] * scale) for r in rows if r["kind"] == kind]
        draw.line(points, fill=colour, width=3)
        for px, py in points:
            shape = [px - 4, py - 4, px + 4, py + 4]
            draw.rectangle(shape, fill=colour) if key == "flagged" else draw.ellipse(shape, fill=colour)
        mark = "square" if key == "flagged" else "dot"
        draw.text((left + 14, 44 + 18 * number), f"{mark}: {key}, {kind} pairs", fill=colour, font=font)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = Measurement(images=1)
    comparison(load(), wanted, Profile.load(bundled.CALIBRATION)).save(arguments.out / "comparison.png", optimize=True)
    graded = json.loads((Path(__file__).parent / "results" / "graded.json").read_text())
    curve(graded).save(arguments.out / "graded.png", optimize=True)


if __name__ == "__main__":
    main()
