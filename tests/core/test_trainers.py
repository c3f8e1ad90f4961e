"""Folders are read as their trainers read them: expected captions and repeats are worked by hand from the trainers' sources."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_reference_build import data, image, write

from sd_dejavu.reference import images as reading_images
from sd_dejavu.reference.build import BuildSettings, build
from sd_dejavu.reference.captions import Rules, caption_of, most_frequent
from sd_dejavu.reference.features import Grey
from sd_dejavu.reference.images import open_image
from sd_dejavu.reference.reading import Reading
from sd_dejavu.reference.records import Record
from sd_dejavu.reference.reference_set import ReferenceSet
from sd_dejavu.reference.sources import open_source

FIRST_LINE = "only the first line of its caption is read, as the trainer does"
VARIANT = "its caption has several lines, of which the trainer draws one: the most frequent one is read, or the first"
CHOICE = "the trainer draws one of {a|b} in its caption: the most frequent one is read, or the first"
NOT_READ = "its caption is that of its .txt file; the .caption file beside it is not read"
STOPS = "its caption is not UTF-8, at which kohya's trainer stops: save it as UTF-8"


def records(folder: Path, **wanted: str) -> dict[str, Record]:
    return {record.name: record for record in open_source(folder, Reading(**wanted)).records(images=False)}


def captions(folder: Path, **wanted: str) -> dict[str, tuple[int, str]]:
    """(repeats, caption) of what is read."""
    return {name: (one.repeats, one.caption) for name, one in records(folder, **wanted).items() if not one.fault}


def left_out(folder: Path, **wanted: str) -> dict[str, str]:
    return {name: one.kind for name, one in records(folder, **wanted).items() if one.fault}


def turned() -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise for showing
    image(1).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder as users of kohya's trainer have it, with what others have left there."""
    files: dict[str, bytes | str] = {
        "10_sks dog/a.png": data(1),
        "10_sks dog/b.png": data(2),
        "10_sks dog/b.txt": "sks, red\nsks, blue\n",
        "10_sks dog/c.png": data(3),
        "10_sks dog/c.txt": "sks ||| 1girl, {red|blue} hair",
        "10_sks dog/d.png": data(4),
        "10_sks dog/d.txt": "dog txt",
        "10_sks dog/d.caption": "dog caption",
        "10_sks dog/e.jpg": turned(),
        "10_sks dog/e.txt": "photo of [trigger] at noon",
        "5_cat/deeper/i.png": data(9),
        "5_cat/g.png": data(6),
        "5_cat/g.txt": "a cat",
        "5_cat/g-masklabel.png": data(7),
        "5_cat/h.webp": data(8, "WEBP"),
        "5_cat/h.txt": "café chat".encode("latin-1"),
        "5_cat/k.gif": b"GIF89a",
        "0_off/n.png": data(10),
        "others/m.png": data(11),
        "cover.png": data(12),
        "metadata.jsonl": json.dumps({"file_name": "5_cat/g.png", "text": "metadata caption"}) + "\n",
    }
    return write(tmp_path / "set", files)


# ---------------------------------------------------------------------------------------------- kohya


def test_kohyas_numbered_folders_are_guessed_and_read_as_it_reads_them(mixed: Path) -> None:
    source = open_source(mixed)
    assert source.description == (
        "7 images of a folder, read as kohya's trainer reads it (guessed from its numbered folders): captions from "
        ".txt files, else the folder's name; repeated as the folders' names say; metadata.jsonl is not read"
    )
    assert captions(mixed) == {
        "10_sks dog/a.png": (10, "sks dog"),
        "10_sks dog/b.png": (10, "sks, red"),
        "10_sks dog/c.png": (10, "sks, 1girl, {red|blue} hair"),
        "10_sks dog/d.png": (10, "dog txt"),
        "10_sks dog/e.jpg": (10, "photo of [trigger] at noon"),
        "5_cat/g.png": (5, "a cat"),
    }
    assert left_out(mixed) == {
        "0_off/n.png": "beside",
        "5_cat/deeper/i.png": "beside",
        "5_cat/g-masklabel.png": "mask",
        "5_cat/h.webp": "unreadable",
        "5_cat/k.gif": "format",
        "cover.png": "beside",
        "others/m.png": "beside",
    }
    found = records(mixed)
    assert found["5_cat/h.webp"].fault == STOPS
    assert found["10_sks dog/b.png"].notes == (FIRST_LINE,)
    assert found["10_sks dog/d.png"].notes == (NOT_READ,)
    assert found["10_sks dog/c.png"].notes[0].startswith("{a|b} in its caption is read as text")


