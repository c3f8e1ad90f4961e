"""Is this prompt memorised? A score, a p-value and a verdict for each.

Only the first sampling step is run unless --score asks for more; words are named for flagged prompts.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from ..calibration import store
from ..calibration.misfit import stranger_nulls
from ..calibration.profile import Profile
from ..core.denoiser import Model
from ..detectors import scores as known_scores
from ..report.wording import misfit
from ..run.judge import needed_nulls
from ..run.measure import Measurement, setting_of, verdict_on
from . import calibrate, common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_prompt_options(parser)
    common.add_model_options(parser)
    common.add_settings(parser, Measurement, "measurement")
    parser.add_argument(
        "--explain", choices=("never", "flagged", "always"), default="flagged", help="name words (default: flagged)"
    )
    parser.add_argument(
        "--calibrate-first",
        type=int,
        default=0,
        metavar="COUNT",
        help="where no calibration fits, measure so many ordinary prompts first and keep them; 100 are enough to flag one "
        "in a hundred (default: 0)",
    )
    parser.add_argument("--fail-on-flag", action="store_true", help="exit with status 3 when a prompt is flagged")


def run(arguments: argparse.Namespace) -> int:
    wanted = common.from_arguments(Measurement, arguments)
    if not 0 <= arguments.calibrate_first <= common.LARGEST_COUNT:
        raise ValueError(
            f"--calibrate-first must be 0 or more, at most {common.LARGEST_COUNT:,}, not {arguments.calibrate_first}"
        )
    prompts = common.prompts_of(arguments)
    model = common.load_model(arguments)
    profile, setting = common.profile_of(arguments, model, wanted), setting_of(model, wanted)
    known = 0 if profile is None else len(profile.null_scores(wanted.score, wanted.images))
    if arguments.profile is None and known < min(arguments.calibrate_first, needed_nulls(wanted.alpha)):
        profile = _calibrated(arguments, model, wanted)
    flagged, missing = 0, False
    scores: list[float] = []
    for measured in common.measured_in_chunks(model, prompts, wanted, arguments.batch_size, Console(stderr=True)):
        verdict = verdict_on(measured, wanted, setting, profile)
        flagged += bool(verdict.flagged)
        scores += [] if verdict.score is None else [verdict.score]
        why = ""
        if measured.scores is not None and (
            arguments.explain == "always" or (arguments.explain == "flagged" and verdict.flagged)
        ):
            words, why = common.words_of(model, measured.prompt, wanted, batch_size=arguments.batch_size)
            verdict = verdict_on(measured, wanted, setting, profile, words)
        missing = missing or not measured.per_step or bool(why)
        common.print_verdict(verdict, wanted, model, arguments.json, why)
    if profile is not None and stranger_nulls(scores, profile.null_scores(wanted.score, wanted.images)):
        common.warn(misfit(advice="calibrate with prompts like yours (--like)"))
    if not arguments.json and len(prompts) > 1:
        common.tell(f"{flagged} of {len(prompts)} prompts flagged at alpha = {wanted.alpha:g}")
    if arguments.fail_on_flag and flagged:
        return common.EXIT_FLAGGED
    return common.EXIT_NOT_MEASURED if missing else 0


def _calibrated(arguments: argparse.Namespace, model: Model, wanted: Measurement) -> Profile:
    """A calibration of this setting, made now and kept; of whole runs where the score needs them."""
    count = arguments.calibrate_first
    prompts, ordinary = common.ordinary_prompts_of(arguments, None, None, count)
    unread = common.too_long(model, prompts)
    prompts = [prompt for index, prompt in enumerate(prompts) if index not in unread]
    full_runs = 0 if known_scores()[wanted.score].of_first_step else count
    profile, _ = calibrate.measured(model, prompts, wanted, full_runs, arguments.batch_size, ordinary)
    try:
        store.keep(profile, store.path_for(profile.setting))
    except store.HoldsMore as error:  # of fewer images, say: this check has its own all the same
        common.warn(f"not kept: {error}")
    return profile
