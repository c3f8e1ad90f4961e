"""Sets from every kind of source, counts against numpy, and a build stopped at every point it can be stopped at."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_dejavu.core.similarity import grey_correlation
from sd_dejavu.demo import bundled
from sd_dejavu.demo.reference import bundled_reference
from sd_dejavu.kept import files as kept_files
from sd_dejavu.kept.foreign import CAPTION_CHARACTERS, PIXELS, REPEATS
from sd_dejavu.reference import build as building
from sd_dejavu.reference import parquet
from sd_dejavu.reference import tar as tars
from sd_dejavu.reference.build import BuildSettings, build, embed, from_images, near_duplicates
from sd_dejavu.reference.features import Grey, HostVision, Pixels
from sd_dejavu.reference.images import ImageError, formats, open_image, to_tensor
from sd_dejavu.reference.reading import Reading
from sd_dejavu.reference.records import safe_name
from sd_dejavu.reference.reference_set import ReferenceSet
from sd_dejavu.reference.sources import open_source


def image(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def data(seed: int, kind: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    image(seed, **more).save(stream, kind)
    return stream.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def skipped(reference: ReferenceSet) -> dict[str, str]:
    return {entry["name"]: entry["reason"] for entry in reference.details["skipped"]}


# -------------------------------------------------------------------------------------- folder


def test_a_folder_of_images_and_captions(tmp_path: Path) -> None:
    files = {
        "b.png": data(1),
        "b.txt": "\ufeff a fox \r\n",
        "a/c.jpg": data(2, "JPEG"),
        "a/c.caption": "a mill",
        "a/d.e.webp": data(3, "WEBP"),
        "a/d.e.txt": b"caf\xe9",
        "no caption.bmp": data(4, "BMP"),
        "notes.md": "not an image",
        ".hidden/x.png": data(5),
    }
    made = build(write(tmp_path / "in", files), tmp_path / "set", Pixels(8))
    assert made.names == ("a/c.jpg", "a/d.e.webp", "b.png", "no caption.bmp")
    assert made.captions == ("a mill", "café", "a fox", "")
    assert made.details["notes"] == [{"name": "a/d.e.webp", "note": "its caption is not UTF-8: read as Windows-1252"}]
    assert made.duplicates.tolist() == [1, 1, 1, 1]
    expected = Pixels(8)(to_tensor(image(1)))  # PNG keeps the pixels
    assert torch.equal(made.embeddings[2:3], expected)
    small = Image.open(io.BytesIO(made.thumbnails[2]))
    assert (small.format, small.size) == ("JPEG", (48, 40))
    loaded = ReferenceSet.load(tmp_path / "set", Pixels(8))
    assert (loaded.names, loaded.captions, loaded.fingerprint) == (made.names, made.captions, made.fingerprint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "set.json", "set.safetensors"]
    assert str(tmp_path) not in (tmp_path / "set.json").read_text()


def test_thumbnails_are_no_larger_than_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.png": data(1, width=400, height=100)})
    made = build(source, tmp_path / "set", Grey(), BuildSettings(thumbnail_side=64))
    assert Image.open(io.BytesIO(made.thumbnails[0])).size == (64, 16)


def test_kohyas_folders_say_how_often_an_image_is_shown(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"10_cat/a.png": data(1), "10_cat/a.txt": "cat", "3_dog/b.png": data(2)})
    made = build(source, tmp_path / "set", Grey())
    assert dict(zip(made.names, made.duplicates.tolist(), strict=True)) == {"10_cat/a.png": 10, "3_dog/b.png": 3}
    assert "repeated as the folders' names say" in made.details["source"]
    ignored = build(source, tmp_path / "ignored", Grey(), BuildSettings(ignore_repeats=True))
    assert ignored.duplicates.tolist() == [1, 1]


def test_one_folder_of_another_name_and_numbers_are_only_names(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"10_cat/a.png": data(1), "dog/b.png": data(2)})
    assert build(source, tmp_path / "set", Grey()).duplicates.tolist() == [1, 1]


def test_broken_images_are_listed_and_skipped(tmp_path: Path) -> None:
    whole = data(1, width=200, height=200)
    files = {
        "a.png": data(2),
        "cut.png": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.png": "not an image",
        "long.png": data(3, width=6000, height=10),
        "gif.jpg": data(4, "GIF"),
    }
    made = build(write(tmp_path / "in", files), tmp_path / "set", Grey())
    assert made.names == ("a.png",)
    reasons = skipped(made)
    assert list(reasons) == ["cut.png", "empty.jpg", "gif.jpg", "long.png", "text.png"]
    assert reasons["cut.png"].startswith("broken: ")
    assert reasons["long.png"] == "6000 x 10 pixels: too long and narrow"
    for name in ("empty.jpg", "gif.jpg", "text.png"):
        assert reasons[name] == f"not an image of a known format ({', '.join(formats())})"
    assert skipped(ReferenceSet.load(tmp_path / "set")) == reasons


def test_an_image_for_which_the_network_gives_nan_is_skipped(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {f"{n}.png": data(n) for n in range(3)})
    mean = float(to_tensor(image(1)).mean())

    def encode(x: torch.Tensor) -> torch.Tensor:
        found = x.mean(dim=(2, 3))
        return found * (torch.nan if abs(float(x.mean()) - mean) < 1e-6 else 1)

    made = build(source, tmp_path / "set", HostVision(encode, "by hand"))
    assert made.names == ("0.png", "2.png")
    assert skipped(made) == {"1.png": "the feature network gives NaN or infinity for it"}


def test_a_file_that_cannot_be_read_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", {"a.png": data(1), "b.png": data(2)})
    real = os.open

    def refusing(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path).endswith("b.png"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refusing)
    assert skipped(build(source, tmp_path / "set", Grey())) == {"b.png": "cannot be read: Permission denied"}


def test_images_are_seen_as_trainers_see_them() -> None:
    """Turned as the EXIF data says; 16 bits come down to 8; grey and palette become RGB."""
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise for showing
    image(1).save(stream, "JPEG", exif=exif)
    assert open_image(stream.getvalue()).size == (40, 48)
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(stream, "PNG")
    assert np.asarray(open_image(stream.getvalue()))[0, :, 0].tolist() == [0, 100, 255]
    for mode in ("L", "P", "RGBA", "CMYK"):
        stream = io.BytesIO()
        image(1).convert(mode).save(stream, "JPEG" if mode == "CMYK" else "PNG")
        assert open_image(stream.getvalue()).mode == "RGB"


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices among files")
def test_what_is_no_regular_file_or_too_large_is_skipped_and_never_waited_for(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"good.png": data(1), "caption.png": data(2), "linked/x.txt": "not an image"})
    os.mkfifo(source / "pipe.png")
    (source / "zeros.png").symlink_to("/dev/zero")
    (source / "dangling.png").symlink_to("nowhere")
    (source / "loop.png").symlink_to("loop.png")
    (source / "link.png").symlink_to("good.png")
    (source / "folder.png").symlink_to("linked")
    for name in ("sparse.png", "caption.txt"):
        with (source / name).open("wb") as file:
            file.truncate(50 << 30)
    made = build(source, tmp_path / "set", Grey())
    assert (made.names, made.duplicates.tolist()) == (("good.png",), [2])
    not_regular = "cannot be read: it is a folder, a pipe or a device, not a regular file"
    assert skipped(made) == {
        "caption.png": "too large: 53,687,091,200 bytes, and at most 1,048,576 are read",
        "dangling.png": "cannot be read: No such file or directory",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "pipe.png": not_regular,
        "sparse.png": "too large: 53,687,091,200 bytes, and at most 268,435,456 are read",
        "zeros.png": not_regular,
    }


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A white PNG of one bit a pixel takes some kB, however large it is."""
    stream = io.BytesIO()
    Image.new("1", (9000, 9000), 1).save(stream, "PNG")
    assert PIXELS < 9000 * 9000 and len(stream.getvalue()) < 30_000
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(ImageError, match="too large: 9000 x 9000 pixels, and at most 67,108,864 are read"):
        open_image(stream.getvalue())