def test_only_kohya_does_not_turn_images(mixed: Path) -> None:
    """Stored 48 wide and 40 high, to be shown 40 wide and 48 high."""
    for trainer, size in (("kohya", (48, 40)), ("onetrainer", (40, 48)), ("ai-toolkit", (40, 48)), ("plain", (40, 48))):
        (found,) = [r for r in open_source(mixed, Reading(trainer)).records() if r.name.endswith("e.jpg")]
        assert open_image(found.data, found.upright).size == size, trainer
    made = build(mixed, mixed.parent / "made", Grey())
    thumbnail = made.thumbnails[made.names.index("10_sks dog/e.jpg")]
    assert Image.open(io.BytesIO(thumbnail)).size == (48, 40)


def test_kohya_reads_one_ending_of_captions(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"2_a/x.png": data(1), "2_a/x.caption": "x", "2_a/y.png": data(2)})
    assert captions(folder) == {"2_a/x.png": (2, "x"), "2_a/y.png": (2, "a")}
    write(folder, {"2_a/y.txt": "y"})
    assert captions(folder) == {"2_a/x.png": (2, "a"), "2_a/y.png": (2, "y")}
    assert records(folder)["2_a/x.png"].notes == ("the .caption file beside it is not read",)


def test_an_empty_caption_file_ends_kohyas_training(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"2_a/x.png": data(1), "2_a/x.txt": "", "2_a/y.png": data(2)})
    assert records(folder)["2_a/x.png"].fault == "its caption's file is empty, at which kohya's trainer stops"


def test_kohya_finds_the_caption_of_a_face_that_was_cut_out(tmp_path: Path) -> None:
    """Four numbers at the end of the name are the face's place and size."""
    folder = write(tmp_path / "in", {"2_a/x_1_2_3_4.png": data(1), "2_a/x.txt": "a face"})
    assert captions(folder) == {"2_a/x_1_2_3_4.png": (2, "a face")}


def test_few_numbered_folders_among_others_are_only_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"2024_summer/a.png": data(1), "people/b.png": data(2), "c.png": data(3)})
    assert captions(folder) == dict.fromkeys(("2024_summer/a.png", "c.png", "people/b.png"), (1, ""))


def test_one_numbered_folder_itself_where_kohya_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "10_sks dog", {"a.png": data(1)})
    assert captions(folder) == {"a.png": (1, "")}
    assert captions(folder, trainer="kohya") == {"a.png": (10, "sks dog")}


@pytest.mark.parametrize("key", ["5_cat/g.png", "5_cat/g", "/home/me/train/5_cat/g.png", r"D:\train\5_cat\g.png"])
def test_kohyas_list_of_captions(tmp_path: Path, key: str) -> None:
    """Caption and tags are joined by the separator alone; older tools leave the ending of names out."""
    listed = {key: {"caption": "a cat", "tags": "grey, sitting"}}
    files = {"5_cat/g.png": data(1), "other.png": data(2), "meta_cap.json": "{}", "meta_clean.json": json.dumps(listed)}
    folder = write(tmp_path / "in", {**files, "third.png": data(3)})
    assert captions(folder) == {"5_cat/g.png": (1, "a cat,grey, sitting")}
    assert left_out(folder) == {"other.png": "unlisted", "third.png": "unlisted"}
    assert "(guessed from meta_clean.json): captions from meta_clean.json" in open_source(folder).description


