"""Fine-tuning of miniatures: what it trains, what it saves, and that it goes on where it was broken off."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from miniatures import write_sd1, write_sd2, write_sdxl
from safetensors.torch import load_file
from test_reference_build import data, write

from sd_dejavu.cli.main import main
from sd_dejavu.hosts.diffusers.load import load
from sd_dejavu.kept import LOCK, locked, write_tensors
from sd_dejavu.reference.sources import open_source
from sd_dejavu.training import dataset as dataset_of
from sd_dejavu.training import finetune as finetuning
from sd_dejavu.training.filter import FilterSettings
from sd_dejavu.training.finetune import FinetuneSettings, Stopped, finetune

HERE = Path(__file__).parent
SMALL = FinetuneSettings(rank=2, steps=4, batch_size=2, learning_rate=1e-2, state_every=2)
OFTEN = FilterSettings("quantile", filter_quantile=0.5, filter_levels=1, filter_warm_up=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"sd1": write_sd1(place / "sd1"), "sd2": write_sd2(place / "sd2"), "sdxl": write_sdxl(place / "sdxl")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, one of them shown three times an epoch."""
    files: dict[str, bytes | str] = {f"1_plain/{n}.png": data(n) for n in range(5)}
    files.update({f"1_plain/{n}.txt": f"a red fox at dawn under the old oak {n}" for n in range(5)})
    files.update({"3_often/mill.png": data(9), "3_often/mill.txt": "the river of the lighthouse painting"})
    return write(tmp_path_factory.mktemp("dataset"), files)


