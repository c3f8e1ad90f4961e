"""What a user says of how a training set is to be read: settings shared by all that read one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..core.settings import Checked, option

Trainer = Literal["kohya", "onetrainer", "ai-toolkit", "diffusers", "plain"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)
CALLED: dict[Trainer, str] = {  # 'read as ... reads it'
    "kohya": "kohya's trainer",
    "onetrainer": "OneTrainer",
    "ai-toolkit": "ai-toolkit",
    "diffusers": "a training script of diffusers",
    "plain": "a plain trainer",
}
GUESS = "guess"


@dataclass(frozen=True)
class Reading(Checked):
    """As what a training set is read."""

    trainer: str = option(
        GUESS,
        "whose rules say which images of a folder are trained, how often, and with which captions; guess: found from "
        "what lies there, and told",
        choices=(GUESS, *TRAINERS),
    )
    trainer_config: str = option(
        "",
        "the trainer's own configuration, for its folders, repeats and captions: kohya's dataset .toml, ai-toolkit's "
        ".yaml, OneTrainer's .json of concepts",
    )
    trigger_word: str = option("", "what ai-toolkit put in for [trigger] and [name], where no configuration says it")
    image_column: str = option("", "Parquet column that holds the images (default: image, jpg, png, ...)")
    caption_column: str = option("", "column that holds the captions (default: caption, text, prompt)")