# ------------------------------------------------------------------------------------- kohya's configuration

SUBSET = """
[general]
caption_extension = ".txt"
{general}
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "/home/me/train/dog"
  num_repeats = 3
  class_tokens = "sks dog"
  {subset}
"""


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ("", "sks, red\nsks, blue", "sks, red"),
        ("", "sks ||| 1girl, {red|blue} hair", "sks ||| 1girl, {red|blue} hair"),
        ('keep_tokens_separator = "|||"', "sks ||| 1girl", "sks ||| 1girl"),
        ('keep_tokens_separator = "|||"\nshuffle_caption = true', "sks, a ||| b , c ||| d", "sks, a, b, c, d"),
        ("shuffle_caption = true", "sks , 1girl,red", "sks, 1girl, red"),
        ("shuffle_caption = true\nkeep_tokens = 2\ncaption_tag_dropout_rate = 1.0", "a, b, c, d", "a, b"),
        ("enable_wildcard = true", "a {red|blue|blue} hat", "a blue hat"),
        ("enable_wildcard = true", "a {red|blue} {{hat}}", "a red {hat}"),
        ("enable_wildcard = true", "one\n\n two \ntwo\n", "two"),
        ("enable_wildcard = true", "one\ntwo", "one"),
        ('caption_prefix = "art of"\ncaption_suffix = "by x"', "a dog", "art of a dog by x"),
        ('enable_wildcard = true\ncaption_prefix = "p"\ncaption_suffix = "s"', "one\ntwo", "p one"),
        ('secondary_separator = ";;;"\nshuffle_caption = true', "a, b;;;c", "a, b,c"),
        ("caption_dropout_rate = 0.9", "a dog", "a dog"),
        ("caption_dropout_rate = 1.0", "a dog", ""),
        ("caption_dropout_every_n_epochs = 1", "a dog", ""),
        ("caption_dropout_every_n_epochs = 2", "a dog", "a dog"),
    ],
)
@pytest.mark.parametrize("place", ["general", "subset"])
def test_captions_by_kohyas_configuration(tmp_path: Path, settings: str, text: str, expected: str, place: str) -> None:
    folder = write(tmp_path / "in", {"dog/a.png": data(1), "dog/a.txt": text})
    config = tmp_path / "dataset.toml"
    config.write_text(SUBSET.format(**{"general": "", "subset": "", place: settings}))
    assert captions(folder, trainer_config=str(config)) == {"dog/a.png": (3, expected)}


def test_folders_of_kohyas_configuration(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "dog/a.png": data(1),
        "dog/deep/b.png": data(2),
        "dog/c.png": data(3),
        "dog/c.caption": "c",
        "reg/d.png": data(4),
        "spare/e.png": data(5),
        "f.png": data(6),
    }
    folder = write(tmp_path / "in", files)
    config = tmp_path / "dataset.toml"
    config.write_text(
        "[[datasets]]\nresolution = 512\ncaption_extension = '.caption'\n"
        "[[datasets.subsets]]\nimage_dir = 'C:\\train\\dog'\nnum_repeats = 3\nclass_tokens = 'sks dog'\n"
        "[[datasets.subsets]]\nimage_dir = 'train/reg'\nis_reg = true\nclass_tokens = 'dog'\n"
        "[[datasets.subsets]]\nimage_dir = 'train/elsewhere'\n"
        "[[datasets]]\nresolution = 768\n"
        "[[datasets.subsets]]\nimage_dir = 'C:\\train\\dog'\nnum_repeats = 2\n"
    )
    assert captions(folder, trainer_config=str(config)) == {"dog/a.png": (5, "sks dog"), "dog/c.png": (5, "c")}
    assert left_out(folder, trainer_config=str(config)) == {
        "dog/deep/b.png": "unnamed",
        "f.png": "unnamed",
        "reg/d.png": "regularisation",
        "spare/e.png": "unnamed",
    }
    source = open_source(folder, Reading(trainer_config=str(config)))
    assert source.description == "2 images of a folder, read as kohya's trainer reads it: as dataset.toml says"
    before = source.identity
    config.write_text(config.read_text().replace("num_repeats = 2", "num_repeats = 7"))
    assert open_source(folder, Reading(trainer_config=str(config))).identity != before