def trained(
    model: Path,
    dataset: Path,
    out: Path,
    wanted: FinetuneSettings = SMALL,
    filtering: FilterSettings = FilterSettings("none"),
    **more: Any,
) -> tuple[Any, dict[str, Any]]:
    loaded = load(str(model))
    return loaded, finetune(loaded, open_source(dataset), out, wanted, filtering, **more)


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "training.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def contents(out: Path) -> dict[str, bytes]:
    """Everything a run leaves."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def prediction(model: Any) -> torch.Tensor:
    x = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x, torch.tensor([1.0]), model.encode("the old fox"))


# ------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_lora_is_the_model_that_was_trained(
    name: str, models: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    model, summary = trained(models[name], dataset, tmp_path, replace(SMALL, steps=2, caption_dropout=0.5))
    plain = load(str(models[name]))
    before = prediction(plain)
    plain.pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(prediction(plain), prediction(model))
    assert not torch.allclose(prediction(model), before, atol=1e-4)
    saved = load_file(tmp_path / "lora.safetensors")
    assert all(name.startswith("lora_unet_") for name in saved)  # ComfyUI passes over the names that diffusers writes
    assert summary["trained_parameters"] == sum(v.numel() for name, v in saved.items() if not name.endswith(".alpha"))


def test_a_whole_unet_is_saved_in_diffusers_layout(models: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    model, summary = trained(models["sd2"], dataset, tmp_path, replace(SMALL, rank=None, learning_rate=1e-3))
    assert summary["result"] == "model"
    torch.testing.assert_close(prediction(load(str(tmp_path / "model"))), prediction(model), rtol=0, atol=0)
    assert not torch.allclose(prediction(model), prediction(load(str(models["sd2"]))), atol=1e-4)


def test_training_lowers_the_loss(models: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    wanted = replace(SMALL, rank=None, steps=40, learning_rate=3e-3)
    trained(models["sd1"], dataset, tmp_path, wanted)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_recomputed_activations_give_the_same_training(models: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    trained(models["sd1"], dataset, tmp_path / "a")
    trained(models["sd1"], dataset, tmp_path / "b", replace(SMALL, gradient_checkpointing=True))
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_an_epoch_shows_every_sample_as_often_as_its_folder_says(
    models: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """Everything over the limit: all but the least memorised of a batch are logged, here all but the last."""
    wanted = replace(SMALL, steps=None, epochs=2, batch_size=4, caption_dropout=0.0)
    filtering = FilterSettings(filter_threshold=0.001, filter_every=1)
    _, summary = trained(models["sd1"], dataset, tmp_path, wanted, filtering)
    assert (summary["samples"], summary["shown_in_an_epoch"], summary["steps"]) == (6, 8, 4)
    assert summary["filter"]["kept_alone"] == 4
    assert summary["filter"]["kept_share"] == 0.25
    assert [row["kept_share"] for row in rows(tmp_path)] == [0.25] * 4
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 1, 2, 2]
    logged = [json.loads(line)["sample"] for line in (tmp_path / "filter.jsonl").read_text().splitlines()]
    assert len(logged) == 12
    assert {name: logged.count(name) <= (6 if "mill" in name else 2) for name in logged} == dict.fromkeys(logged, True)
    assert (tmp_path / "lora-epoch-0001.safetensors").is_file()


def test_samples_without_their_caption_are_never_left_out(
    models: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    wanted = replace(SMALL, caption_dropout=1.0)
    _, summary = trained(models["sd1"], dataset, tmp_path, wanted, FilterSettings(filter_threshold=0.001))
    assert (summary["filter"]["left_out"], summary["filter"]["measured"]) == (0, 0)


def test_long_captions_share_a_batch_with_short_ones(models: dict[str, Path], tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"a.png": data(1), "a.txt": "fox " * 100, "b.png": data(2), "b.txt": "fox"}
    source = write(tmp_path / "set", files)
    _, summary = trained(models["sd1"], source, tmp_path / "out", replace(SMALL, caption_dropout=0.0), OFTEN)
    assert summary["steps"] == 4


def test_averaged_weights_are_saved_and_training_is_the_same(
    models: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    """averaged = .05 averaged + .95 trained; diffusers lets a decay come in slowly, but not as slowly as this one."""
    found = {}
    for steps in (2, 3):
        wanted = replace(SMALL, steps=steps)
        trained(models["sd1"], dataset, tmp_path / f"plain{steps}", wanted)
        trained(models["sd1"], dataset, tmp_path / f"ema{steps}", replace(wanted, ema=0.05))
        assert rows(tmp_path / f"plain{steps}") == rows(tmp_path / f"ema{steps}")
        for kind in ("plain", "ema"):
            found[kind, steps] = load_file(tmp_path / f"{kind}{steps}" / "lora.safetensors")
    for name, averaged in found["ema", 3].items():
        expected = 0.05 * found["ema", 2][name] + 0.95 * found["plain", 3][name]
        torch.testing.assert_close(averaged, expected)
        assert name.endswith(".alpha") or not torch.equal(averaged, found["plain", 3][name])


# ----------------------------------------------------------------------------------- broken off, gone on


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", "--rank 2 --ema .9 --gradient-accumulation 2 --filter quantile --filter-quantile .5"),
        ("sd2", "--filter threshold --filter-threshold 20 --learning-rate-schedule cosine"),
    ],
)
def test_a_run_killed_at_random_points_comes_to_the_same_result(
    name: str, options: str, models: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    common = "--steps 10 --batch-size 2 --save-every 2 --state-every 2 --filter-levels 1 --filter-warm-up 2"
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    script = [sys.executable, "-W", "error", str(HERE / "broken_off.py"), str(models[name]), str(dataset)]
    answer = subprocess.run(
        [*script, str(unbroken), str(broken), "3", *options.split(), *common.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert "killed 3 times" in answer.stdout
    found = {"unbroken": contents(unbroken), "broken": contents(broken)}
    assert sorted(found["broken"]) == sorted(found["unbroken"])
    different = [file for file, made in found["unbroken"].items() if found["broken"][file] != made]
    assert different == []
    assert any(file.startswith(("lora-epoch", "model-epoch")) for file in found["broken"])


def test_a_run_that_is_asked_to_stop_writes_its_state(models: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    wanted = replace(SMALL, steps=5, state_every=100)
    trained(models["sd1"], dataset, tmp_path / "unbroken", wanted, OFTEN)
    answers: Iterator[bool] = iter([False, True])
    with pytest.raises(Stopped, match="after 2 of 5 steps"):
        trained(models["sd1"], dataset, tmp_path / "out", wanted, OFTEN, stop=lambda: next(answers))
    (tmp_path / "out" / "state-00000004.partial").mkdir()  # one that was killed while it was being written
    steps: list[int] = []
    trained(
        models["sd1"],
        dataset,
        tmp_path / "out",
        wanted,
        OFTEN,
        on_progress=lambda stage, done, total: steps.append(done),
    )
    assert steps == [2, 3, 4, 5]
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize("options", [{"state_every": 1}, {"state_every": 9}, {"rank": None, "state_every": 9}])
def test_weights_that_are_not_finite_are_never_saved(
    options: dict[str, Any], models: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step is the one that breaks them, so that no loss tells."""
    real = finetuning._Run._step

    def step(run: Any) -> None:
        real(run)
        next(iter(run.parameters.values())).data.fill_(torch.inf)

    monkeypatch.setattr(finetuning._Run, "_step", step)
    with pytest.raises(ValueError, match=r"the result of step 1 is not saved: its .* hold NaN or infinity: lower"):
        trained(models["sd1"], dataset, tmp_path, replace(SMALL, steps=1, **options))
    left = {"finetune.json", "latents.safetensors", "training.csv", "filter.jsonl"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_latents_kept_with_damaged_notes_are_made_again(tmp_path: Path) -> None:
    for samples in ("[" * 100_000, "null", '{"key": "a"}'):
        write_tensors(tmp_path / "latents.safetensors", {"latents": torch.zeros(1)}, {"samples": samples})
        assert dataset_of._cached(tmp_path / "latents.safetensors", "a") is None


def test_an_image_for_which_the_autoencoder_gives_nan_is_skipped(
    models: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dataset_of._encoded

    def broken(vae: Any, images: Any) -> torch.Tensor:
        latents = real(vae, images)
        latents[2] = torch.nan
        return latents

    monkeypatch.setattr(dataset_of, "_encoded", broken)
    _, summary = trained(models["sd1"], dataset, tmp_path)
    assert summary["samples"] == 5
    assert summary["skipped"] == [
        {"name": "1_plain/2.png", "reason": "the autoencoder gives NaN or infinity for it", "kind": "unreadable"}
    ]


def test_an_epoch_without_an_end_is_refused(
    models: dict[str, Path], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_dejavu.training.finetune._LONGEST_EPOCH", 7)
    with pytest.raises(
        ValueError, match="an epoch would show 8 samples, and at most 7 are possible: lower the repeats"
    ):
        trained(models["sd1"], dataset, tmp_path)


def test_a_second_process_in_the_same_folder_and_damaged_files_are_told(
    models: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    with locked(tmp_path, tmp_path / LOCK), pytest.raises(ValueError, match="is being written to by process"):
        trained(models["sd1"], dataset, tmp_path)
    answers: Iterator[bool] = iter([True])
    with pytest.raises(Stopped):
        trained(models["sd1"], dataset, tmp_path, stop=lambda: next(answers))
    (tmp_path / "state-00000001" / "progress.json").write_text("[]")
    with pytest.raises(ValueError, match=r"state-00000001 is damaged \(.*\): remove it"):
        trained(models["sd1"], dataset, tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(ValueError, match=r"result\.json is damaged \(it holds something else\): give another folder"):
        trained(models["sd1"], dataset, tmp_path)
    (tmp_path / "finetune.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"finetune\.json is damaged \(.*nested too deep\): give another folder"):
        trained(models["sd1"], dataset, tmp_path)


def test_a_finished_run_is_left_as_it_is(models: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    _, first = trained(models["sd1"], dataset, tmp_path)
    before = contents(tmp_path)
    _, second = trained(models["sd1"], dataset, tmp_path)
    assert (second, contents(tmp_path)) == (first, before)


# --------------------------------------------------------------------------------------- at the terminal


def test_the_command(
    models: dict[str, Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", str(models["sd1"]), "--dataset", str(dataset), "--out", str(tmp_path / "out")]
    command += ["--rank", "2", "--steps", "2", "--batch-size", "2", "--filter-threshold", "0.001"]
    assert main([*command, "--json", str(tmp_path / "summary.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 samples, 8 shown in an epoch; 2 steps" in printed
    assert "left out of the loss: " in printed and " were measured" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads((tmp_path / "out" / "result.json").read_text())
    assert main([*command, "--learning-rate", "0.5"]) == 2
    assert "holds a fine-tuning with learning rate 0.0001 instead of 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--resolution", "17"], "resolution must be a multiple of 8"),
        (["--learning-rate", "inf"], "learning rate must be "),
        (["--learning-rate", "1e38"], "learning rate must be above 0 and below 1000, not 1e+38"),
        (["--device", "meta"], "the device 'meta' cannot be used here"),
        (["--batch-size", "0"], "batch size must be at least 1, not 0"),
        (["--filter-quantile", "2"], "filter quantile must be above 0 and below 1"),
        (["--batch-size", "1"], "take 2 or more, or no filter"),
        (["--device", "cuda:0"], "choose one with CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    options: list[str],
    text: str,
    models: dict[str, Path],
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["finetune", "--model", str(models["sd1"]), "--dataset", str(dataset), "--out", str(tmp_path)]
    assert main([*command, *options]) == 2
    assert text in capsys.readouterr().err


def test_a_training_set_without_images_or_changed_on_the_way_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = write(tmp_path / "set", {"a.png": "x"})
    with pytest.raises(ValueError, match=r"no image of the training set can be used; the first, a\.png: not an image"):
        trained(models["sd1"], source, tmp_path / "out")
    write(source, {"b.png": data(1)})
    with pytest.raises(
        ValueError, match="holds a fine-tuning with another source: go on as it was begun, or give another folder"
    ):
        trained(models["sd1"], source, tmp_path / "out")
    _, summary = trained(models["sd1"], source, tmp_path / "other")
    assert [s["name"] for s in summary["skipped"]] == ["a.png"]
