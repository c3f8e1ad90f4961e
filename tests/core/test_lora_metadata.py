"""What a LoRA's file says of its data set against what was read: sentences worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_reference_build import data, write

from sd_dejavu.reference.build import build
from sd_dejavu.reference.features import Grey
from sd_dejavu.training.lora_metadata import MOST, Shown, misfits, remarks

DIRS = {"10_cat": {"n_repeats": 10, "img_count": 2}, "3_dog": {"n_repeats": 3, "img_count": 1}}
TAGS = {"10_cat": {"cat": 2, "red hair": 1}, "3_dog": {"dog": 1}}
READ = [Shown("10_cat/a.png", "cat, Red hair", 10), Shown("10_cat/b.png", "cat", 10), Shown("3_dog/c.png", "dog", 3)]


def metadata(dirs: Any = DIRS, tags: Any = TAGS, images: int | None = 23) -> dict[str, str]:
    found = {"ss_dataset_dirs": json.dumps(dirs), "ss_tag_frequency": json.dumps(tags)}
    return {**found, **({} if images is None else {"ss_num_train_images": str(images)})}


def test_nothing_is_said_of_what_fits() -> None:
    assert misfits(metadata(), READ, 23) == []
    assert misfits({}, READ, 23) == []


def test_a_prefix_and_tags_put_together_otherwise_are_no_misfit() -> None:
    read = [Shown(s.name, f"art of {s.caption}", s.repeats) for s in READ]
    assert misfits(metadata(), read, 23) == []
    drawn = {"10_cat": {"cat\n{a": 1, "dog": 9, "b}": 2}, "3_dog": {"sks ||| dog": 1, "dog": 1}}
    assert misfits(metadata(tags=drawn), READ, 23) == []


def test_a_trigger_word_that_ai_toolkit_writes_as_a_tag_is_no_data_set() -> None:
    assert misfits({"ss_tag_frequency": '{"1_sks": {"sks": 1}}'}, READ, 23) == []


@pytest.mark.parametrize(
    ("read", "total", "sentences"),
    [
        (READ[:2], 20, ["The LoRA was trained with a folder '3_dog', of which nothing was read."]),
        (READ[1:], 13, ["The LoRA was trained with 2 images of the folder '10_cat', and 1 was read."]),
        (
            [*READ, Shown("3_dog/d.png", "dog", None)],
            23,
            ["The LoRA was trained with 1 image of the folder '3_dog', and 2 were read."],
        ),
        (
            [*READ[:2], Shown("3_dog/c.png", "dog", 1)],
            21,
            ["The LoRA was shown the folder '3_dog' 3 times an epoch, and it was read as shown once."],
        ),
        (
            [*READ, Shown("x/5_fox/e.png", "fox", 5)],
            28,
            ["The folder '5_fox' was read, and the LoRA was not trained with it."],
        ),
        (READ, 24, ["The LoRA was shown 23 images an epoch, and 24 were read."]),
        (
            [Shown("10_cat/a.png", "cat", 10), *READ[1:]],
            23,
            ["Captions of the folder '10_cat' have changed since: 'red hair' once there, 0 here."],
        ),
        (
            [Shown("10_cat/a.png", "cat, red hair, hat", 10), *READ[1:]],
            23,
            ["Captions of the folder '10_cat' have changed since: the LoRA never saw 'hat'."],
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(read: list[Shown], total: int, sentences: list[str]) -> None:
    assert misfits(metadata(), read, total) == sentences


def test_a_folder_of_its_own_and_one_that_was_given_twice() -> None:
    dirs = {"dog": {"n_repeats": 2, "img_count": 2}, "dog (2)": {"n_repeats": 1, "img_count": 2}}
    read = [Shown("a.png", "x", 3), Shown("b.png", "y", 3)]
    assert misfits(metadata(dirs, {}, 6), read, 6) == []
    assert misfits(metadata({"meta_lat.json": {"n_repeats": 3, "img_count": 2}}, {}), read, 23) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"a": 3}', '{"a": {"n_repeats": null, "img_count": "x"}}']
)
def test_metadata_that_says_nothing_of_use(text: str) -> None:
    assert misfits({"ss_dataset_dirs": text, "ss_tag_frequency": text}, READ, 23) == []


def test_remarks_on_a_set_and_its_loras(tmp_path: Path) -> None:
    """Equal images share a row: their repeats are one sum, and each of them counts as an image of its folder."""
    files = {"10_cat/a.png": data(1), "10_cat/b.png": data(1), "10_cat/a.txt": "cat\nx", "10_cat/b.txt": "cat"}
    reference = build(write(tmp_path / "in", files), tmp_path / "set", Grey())
    fits, other, none = tmp_path / "fits.safetensors", tmp_path / "other.safetensors", tmp_path / "none.safetensors"
    tensors = {"lora": torch.zeros(1)}
    one = {"10_cat": {"n_repeats": 10, "img_count": 2}}
    save_file(tensors, fits, metadata(one, {"10_cat": {"cat": 2}}, 20))
    save_file(tensors, other, metadata({f"{n}_x": {"n_repeats": n, "img_count": 1} for n in range(1, 9)}, {}))
    none.write_bytes(b"no LoRA")
    told = [
        f"Training set: {reference.details['source']}.",
        "1 image: only the first line of its caption is read, as the trainer does.",
    ]
    assert list(remarks(reference, [fits, none])) == told
    (*first, last) = remarks(reference, [other, other])
    assert first[:2] == told and len(first) == 2 + MOST
    assert last == "And 3 more that do not fit."