def test_a_list_of_captions_that_kohyas_configuration_names(tmp_path: Path) -> None:
    listed = {"a.png": {"caption": "one\ntwo", "tags": "x, y"}, "b.png": {"tags": "z"}}
    files = {"dog/a.png": data(1), "dog/b.png": data(2), "dog/c.png": data(3), "meta.json": json.dumps(listed)}
    folder = write(tmp_path / "in", files)
    config = tmp_path / "dataset.toml"
    # With wildcards the tags follow each line of the caption, so that without one they are lost.
    for wildcards, first, second in (("true", "one,x, y", ""), ("false", "one", "z")):
        config.write_text(
            f"[[datasets]]\nenable_wildcard = {wildcards}\n"
            "[[datasets.subsets]]\nimage_dir = '/train/dog'\nmetadata_file = '/train/meta.json'\nnum_repeats = 2\n"
        )
        found = captions(folder, trainer_config=str(config))
        assert found == {"dog/a.png": (2, first), "dog/b.png": (2, second)}
    assert left_out(folder, trainer_config=str(config)) == {"dog/c.png": "unlisted"}
    config.write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'dog'\nmetadata_file = '/etc/passwd'\n")
    with pytest.raises(ValueError, match="names passwd, which is not in the folder: copy it there"):
        open_source(folder, Reading(trainer_config=str(config)))


def test_the_configuration_of_a_whole_training_by_kohya(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"4_dog/a.png": data(1), "4_dog/a.txt": "x, {red|blue}", "b.png": data(2)})
    config = tmp_path / "train.toml"
    config.write_text("[dataset]\ntrain_data_dir = '/train'\nenable_wildcard = true\n[training]\nseed = 1\n")
    assert captions(folder, trainer_config=str(config)) == {"4_dog/a.png": (4, "x, red")}


# ------------------------------------------------------------------------------------------- OneTrainer


def test_onetrainer_is_guessed_from_its_masks_and_a_line_is_a_caption(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.png": data(1),
        "a.txt": "first\n\nsecond\nsecond\n",
        "a-masklabel.png": data(2),
        "a-condlabel.png": data(3),
        "b.png": data(4),
        "b.caption": "not read",
        "c.jxl": b"no image",
    }
    folder = write(tmp_path / "in", files)
    assert captions(folder) == {"a.png": (1, "second"), "b.png": (1, "")}
    assert left_out(folder) == {"a-condlabel.png": "condition", "a-masklabel.png": "mask", "c.jxl": "format"}
    assert records(folder)["a.png"].notes == (VARIANT,)
    assert records(folder)["c.jxl"].fault == "OneTrainer does not read .jxl"
    assert "read as OneTrainer reads it (guessed from its masks)" in open_source(folder).description