def test_absurd_repeats_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("99999999999999999999_cat", f"{REPEATS + 1}_cat"):
        source = write(tmp_path / name, {f"{name}/a.png": data(1)})
        with pytest.raises(ValueError, match=f"folder {name} asks for more than 10,000 repeats an epoch: rename it"):
            build(source, tmp_path / "set", Grey())
        ignored = build(source, tmp_path / f"set of {name}", Grey(), BuildSettings(ignore_repeats=True))
        assert ignored.duplicates.tolist() == [1]
    most = write(tmp_path / "most", {f"{REPEATS}_cat/a.png": data(1)})
    assert build(most, tmp_path / "most", Grey()).duplicates.tolist() == [REPEATS]


# ------------------------------------------------------------------------------- tar and Parquet


TAR = {
    "part/000.jpg": data(1, "JPEG"),
    "part/000.txt": "first",
    "part/000.json": '{"caption": "not this"}',
    "part/001.json": '{"status": "failed"}',
    "part/002.json": '{"caption": " third ", "url": "x"}',
    "part/002.png": data(2),
    "../../003.webp": data(3, "WEBP"),
    "/004.seg.png": data(9),
    "/004.png": data(4),
    "/004.txt": "fifth",
}


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_webdataset_tar(tmp_path: Path, ending: str) -> None:
    made = build(tar(tmp_path / f"a.{ending}", TAR), tmp_path / "set", Grey())
    assert made.names == tuple(f"a.{ending}/{n}" for n in ("part/000.jpg", "part/002.png", "003.webp", "004.png"))
    assert made.captions == ("first", "third", "", "fifth")
    ReferenceSet.load(tmp_path / "set")  # names are relative, whatever the tar says


