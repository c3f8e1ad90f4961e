"""``sd-dejavu refset`` as a user meets it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from test_reference_build import data, write

from sd_dejavu.cli.main import main
from sd_dejavu.demo import bundled
from sd_dejavu.reference.build import only_writer
from sd_dejavu.reference.reference_set import ReferenceSet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files: dict[str, bytes | str] = {f"{n}.png": data(n) for n in range(6)}
    files.update({"3.txt": "a [bold] mill", "copy of 3.png": data(3), "broken.png": "x"})
    return write(tmp_path / "images", files)


def answer(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_build_and_search_a_folder(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    assert main(["refset", "build", str(folder), out, "--features", "grey", "--json"]) == 0
    (summary,) = answer(capsys)
    assert (summary["images"], summary["shown_in_an_epoch"], summary["with_duplicates"]) == (6, 7, 1)
    assert [s["name"] for s in summary["skipped"]] == ["broken.png"]
    assert main(["refset", "search", out, str(folder / "copy of 3.png"), str(folder / "5.png"), "--json"]) == 0
    third, fifth = answer(capsys)
    assert third["copy"] is True
    assert third["neighbours"][0] == {
        "name": "3.png",
        "caption": "a [bold] mill",
        "similarity": pytest.approx(1, abs=1e-5),
        "duplicates": 2,
        "near_duplicates": 0,
    }
    assert len(third["neighbours"]) == 5
    assert fifth["neighbours"][0]["name"] == "5.png"


def test_what_is_printed(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    assert main(["refset", "build", str(folder), out, "--features", "grey"]) == 0
    printed = capsys.readouterr()
    assert "6 different images, 1 with a caption, 7 shown in an epoch" in printed.out
    assert "Left out: 1 image that could not be read:\n  broken.png: not an image of a known format" in printed.err
    assert main(["refset", "search", out, str(folder / "3.png"), "--count", "1"]) == 0
    printed = capsys.readouterr()
    assert "a copy" in printed.out
    assert "[bold]" in printed.out


def test_what_is_printed_of_a_trainers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, bytes | str] = {f"2_fox/{n}.png": data(n) for n in range(3)}
    files |= {"2_fox/0.txt": "a fox\nred", "2_fox/1.txt": "a fox\ngrey", "2_fox/0-masklabel.png": data(3)}
    folder, out = str(write(tmp_path / "images", {**files, "cover.png": data(4)})), str(tmp_path / "set")
    assert main(["refset", "build", folder, out, "--features", "grey"]) == 0
    printed = capsys.readouterr()
    assert "read as kohya's trainer reads it (guessed from its numbered folders)" in printed.out
    assert "3 different images, 3 with a caption, 6 shown in an epoch" in printed.out
    assert "2 images: only the first line of its caption is read, as the trainer does\n" in printed.out
    assert printed.err.startswith(
        "Left out: 1 mask, 1 image beside the numbered folders:\n  2_fox/0-masklabel.png: a mask"
    )
    assert main(["refset", "build", folder, out, "--restart", "--trainer", "plain", "--json"]) == 0
    (summary,) = answer(capsys)
    assert (summary["images"], summary["shown_in_an_epoch"]) == (4, 4)
    assert main(["refset", "build", folder, out, "--trainer-config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err


def test_the_bundled_models_copies_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    assert main(["refset", "build", "bundled", out, "--features", "grey"]) == 0
    number = 20
    eights = (bundled.training_images()[number] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(eights).save(tmp_path / "copy.jpg", quality=60)
    capsys.readouterr()
    for more in ([], ["--qdrant", "-"], ["--qdrant", str(tmp_path / "elsewhere")]):
        assert main(["refset", "search", out, str(tmp_path / "copy.jpg"), "--json", "--count", "3", *more]) == 0
        (row,) = answer(capsys)
        assert (row["copy"], row["threshold"]) == (True, 0.8)
        assert row["neighbours"][0]["caption"] == bundled.pairs()[number].caption
        assert row["neighbours"][0]["duplicates"] == bundled.pairs()[number].repetitions
    assert (tmp_path / "set.qdrant").is_dir()
    assert main(["refset", "build", "bundled", out]) == 2
    assert "is there already" in capsys.readouterr().err


def test_copies_of_parts_are_found_with_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    assert main(["refset", "build", "bundled", out, "--features", "grey"]) == 0
    eights = (bundled.training_images()[20] * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(eights[16:48, :32]).resize((256, 256), Image.Resampling.BICUBIC).save(tmp_path / "crop.png")
    Image.fromarray(eights[:, ::-1]).save(tmp_path / "mirrored.png")
    capsys.readouterr()
    images = [str(tmp_path / name) for name in ("crop.png", "mirrored.png")]
    assert main(["refset", "search", out, *images, "--json", "--parts"]) == 0
    crop, mirrored = answer(capsys)
    assert crop["copy"] is mirrored["copy"] is False
    assert (crop["part"]["copy"], crop["part"]["name"], crop["part"]["box"]) == (True, "pair-021", [0, 0, 1, 1])
    assert crop["part"]["of_box"] == [0, 0.25, 0.5, 0.75] and mirrored["part"]["mirrored"] is True
    assert main(["refset", "search", out, images[1], "--parts"]) == 0
    assert "A copy of a part:" in capsys.readouterr().out
    assert main(["refset", "search", out, images[1], "--json", "--parts", "--threshold", "1.01"]) == 0
    assert answer(capsys)[0]["part"]["copy"] is False


def test_small_sets_get_no_verdict_from_the_normalised_distance(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--side", "16"])
    capsys.readouterr()
    main(["refset", "search", out, str(folder / "1.png"), "--json"])
    (row,) = answer(capsys)
    assert row["features"] == "pixels 16"
    assert row["copy"] is None
    assert "a set of 6 images is too small" in row["why"]
    assert row["neighbours"][0]["similarity"] == 0
    assert main(["refset", "search", out, str(folder / "1.png"), "--parts"]) == 2
    assert "parts are not compared by pixels 16" in capsys.readouterr().err


def test_weights_are_named_again_and_checked(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Means(torch.nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.power = power

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.mean(dim=(2, 3)), (x.abs() ** self.power).mean(dim=(2, 3))], 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for power in (2.0, 3.0):
            torch.jit.save(torch.jit.script(Means(power)), str(tmp_path / f"{power:g}.pt"))
    out, right, wrong = str(tmp_path / "set"), str(tmp_path / "2.pt"), str(tmp_path / "3.pt")
    assert main(["refset", "build", str(folder), out, "--features", "sscd", "--weights", right]) == 0
    assert str(tmp_path) not in (tmp_path / "set.json").read_text()
    search = ["refset", "search", out, str(folder / "1.png"), "--json"]
    assert main([*search, "--weights", right]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert json.loads(row)["copy"] is True
    assert main([*search, "--weights", wrong]) == 2
    assert "made with the features 'sscd 288" in capsys.readouterr().err
    assert main(search) == 2
    assert "name them with --weights" in capsys.readouterr().err


def test_a_threshold_of_the_users_own(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--features", "grey"])
    capsys.readouterr()
    Image.open(folder / "1.png").rotate(180).save(tmp_path / "turned.png")
    verdicts = []
    for threshold in ("0.99", "-1"):
        main(["refset", "search", out, str(tmp_path / "turned.png"), "--json", "--threshold", threshold])
        verdicts.append(answer(capsys)[0]["copy"])
    assert verdicts == [False, True]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["build", "nowhere", "set"], "there is no folder or file nowhere"),
        (["build", "nowhere", "set", "--features", "sscd"], "name them with --weights"),
        (["build", "nowhere", "set", "--side", "1"], "side must be at least 4"),
        (["build", "nowhere", "set", "--device", "abacus"], "the device 'abacus' cannot be used here"),
        (["build", "nowhere", "set", "--device", "meta"], "the device 'meta' cannot be used here"),
        (["search", "nowhere", "a.png"], "cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["refset", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_query_that_is_no_image(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--features", "grey"])
    assert main(["refset", "search", out, str(folder / "broken.png")]) == 2
    assert "broken.png cannot be used: not an image" in capsys.readouterr().err
    assert main(["refset", "search", out, str(folder / "missing.png")]) == 2
    assert "missing.png: cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["nan", "inf", "-inf"])
def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path, folder: Path, threshold: str, capsys: Any) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--features", "grey"])
    assert main(["refset", "search", out, str(folder / "1.png"), f"--threshold={threshold}"]) == 2
    assert f"the threshold of a copy must be a finite number, not {threshold}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "made_with", [{"features": ["grey"]}, {"features": "grey", "side": "x"}, {"features": "grey", "hue": 1}]
)
def test_a_set_made_with_what_cannot_be_is_refused(
    tmp_path: Path, folder: Path, made_with: dict[str, Any], capsys: Any
) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--features", "grey"])
    document = json.loads((tmp_path / "set.json").read_text())
    document["details"]["made_with"] = made_with
    (tmp_path / "set.json").write_text(json.dumps(document))
    assert main(["refset", "search", out, str(folder / "1.png")]) == 2
    assert "the reference set is damaged (made with: " in capsys.readouterr().err


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SafetensorError("Os { code: 28 }")])
def test_a_full_disk_is_told(
    tmp_path: Path, folder: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*arguments: Any) -> None:
        raise fault

    monkeypatch.setattr("sd_dejavu.kept.files.save_file", full)
    out = tmp_path / "set"
    assert main(["refset", "build", str(folder), str(out), "--features", "grey"]) == 2
    assert "00000000.safetensors cannot be written: " in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["refset", "build", str(folder), str(out), "--features", "grey"]) == 0


def test_a_second_process_is_told_who_builds_the_set(tmp_path: Path, folder: Path, capsys: Any) -> None:
    out = tmp_path / "set"
    for source in (str(folder), "bundled"):
        with only_writer(out):
            assert main(["refset", "build", source, str(out), "--features", "grey"]) == 2
        assert f"{out} is being written to by process {os.getpid()} on " in capsys.readouterr().err
    assert main(["refset", "build", str(folder), str(out), "--features", "grey"]) == 0


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices among files")
def test_a_query_that_never_ends(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--features", "grey"])
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("/dev/zero", str(tmp_path / "pipe.png")):
        assert main(["refset", "search", out, path]) == 2
        assert f"{path}: cannot be read: it is a folder, a pipe or a device" in capsys.readouterr().err


def test_a_set_that_does_not_say_how_it_was_made(tmp_path: Path, folder: Path, capsys: Any) -> None:
    out = str(tmp_path / "set")
    main(["refset", "build", str(folder), out, "--features", "grey"])
    loaded = ReferenceSet.load(tmp_path / "set")
    loaded.details["made_with"] = {}
    loaded.save(tmp_path / "set")
    assert main(["refset", "search", out, str(folder / "1.png")]) == 2
    assert "does not say how to make its features" in capsys.readouterr().err