def concept(path: str, text: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": "x", "path": path, "enabled": True, "text": text or {}, **more}


@pytest.mark.parametrize("whole", [False, True])
def test_onetrainers_concepts(tmp_path: Path, whole: bool) -> None:
    files: dict[str, bytes | str] = {
        "dog/a.png": data(1),
        "dog/a.txt": "a; b;c; d",
        "dog/deep/b.png": data(2),
        "cat/deep/grey cat.png": data(3),
        "fox/c.png": data(4),
        "fox.txt": "a fox\na red fox\na red fox",
        "prior/d.png": data(5),
        "valid/e.png": data(6),
        "off/f.png": data(7),
    }
    folder = write(tmp_path / "in", files)
    tags = {"tag_delimiter": ";", "keep_tags_count": 2, "enable_tag_shuffling": True}
    concepts = [
        concept("/d/dog", tags, balancing=2.0),
        concept("/d/cat", {"prompt_source": "filename"}, include_subdirectories=True, repeats=3.4),
        concept("/d/fox", {"prompt_source": "concept", "prompt_path": "/d/fox.txt"}, balancing=0.5),
        concept("/d/prior", type="PRIOR_PREDICTION"),
        concept("/d/valid", type="VALIDATION"),
        {**concept("/d/off"), "enabled": False},
    ]
    config = tmp_path / "concepts.json"
    config.write_text(json.dumps({"concepts": concepts} if whole else concepts))
    assert captions(folder, trainer_config=str(config)) == {
        "cat/deep/grey cat.png": (3, "grey cat"),
        "dog/a.png": (2, "a; b; c; d"),
        "fox/c.png": (1, "a red fox"),
    }
    assert left_out(folder, trainer_config=str(config)) == {
        "dog/deep/b.png": "unnamed",
        "off/f.png": "unnamed",
        "prior/d.png": "regularisation",
        "valid/e.png": "validation",
    }
    dropped = {**tags, "tag_dropout_enable": True, "tag_dropout_probability": 1.0, "tag_dropout_mode": "FULL"}
    config.write_text(json.dumps([concept("/d/dog", dropped)]))
    assert captions(folder, trainer_config=str(config)) == {"dog/a.png": (1, "a; b")}


# ------------------------------------------------------------------------------------------- ai-toolkit


def test_ai_toolkit_puts_its_trigger_word_in(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a.png": data(1),
        "a.txt": "photo of [trigger],at noon",
        "b.png": data(2),
        "b.txt": "[name] again",
        "c.png": data(3),
        "c.txt": "no word",
        "d.png": data(4),
        "e.bmp": data(5, "BMP"),
        "_controls/a.png": data(6),
    }
    folder = write(tmp_path / "in", files)
    assert captions(folder) == {
        "a.png": (1, "photo of [trigger], at noon"),
        "b.png": (1, "[name] again"),
        "c.png": (1, "no word"),
        "d.png": (1, ""),
    }
    assert left_out(folder) == {"_controls/a.png": "condition", "e.bmp": "format"}
    assert records(folder)["a.png"].notes == (
        "[trigger] in its caption is read as text: give the trigger word, or ai-toolkit's configuration",
    )
    assert "(guessed from [trigger] in its captions)" in open_source(folder).description
    expected = {
        "a.png": (1, "photo of p3r5on, at noon"),
        "b.png": (1, "p3r5on again"),
        "c.png": (1, "p3r5on no word"),
        "d.png": (1, "p3r5on"),
    }
    assert captions(folder, trigger_word="p3r5on") == expected
    config = tmp_path / "train.yaml"
    config.write_text(
        "job: extension\nconfig:\n  process:\n  - type: sd_trainer\n    trigger_word: p3r5on\n    datasets:\n"
        "    - folder_path: /somewhere/else\n      caption_ext: txt\n      num_repeats: 4\n"
        "      default_caption: [not, text]\n      keep_tokens: 1\n      token_dropout_rate: 1\n"
    )
    found = captions(folder, trainer_config=str(config))
    assert found == {
        "a.png": (4, "photo of p3r5on"),
        "b.png": (4, "p3r5on again"),
        "c.png": (4, "p3r5on no word"),
        "d.png": (4, "p3r5on"),
    }
    config.write_text(
        "config:\n  process:\n  - datasets:\n    - {folder_path: x, default_caption: 'a [trigger] thing'}\n"
    )
    assert captions(folder, trainer_config=str(config))["d.png"] == (1, "a thing")


# -------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_diffusers_list_of_captions(tmp_path: Path, form: str) -> None:
    rows = [("a.png", "first"), ("sub/b.png", "second"), ("../outside.png", "none")]
    text = {
        "jsonl": "".join(
            json.dumps({"file_name": n, "label": 3, "caption": c, "text": f"{c}!"}) + "\n" for n, c in rows
        ),
        "csv": "file_name,label,caption,text\n" + "".join(f"{n},3,{c},{c}!\n" for n, c in rows),
    }[form]
    files: dict[str, bytes | str] = {
        "a.png": data(1),
        "a.txt": "not read",
        "sub/b.png": data(2),
        "sub/c.png": data(3),
        f"metadata.{form}": text,
        "low/metadata.jsonl": '{"file_name": "d.png", "prompt": "its own"}',
        "low/d.png": data(4),
    }
    folder = write(tmp_path / "in", files)
    assert captions(folder) == {"a.png": (1, "first!"), "low/d.png": (1, "its own"), "sub/b.png": (1, "second!")}
    assert left_out(folder) == {"sub/c.png": "unlisted"}
    (folder / "low" / "metadata.jsonl").unlink()
    assert captions(folder, caption_column="caption") == {"a.png": (1, "first"), "sub/b.png": (1, "second")}
    with pytest.raises(ValueError, match=f"metadata.{form}, entry 1: no 'alt': name the key that holds the captions"):
        open_source(folder, Reading(caption_column="alt"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"text": "x"}', "metadata.jsonl, entry 1: it has no file_name, which says whose caption it is"),
        ('{"file_name": "a.png"}\n{"fi', "metadata.jsonl, line 2: not valid JSON"),
        ("[" * 100_000, "metadata.jsonl, line 1: not valid JSON"),
        ("3", "metadata.jsonl, line 1: not an entry"),
        (b"\xff\xfe\xff", "metadata.jsonl: not UTF-8: save it as UTF-8"),
    ],
)
def test_a_broken_list_of_captions_is_told(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    folder = write(tmp_path / "in", {"a.png": data(1), "metadata.jsonl": text})
    with pytest.raises(ValueError, match=sentence):
        open_source(folder)
    assert captions(folder, trainer="plain") == {"a.png": (1, "")}


# -------------------------------------------------------------------------------------- what is not obeyed


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, {"secret.txt": "a secret", "private.png": data(1), "list.jsonl": '{"file_name": "a.png"}'})
    folder = write(tmp_path / "in", {"a.png": data(2), "b.png": data(3), "within.txt": "inside", "c.png": data(4)})
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to(tmp_path / "private.png")
    (folder / "c.txt").symlink_to("within.txt")
    made = build(folder, tmp_path / "set", Grey())
    assert (made.names, made.captions) == (("c.png",), ("inside",))
    assert [one["reason"] for one in made.details["skipped"]] == [
        "its caption is a link that leads out of the folder, which is not followed",
        "a link that leads out of the folder, which is not followed",
    ]
    assert "a secret" not in (tmp_path / "set.json").read_text()
    (folder / "metadata.jsonl").symlink_to(tmp_path / "list.jsonl")
    with pytest.raises(
        ValueError, match=r"metadata\.jsonl is a link that leads out of the folder, which is not followed: put"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("c.toml", "a = ", "c.toml: not valid TOML"),
        ("c.toml", "seed = 1", "c.toml is no trainer's configuration that can be read: give kohya's"),
        ("c.ini", "x", "c.ini is no trainer's configuration that can be read: give kohya's"),
        ("c.yaml", "!!python/object/apply:os.system [echo]", "c.yaml: not valid YAML"),
        ("c.yaml", "a: &a {x: 1}\nb: {<<: [*a, *a]}", "c.yaml: not valid YAML"),
        ("c.yaml", "[" * 3000, "c.yaml: not valid YAML"),
        ("c.json", "[]", "the configuration names no folder of images"),
        ("c.json", '[{"path": "/x/cat"}, {"path": "y/dog"}]', "names the folders cat, dog, and none of them is there"),
        ("c.json", "{" * 9000, "c.json: not valid JSON"),
        (
            "c.json",
            '{"datasets": [{"subsets": [{"image_dir": "a", "num_repeats": 10001}]}]}',
            "asks for more than 10,000",
        ),
        ("c.json", '{"datasets": [{"subsets": [{"image_dir": "a", "num_repeats": 1e400}]}]}', None),
        ("c.toml", "#" * (1 << 20) + "#", "too large: 1,048,577 bytes, and at most 1,048,576 are read"),
        ("c.toml", None, "c.toml: cannot be read: No such file or directory"),
    ],
)
def test_configurations_that_cannot_be_used_are_told(
    tmp_path: Path, name: str, text: str | None, sentence: str | None
) -> None:
    folder = write(tmp_path / "in", {"a.png": data(1)})
    if text is not None:
        (tmp_path / name).write_text(text)
    wanted = {"trainer_config": str(tmp_path / name)}
    if sentence is None:
        assert captions(folder, **wanted) == {"a.png": (1, "")}
        return
    with pytest.raises(ValueError, match=sentence) as caught:
        open_source(folder, Reading(**wanted))
    assert "\n" not in str(caught.value)