def test_several_tars_of_a_folder_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        files = {f"{n:03d}.png": data(10 * number + n) for n in range(number + 1)}
        tar(tmp_path / "in" / f"{number}.tar", files)
    source = open_source(tmp_path / "in")
    names = [r.name for r in source.records()]
    assert names == ["0.tar/000.png", "1.tar/000.png", "1.tar/001.png"] + [f"2.tar/{n:03d}.png" for n in range(3)]
    assert source.count() == len(names)
    for start in range(len(names) + 1):
        assert [r.name for r in source.records(start)] == names[start:]


@pytest.mark.parametrize("damage", ["cut in an image", "cut in a header", "overwritten header", "cut gzip"])
def test_what_is_before_the_damage_of_a_tar_is_kept(tmp_path: Path, damage: str) -> None:
    path = tar(tmp_path / "a.tar", {f"{n}.png": data(n, width=40) for n in range(6)})
    raw = path.read_bytes()
    with tarfile.open(path) as archive:
        fourth = archive.getmembers()[3]
    if damage == "cut in an image":
        path.write_bytes(raw[: fourth.offset_data + 100])
    elif damage == "cut in a header":
        path.write_bytes(raw[: fourth.offset + 100])
    elif damage == "overwritten header":
        path.write_bytes(raw[: fourth.offset] + b"\xff" * 512 + raw[fourth.offset_data :])
    else:
        path = tmp_path / "a.tar.gz"
        squeezed = gzip.compress(raw)
        path.write_bytes(squeezed[: len(squeezed) * 2 // 3])
    source = open_source(path)
    records = list(source.records())
    assert source.count() == len(records)
    whole, last = records[:-1], records[-1]
    assert 1 <= len(whole) <= 4
    assert [r.data for r in whole] == [data(n, width=40) for n in range(len(whole))]
    assert "cannot be read from here on" in last.fault
    for start in range(len(records) + 1):
        assert [(r.name, r.fault) for r in source.records(start)] == [(r.name, r.fault) for r in records[start:]]


def lying_tar(path: Path, size: int, kind: bytes = tarfile.REGTYPE, name: str = "lies.png") -> Path:
    """Two good images, then a header that says its file is of this size, then another image."""
    path = tar(path, {"0.png": data(0), "1.png": data(1)})
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    good = path.read_bytes().rstrip(b"\0")
    good += b"\0" * (-len(good) % tarfile.BLOCKSIZE)
    later = tar(path.with_name("later"), {"2.png": data(2)}).read_bytes()
    path.write_bytes(good + member.tobuf(tarfile.GNU_FORMAT) + later)
    return path


@pytest.mark.parametrize("size", [2**62, 8 << 30, 300 << 20, -512, -(2**40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("packed", [False, True])
def test_what_a_tar_says_of_its_sizes_is_not_believed(tmp_path: Path, size: int, kind: bytes, packed: bool) -> None:
    path = lying_tar(tmp_path / "a.tar", size, kind)
    if packed:
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    source = open_source(path)
    *whole, last = source.records()
    assert source.count() == len(whole) + 1
    assert len(whole) >= 1 and [r.data for r in whole] == [data(n) for n in range(len(whole))]
    assert "cannot be read from here on" in last.fault and "\n" not in last.fault


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_member_that_is_too_large_is_skipped_and_the_others_are_read(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "IMAGE_BYTES", 30_000)
    files: dict[str, bytes | str] = {"0.png": data(0), "1.png": b"\0" * 30_001, "2.png": data(2), "2.txt": " " * 2**21}
    files.update(
        {"3.png": data(3), "3.json": json.dumps({"caption": "c" * (CAPTION_CHARACTERS + 1)}), "4.png": data(4)}
    )
    made = build(tar(tmp_path / f"a.{ending}", files), tmp_path / "set", Grey())
    assert made.names == (f"a.{ending}/0.png", f"a.{ending}/4.png")
    assert skipped(made) == {
        f"a.{ending}/1.png": "1.png: too large: 30,001 bytes, and at most 30,000 are read",
        f"a.{ending}/2.png": "2.txt: too large: 2,097,152 bytes, and at most 1,048,576 are read",
        f"a.{ending}/3.png": "3.json: its caption is too long: 100,001 characters, and at most 100,000 are read",
    }


def test_headers_within_headers_end_the_tar(tmp_path: Path) -> None:
    """The library reads each within the one before."""
    path = lying_tar(tmp_path / "a.tar", 0, tarfile.GNUTYPE_LONGNAME)
    raw = path.read_bytes()
    start = raw.index(b"lies.png")
    path.write_bytes(raw[:start] + raw[start : start + tarfile.BLOCKSIZE] * 5000 + raw[start:])
    good, last = open_source(path).records()
    assert good.data == data(0) and "cannot be read from here on" in last.fault


@pytest.mark.parametrize("raw", [b"", np.random.default_rng(0).bytes(5000), b"\x1f\x8b" + b"x" * 600])
def test_a_tar_that_is_none_is_told_on_one_line(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(ValueError, match=r"none of the 1 images can be used; the first, .*: the tar cannot") as caught:
        build(tmp_path / "a.tar", tmp_path / "set", Grey())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet(tmp_path: Path, form: str) -> None:
    images = [data(n) for n in range(5)]
    values: list[Any] = [None if n == 3 else p for n, p in enumerate(images)]
    if form == "struct":
        values = [{"bytes": v, "path": f"/somewhere/{n}.png"} for n, v in enumerate(values)]
    table = pa.table({"image": values, "text": ["a", None, "c", "d", "\n e"]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    made = build(tmp_path / "t.parquet", tmp_path / "set", Grey())
    assert made.names == tuple(f"t.parquet/row-{n}" for n in (0, 1, 2, 4))
    assert made.captions == ("a", "", "c", "e")
    assert "somewhere" not in (tmp_path / "set.json").read_text()
    assert skipped(made) == {"t.parquet/row-3": "the row holds no bytes of an image"}
    source = open_source(tmp_path / "t.parquet")
    for start in range(6):
        assert [r.name for r in source.records(start)] == [f"t.parquet/row-{n}" for n in range(start, 5)]


def test_parquet_columns_named_by_the_user(tmp_path: Path) -> None:
    pq.write_table(pa.table({"foto": [data(1)], "image": ["x"], "alt": ["an owl"]}), tmp_path / "t.parquet")
    wanted = BuildSettings(image_column="foto", caption_column="alt")
    assert build(tmp_path / "t.parquet", tmp_path / "set", Grey(), wanted).captions == ("an owl",)
    with pytest.raises(ValueError, match=r"no column 'x' among 'foto', 'image', 'alt': name the column"):
        open_source(tmp_path / "t.parquet", Reading(image_column="x"))
    with pytest.raises(ValueError, match=r"no column 'y' among"):
        open_source(tmp_path / "t.parquet", Reading(caption_column="y"))


def test_a_parquet_file_with_a_damaged_group_gives_the_others(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    values = [np.random.default_rng(n).bytes(3000) for n in range(6)]
    pq.write_table(pa.table({"image": values}), path, row_group_size=2, compression="zstd", use_dictionary=False)
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[place : place + 40] = b"\xff" * 40
    path.write_bytes(raw)
    records = list(open_source(path).records())
    assert [r.name for r in records] == [f"t.parquet/row-{n}" for n in range(6)]
    assert [bool(r.fault) for r in records] == [False, False, True, True, False, False]


def test_rows_of_a_parquet_file_that_cannot_be_used_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "IMAGE_BYTES", 30_000)
    captions = [b"good", b"\xff\xfe", b"c" * (CAPTION_CHARACTERS + 1), b"large", b"last"]
    text = pa.StringArray.from_buffers(
        len(captions),
        pa.py_buffer(np.cumsum([0, *map(len, captions)]).astype(np.int32).tobytes()),
        pa.py_buffer(b"".join(captions)),
    )
    images = [data(0), data(1), data(2), b"\0" * 30_001, data(4)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": images, "text": text}), tmp_path / "in" / "t.parquet")
    (tmp_path / "in" / "broken.parquet").write_bytes(b"PAR1" * 10)
    (tmp_path / "in" / "dangling.parquet").symlink_to("nowhere")
    made = build(tmp_path / "in", tmp_path / "set", Grey())
    assert made.captions == ("good", "last")
    reasons = skipped(made)
    assert list(reasons) == ["broken.parquet", "dangling.parquet", *(f"t.parquet/row-{n}" for n in (1, 2, 3))]
    assert reasons["broken.parquet"].startswith("not a sound Parquet file (")
    assert reasons["dangling.parquet"] == "cannot be read: No such file or directory"
    assert reasons["t.parquet/row-1"].startswith("the row cannot be read: 'utf-8' codec")
    assert reasons["t.parquet/row-2"].startswith("its caption is too long: 100,001 characters")
    assert reasons["t.parquet/row-3"] == "too large: 30,001 bytes, and at most 30,000 are read"


def test_a_parquet_file_is_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of a dictionary can stand in every row: together they would fill the memory."""
    pq.write_table(pa.table({"image": [b"x" * 1000] * 50}), tmp_path / "t.parquet")
    sizes: list[int] = []
    real = parquet._values
    monkeypatch.setattr(parquet, "_values", lambda row: (sizes.append(row.num_rows), real(row))[1])
    assert len(list(open_source(tmp_path / "t.parquet").records())) == 50
    assert sizes == [1] * 50


def test_a_parquet_file_of_too_many_rows_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS", 4)
    pq.write_table(pa.table({"image": [data(1)] * 5}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="it says that it holds 5 rows, and at most 4 are read"):
        open_source(tmp_path / "t.parquet")


@pytest.mark.parametrize("place", [4, 200, -200, -40, -9])
def test_a_parquet_file_with_flipped_bits_is_told_on_one_line(tmp_path: Path, place: int) -> None:
    pq.write_table(pa.table({"image": [data(n) for n in range(3)]}), tmp_path / "t.parquet", compression="zstd")
    raw = bytearray((tmp_path / "t.parquet").read_bytes())
    raw[place] ^= 0xFF
    (tmp_path / "t.parquet").write_bytes(raw)
    try:
        told = list(skipped(build(tmp_path / "t.parquet", tmp_path / "set", Grey())).values())
    except ValueError as error:
        told = [str(error)]
    assert all("\n" not in text for text in told)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no images"),
        ({"a.txt": "x"}, "holds no images"),
        ({"a.png": "x", "b.tar": "x"}, "holds 1 images and 1 tars files: name the folder or file"),
        ({"a.parquet": "x"}, "a.parquet: not a sound Parquet file"),
        ({"a.png": "x"}, "none of the 1 images can be used; the first, a.png: not an image"),
    ],
)
def test_sources_that_hold_nothing(tmp_path: Path, files: dict[str, bytes | str], sentence: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=sentence):
        build(write(tmp_path / "in", files), tmp_path / "set", Grey())


@pytest.mark.skipif(os.name == "nt", reason="no pipes among files")
def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    for name in ("a.tar", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="is a pipe or a device: name a folder"):
            open_source(tmp_path / name)


def test_sources_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder or file"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither a folder, nor a \.tar"):
        open_source(write(tmp_path, {"a.zip": "x"}) / "a.zip")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.png", "a/b.png"),
        ("../../etc/x.png", "etc/x.png"),
        ("/abs/x.png", "abs/x.png"),
        ("C:\\x\\..\\y.png", "x/y.png"),
        ("a/./b//c.png", "a/b/c.png"),
        ("..", "_"),
        ("pipe:rm x.png", "pipe:rm x.png"),
        ("half \ud800.png", "half ?.png"),
    ],
)
def test_names_lead_nowhere_else(name: str, expected: str) -> None:
    assert safe_name(name) == expected


# ---------------------------------------------------------------------------------------- counts


def test_exact_duplicates_share_a_row_and_are_counted(tmp_path: Path) -> None:
    """Equal bytes, and equal pixels in another format; another image of the same size is none."""
    stream = io.BytesIO()
    image(1).save(stream, "BMP")
    files = {
        "a.png": data(1),
        "b.png": data(1),
        "b.txt": "second caption",
        "c.bmp": stream.getvalue(),
        "c.txt": "third caption",
        "d.png": data(2),
    }
    made = build(write(tmp_path / "in", files), tmp_path / "set", Grey())
    assert made.names == ("a.png", "d.png")
    assert made.duplicates.tolist() == [3, 1]
    assert made.captions == ("second caption", "")  # the first there is
    assert made.details["copies"] == [
        {"name": "b.png", "caption": "second caption", "of": "a.png"},
        {"name": "c.bmp", "caption": "third caption", "of": "a.png"},
    ]


def test_near_duplicates_are_counted_above_the_threshold(tmp_path: Path) -> None:
    """Darker and slightly shifted copies are near, a negative is not; the second implementation is the full matrix."""
    images = np.stack([np.asarray(image(n)) for n in (1, 1, 1, 2, 3)]).astype(float)
    images[1] = images[1] * 0.7 + 10
    images[2] = np.roll(images[2], 1, axis=1)
    images[4] = 255 - images[3]
    files: dict[str, bytes | str] = {}
    for number, pixels in enumerate(images):
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
        files[f"{number}.png"] = stream.getvalue()
    made = build(write(tmp_path / "in", files), tmp_path / "set", Grey(), BuildSettings(near_threshold=0.9))
    batch = torch.cat([to_tensor(open_image(files[f"{n}.png"])) for n in range(5)])  # type: ignore[arg-type]
    expected = (grey_correlation(batch, batch) > 0.9).sum(1) - 1
    assert made.near_duplicates.tolist() == expected.tolist() == [2, 2, 2, 0, 0]
    assert made.near_threshold == 0.9


@pytest.mark.parametrize("elements", [1 << 25, 400])
def test_near_duplicates_by_the_normalised_distance(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "CHUNK_ELEMENTS", elements)
    rows = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
    reference = replace(bundled_of(Pixels(4)), embeddings=rows, **filler(120))
    e = rows.double().numpy()
    distance = np.sqrt(((e[:, None] - e[None]) ** 2).sum(2))
    similarity = -distance / (0.5 * np.sort(distance, axis=1)[:, :50].mean(1, keepdims=True))
    np.fill_diagonal(similarity, -np.inf)
    expected = (similarity > -0.9).sum(1)
    assert expected.max() > 0
    assert near_duplicates(reference, -0.9).tolist() == expected.tolist()


def filler(count: int) -> dict[str, Any]:
    text = tuple(str(n) for n in range(count))
    counts = torch.ones(count, dtype=torch.int64)
    return {
        "captions": text,
        "names": text,
        "duplicates": counts,
        "near_duplicates": counts,
        "thumbnails": [b""] * count,
    }


def bundled_of(features: Any) -> ReferenceSet:
    images = bundled.training_images()[:3]
    return from_images(images, ["a", "b", "c"], ["1", "2", "3"], features)


def test_near_duplicates_of_large_sets_are_not_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {f"{n}.png": data(n) for n in range(3)})
    made = build(source, tmp_path / "set", Grey(), BuildSettings(count_near_up_to=2))
    assert made.near_duplicates.tolist() == [-1, -1, -1]


def test_images_of_many_sizes_are_embedded_in_their_order() -> None:
    batch = [to_tensor(image(n, 30 + n % 3, 40)) for n in range(10)]
    for features in (Pixels(8), HostVision(lambda x: x.mean(dim=(2, 3)), "m")):
        expected = torch.cat([features(one) for one in batch])
        assert embed(features, iter(batch), batch_size=3).numpy() == pytest.approx(expected.numpy(), abs=1e-6)


# --------------------------------------------------------------------------------------- bundled


def test_the_bundled_models_own_set_finds_its_images() -> None:
    reference = bundled_reference()
    pairs = bundled.pairs()
    assert reference.captions == tuple(pair.caption for pair in pairs)
    assert reference.duplicates.tolist() == [pair.repetitions for pair in pairs]
    images = bundled.training_images()
    found = reference.search(Grey()(images), 2)
    matrix = grey_correlation(images, images)
    assert found.similarity[:, 0].tolist() == pytest.approx([1] * len(pairs), abs=1e-5)
    assert found.index[:, 0].tolist() == list(range(len(pairs)))
    matrix.fill_diagonal_(-2)
    assert found.similarity[:, 1].tolist() == pytest.approx(matrix.max(1).values.tolist(), abs=1e-5)
    assert reference.near_duplicates.tolist() == (matrix > 0.95).sum(1).tolist()


# --------------------------------------------------------------------------------------- stopping


class Killed(BaseException):
    """Stands for the process's end: nothing catches it."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eleven records in pieces of four, a broken one and exact duplicates over the borders of pieces among them."""
    files: dict[str, bytes | str] = {f"{n:02d}.png": data(n % 7, width=40 + n % 7) for n in range(11)}
    files["05.png"] = b"broken"
    files["03.txt"] = "three"
    return write(tmp_path / "in", files)


CHANGES = [
    (Path, "mkdir"),
    (Path, "write_bytes"),
    (Path, "write_text"),
    (Path, "replace"),
    (Path, "rename"),
    (shutil, "rmtree"),
    (kept_files, "save_file"),
]


def stopped_at(number: int, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> bool:
    """Whether the build was stopped: at its ``number``-th change on disk, before it (even) or after it (odd)."""
    seen, inside = 0, False

    def guarded(real: Any) -> Any:
        def change(*args: Any, **more: Any) -> Any:
            nonlocal seen, inside
            if inside:  # mkdir makes parents by calling itself
                return real(*args, **more)
            if seen == number:
                raise Killed
            inside = True
            found = real(*args, **more)
            inside = False
            seen += 2
            if seen == number + 1:
                raise Killed
            return found

        return change

    with monkeypatch.context() as patched:
        for holder, name in CHANGES:
            patched.setattr(holder, name, guarded(getattr(holder, name)))
        try:
            build(*arguments)
        except Killed:
            return True
    return False


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_build_stopped_at_any_point_comes_to_the_same_files(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PIECE", 4)
    build(source, tmp_path / "whole" / "set", Grey())
    expected = contents(tmp_path / "whole")
    assert set(expected) == {"set.json", "set.safetensors"}
    number = 0
    while stopped_at(number, monkeypatch, source, tmp_path / str(number) / "set", Grey()):
        build(source, tmp_path / str(number) / "set", Grey())
        assert contents(tmp_path / str(number)) == expected, f"stopped at change {number}"
        number += 1
    assert number > 30  # three pieces, two files, folders: the test saw the disk change


def test_a_build_stopped_again_and_again_comes_to_an_end(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time after a few more pieces, never after fewer changes than putting the set together takes."""
    monkeypatch.setattr(building, "PIECE", 1)
    times = 0
    while stopped_at(20, monkeypatch, source, tmp_path / "out" / "set", Grey()):
        times += 1
        assert times < 20
    build(source, tmp_path / "whole" / "set", Grey())
    assert times >= 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_done_is_not_embedded_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PIECE", 4)
    seen: list[int] = []

    def encode(x: torch.Tensor) -> torch.Tensor:
        if len(seen) == 6:
            seen.append(0)
            raise Killed
        seen.append(1)
        return x.mean(dim=(2, 3))

    features = HostVision(encode, "counted")
    with pytest.raises(Killed):
        build(source, tmp_path / "set", features)
    build(source, tmp_path / "set", features)
    # 4 of the first piece, 2 of the second (one is broken) and the stop; then the rest: 3 and 3.
    assert len(seen) == 7 + 6


def test_a_piece_that_was_half_written_is_made_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "PIECE", 4)
    build(source, tmp_path / "whole" / "set", Grey())
    assert stopped_at(20, monkeypatch, source, tmp_path / "out" / "set", Grey())
    pieces = sorted((tmp_path / "out").rglob("0*.safetensors"))
    assert pieces
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:50])
    build(source, tmp_path / "out" / "set", Grey())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def slow_build(source: Path, out: Path) -> subprocess.Popen[bytes]:
    code = (
        "import sys, time, pathlib; from sd_dejavu.reference import build as b, features as f; b.PIECE = 4\n"
        "class Slow(f.Grey):\n"
        "    def embed(self, x): time.sleep(0.05); return super().embed(x)\n"
        "b.build(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), Slow(), batch_size=1)"
    )
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code, source, out], env={**os.environ, "PYTHONPATH": paths})


def test_a_process_that_is_really_killed(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PIECE", 4)
    out = tmp_path / "out" / "set"
    chance = random.Random(1)
    for _ in range(2):
        process = slow_build(source, out)
        before = len(list(tmp_path.rglob("0*.safetensors")))
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("0*.safetensors"))) == before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    build(source, out, Grey(), batch_size=1)
    build(source, tmp_path / "whole" / "set", Grey(), batch_size=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def unfinished(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(building, "PIECE", 4)
    assert stopped_at(10, monkeypatch, source, tmp_path / "set", Grey())
    return tmp_path / "set"


def test_an_unfinished_build_is_not_gone_on_with_in_another_way(source: Path, unfinished: Path) -> None:
    with pytest.raises(
        ValueError, match="unfinished build with another features and another metric and near threshold"
    ):
        build(source, unfinished, Pixels())
    with pytest.raises(ValueError, match="with thumbnail side 128 instead of 64"):
        build(source, unfinished, Grey(), BuildSettings(thumbnail_side=64))
    (source / "03.txt").write_text("another caption")
    with pytest.raises(ValueError, match="with another source: go on as it was begun, or give --restart"):
        build(source, unfinished, Grey())
    assert "another caption" in build(source, unfinished, Grey(), restart=True).captions


@pytest.mark.parametrize("text", ["null", "[]", "[" * 100_000, "{"])
def test_a_damaged_note_of_an_unfinished_build_is_refused(source: Path, unfinished: Path, text: str) -> None:
    note = unfinished.with_name("set.refset-unfinished") / "begun.json"
    note.write_text(text)
    with pytest.raises(ValueError, match=r"begun\.json is damaged \(.*\): give --restart"):
        build(source, unfinished, Grey())
    assert len(build(source, unfinished, Grey(), restart=True)) == 6


def test_a_piece_of_another_shape_is_made_again(source: Path, unfinished: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, unfinished.with_name("set.refset-unfinished") / "00000000.safetensors")
    build(source, unfinished, Grey())
    build(source, tmp_path / "whole" / "set", Grey())
    assert (tmp_path / "set.json").read_bytes() == (tmp_path / "whole" / "set.json").read_bytes()


def test_a_finished_set_is_left_alone(tmp_path: Path, source: Path) -> None:
    first = build(source, tmp_path / "set", Grey())
    before = (tmp_path / "set.json").stat().st_mtime_ns
    assert build(source, tmp_path / "set", Grey()).fingerprint == first.fingerprint
    assert (tmp_path / "set.json").stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"set\.json is there already, made from another source or with other settings"
    ):
        build(source, tmp_path / "set", Pixels())
    assert build(source, tmp_path / "set", Pixels(), restart=True).features == "pixels 32"


def test_a_users_folder_of_that_name_is_not_taken_for_a_build(tmp_path: Path, source: Path) -> None:
    mine = write(tmp_path / "set.refset-unfinished", {"letter.txt": "dear"})
    with pytest.raises(ValueError, match="is not an unfinished build: move it away"):
        build(source, tmp_path / "set", Grey())
    assert (mine / "letter.txt").read_text() == "dear"


def test_progress_is_told(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PIECE", 4)
    told: list[tuple[str, int, int]] = []
    build(source, tmp_path / "set", Grey(), on_progress=lambda *step: told.append(step))
    assert told == [("embedding", n, 11) for n in (0, 4, 8, 11)] + [("near duplicates", 6, 6)]


def test_no_pickle_and_no_path_in_the_files(tmp_path: Path, source: Path) -> None:
    build(source, tmp_path / "set", Grey())
    head = (tmp_path / "set.safetensors").read_bytes()
    names = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
    assert set(names) == {
        "__metadata__",
        "embeddings",
        "duplicates",
        "near_duplicates",
        "thumbnails",
        "thumbnail_ends",
    }
    for file in ("set.safetensors", "set.json"):
        assert str(tmp_path).encode() not in (tmp_path / file).read_bytes()


def test_an_image_with_a_huge_size_in_its_header_is_refused() -> None:
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""
    raw = bytearray(data(1))
    raw[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="too large: more than 67,108,864 pixels"):
        open_image(bytes(raw))
