"""See it work: a memorised and an ordinary prompt of the bundled model, and any that you type.

Verdicts and words in the terminal; DIR/report.html shows the images before and after mitigation beside
the training image, the magnitude of each step against ordinary prompts, and where in the image.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..calibration.profile import ORDINARY_QUANTILE, Profile
from ..demo import bundled
from ..hosts.diffusers.load import load
from ..kept import write_text
from ..mitigations import Start, optimise_conditioning, remove_trigger
from ..report.terminal import verdict_panel
from ..run.measure import Measurement, guidance_of
from . import common
from .cases import render_cases, run_case, save_images

# A held-out hard pair, and the same caption without its trigger.
MEMORISED_PAIR = 1
METHODS = {"optimise-tokens": optimise_conditioning.Settings(), "remove-trigger": remove_trigger.Settings()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="your own prompts, judged beside the two of the demo"
    )
    parser.add_argument("--out", type=Path, default=Path("dejavu-demo"), metavar="DIR", help="default: dejavu-demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--images", type=common.positive, default=4, help="images a prompt (default: 4)")
    common.add_device_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..demo.world import twin_caption

    pair = bundled.pairs()[MEMORISED_PAIR]
    prompts = [pair.caption, twin_caption(pair), *arguments.prompts]
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: give some words, or leave it out")
    wanted = Measurement(images=arguments.images, seed=arguments.seed)
    model = load(device=arguments.device, dtype=arguments.dtype)
    profile = Profile.load(bundled.CALIBRATION)  # of these very weights, which bfloat16 rounds
    profile = replace(profile, setting=replace(profile.setting, model=model.fingerprint))
    common.refuse_too_long(model, prompts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    noise, sigma = model.noise(wanted.seed, wanted.images), model.sigmas(wanted.steps)[0]
    target = profile.quantile(0.5, "first step", wanted.images)
    ordinary = profile.quantile(ORDINARY_QUANTILE, "first step", wanted.images)
    start = Start.of(model, noise, sigma, guidance_of(model, wanted).unconditional, target, wanted.seed, ordinary)
    output, cases = Console(), []
    with common.progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=len(prompts) * (1 + len(METHODS)))
        for prompt in prompts:
            case = run_case(
                model,
                prompt,
                wanted,
                profile,
                start,
                METHODS,
                bundled.training_image(prompt),
                on_run=lambda: bar.advance(task),
            )
            cases.append(case)
            output.print(verdict_panel(case.verdict))
            for mitigated in case.mitigated:
                likeness = (
                    ""
                    if mitigated.similarity is None
                    else f", similarity to the training image {case.similarity:.2f} -> {mitigated.similarity:.2f}"
                )
                common.tell(
                    f"  {mitigated.method}: score {mitigated.outcome.score_before:.2f} -> {mitigated.outcome.score_after:.2f}{likeness}"
                )
    save_images(cases, arguments.out)
    report = arguments.out / "report.html"
    subtitle = "one memorised prompt, the same prompt without its trigger word, and yours"
    write_text(report, render_cases("Déjà Vu demo", subtitle, model, wanted, profile, cases))
    common.tell(f"\nThe report with all images: {report}")
    return 0