def test_another_trainer_than_the_configurations_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.png": data(1)})
    (tmp_path / "c.json").write_text(json.dumps([concept("in")]))
    with pytest.raises(ValueError, match=r"c\.json is a configuration of OneTrainer, but the trainer is to be kohya"):
        open_source(folder, Reading("kohya", str(tmp_path / "c.json")))


def test_a_reader_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in", {"a.png": data(1)})

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("sd_dejavu.reference.trainer_config.importlib.import_module", missing)
    for name, needed in (("c.toml", "Python 3.11 or the package tomli"), ("c.yaml", "the package pyyaml")):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=f"{name}: reading {name[1:]} needs {needed}"):
            open_source(folder, Reading(trainer_config=str(tmp_path / name)))


def test_tars_have_no_trainer(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\0" * 1024)
    with pytest.raises(ValueError, match="tars and Parquet files are read in one way: name no trainer"):
        open_source(tmp_path / "a.tar", Reading("kohya"))


# --------------------------------------------------------------------------------------- formats, and the whole


def test_avif_is_read_where_pillow_can_and_named_where_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    if "AVIF" in reading_images.formats():
        image(1).save(stream, "AVIF", quality=100)
        folder = write(tmp_path / "in", {"a.avif": stream.getvalue()})
        assert open_image(next(iter(open_source(folder).records())).data).size == (48, 40)
    monkeypatch.setattr(reading_images, "formats", lambda: reading_images.FORMATS)
    folder = write(tmp_path / "in", {"a.avif": b"x", "b.jxl": b"x", "c.png": data(1)})
    faults = {name: one.fault for name, one in records(folder).items()}
    assert faults == {
        "a.avif": "reading .avif needs Pillow 11.3 or the package pillow-avif-plugin",
        "b.jxl": "reading .jxl needs the package pillow-jxl-plugin",
        "c.png": "",
    }


@pytest.mark.parametrize(
    ("raw", "caption", "encoding"),
    [
        ("café".encode("cp1252"), "café", "Windows-1252"),
        ("café".encode("utf-16"), "café", "UTF-16"),
        ("café".encode("utf-8-sig"), "café", ""),
    ],
)
def test_encodings_are_named(tmp_path: Path, raw: bytes, caption: str, encoding: str) -> None:
    folder = write(tmp_path / "in", {"a.png": data(1), "a.txt": raw})
    found = records(folder)["a.png"]
    assert found.caption == caption
    assert found.notes == ((f"its caption is not UTF-8: read as {encoding}",) if encoding else ())


def test_what_was_read_and_left_out_is_kept_with_the_set(mixed: Path, tmp_path: Path) -> None:
    build(mixed, tmp_path / "made", Grey())
    details = ReferenceSet.load(tmp_path / "made").details
    assert details["source"].startswith("7 images of a folder, read as kohya's trainer reads it")
    assert {one["name"]: one["kind"] for one in details["skipped"]} == left_out(mixed)
    assert {(one["name"], one["note"]) for one in details["notes"]} >= {
        ("10_sks dog/b.png", FIRST_LINE),
        ("10_sks dog/d.png", NOT_READ),
    }
    plain = build(mixed, tmp_path / "plain", Grey(), BuildSettings("plain"))
    assert plain.captions[plain.names.index("10_sks dog/b.png")] == "sks, red\nsks, blue"
    with pytest.raises(ValueError, match="is there already, made from another source or with other settings"):
        build(mixed, tmp_path / "made", Grey(), BuildSettings("plain"))


def test_a_choice_is_noted_where_the_trainer_draws_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"dog/a.png": data(1), "dog/a.txt": "a {red|blue} hat"})
    config = tmp_path / "dataset.toml"
    config.write_text(SUBSET.format(general="enable_wildcard = true", subset=""))
    assert records(folder, trainer_config=str(config))["dog/a.png"].notes == (CHOICE,)


# ------------------------------------------------------------------------------------- a second implementation


def processed_by_kohya(caption: str, rules: Rules) -> str:
    """``process_caption`` of sd-scripts line by line, with the most frequent one in place of what it draws at random."""
    if rules.prefix:
        caption = rules.prefix + " " + caption
    if rules.suffix:
        caption = caption + " " + rules.suffix
    if rules.wildcards:
        if "\n" in caption:
            caption = most_frequent(caption.split("\n"))
        replacer1, replacer2 = "⦅", "⦆"
        caption = caption.replace("{{", replacer1).replace("}}", replacer2)
        caption = re.sub(r"\{([^}]+)\}", lambda match: most_frequent(match.group(1).split("|")), caption)
        caption = caption.replace(replacer1, "{").replace(replacer2, "}")
    else:
        caption = caption.split("\n")[0]
    if rules.tags_apart:
        fixed_tokens, flex_tokens, fixed_suffix_tokens = [], [], []
        if rules.kept_separator and rules.kept_separator in caption:
            fixed_part, flex_part = caption.split(rules.kept_separator, 1)
            if rules.kept_separator in flex_part:
                flex_part, fixed_suffix_part = flex_part.split(rules.kept_separator, 1)
                fixed_suffix_tokens = [t.strip() for t in fixed_suffix_part.split(rules.separator) if t.strip()]
            fixed_tokens = [t.strip() for t in fixed_part.split(rules.separator) if t.strip()]
            flex_tokens = [t.strip() for t in flex_part.split(rules.separator) if t.strip()]
        else:
            tokens = [t.strip() for t in caption.strip().split(rules.separator)]
            flex_tokens = tokens[:]
            if rules.kept > 0:
                fixed_tokens, flex_tokens = flex_tokens[: rules.kept], tokens[rules.kept :]
        if rules.tag_dropout >= 1:
            flex_tokens = []
        caption = ", ".join(fixed_tokens + flex_tokens + fixed_suffix_tokens)
    if rules.second_separator:
        caption = caption.replace(rules.second_separator, rules.separator)
    return caption


def read_by_kohya(text: str, wildcards: bool) -> str:
    """``read_caption`` of sd-scripts."""
    lines = io.StringIO(text).readlines() or [""]
    return "\n".join([line.strip() for line in lines if line.strip() != ""]) if wildcards else lines[0].strip()


@given(
    text=st.text(st.sampled_from("ab {}|,;\n"), max_size=30),
    rules=st.builds(
        Rules,
        prefix=st.sampled_from(["", "p, q"]),
        suffix=st.sampled_from(["", "s"]),
        wildcards=st.booleans(),
        kept=st.integers(0, 2),
        kept_separator=st.sampled_from(["", "|"]),
        second_separator=st.sampled_from(["", ";"]),
        tags_apart=st.booleans(),
        tag_dropout=st.sampled_from([0.0, 0.5, 1.0]),
        assumed=st.just(False),
    ),
)
def test_captions_are_those_of_kohyas_own_lines(text: str, rules: Rules) -> None:
    expected = processed_by_kohya(read_by_kohya(text, rules.wildcards), rules)
    assert caption_of("kohya", text, rules)[0] == expected.strip()
