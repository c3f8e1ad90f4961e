"""What works on this machine: the lines say what is there, and what is missing, with one thing to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_dejavu import doctor
from sd_dejavu.cli.main import main
from sd_dejavu.doctor import Finding


def found(name: str) -> Finding:
    return next(line for line in doctor.findings() if line.name == name)


def test_a_sound_machine_is_sound() -> None:
    lines = {line.name: line for line in doctor.findings()}
    assert lines["torch"] == Finding("torch", torch.__version__, True)
    assert lines["cpu, float32"].works and "gradients in" in lines["cpu, float32"].value
    assert lines["Python"].works is None


def test_a_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None if name in ("peft", "safetensors") else object())
    assert found("peft") == Finding(
        "peft", "not installed", None, "for training LoRAs: pip install 'sd-dejavu[finetune]'"
    )
    assert found("safetensors").works is False and found("safetensors").advice.endswith("pip install safetensors")


def test_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda device: 3 * doctor.GIB)
    assert found("cpu").works is False and "3.0 GiB free" in found("cpu").value
    monkeypatch.setattr(doctor, "free_memory", lambda device: None)
    assert found("cpu").works is True and "GiB" not in found("cpu").value


def test_wrong_and_missing_gradients_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **options: Any) -> None:
        raise RuntimeError("not implemented for 'Half'\nlong trace")

    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **options: (torch.zeros(64, 64),))
    assert found("cpu, float32") == Finding("cpu, float32", "gradients are wrong", False, "choose another precision")
    monkeypatch.setattr(torch.autograd, "grad", refused)
    assert found("cpu, float16").value == "not implemented for 'Half' long trace"


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "user_folder", lambda: tmp_path)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "one.json").write_text("{}")
    assert found("calibrations") == Finding("calibrations", f"1 kept in {tmp_path / 'calibration'}", True)
    monkeypatch.setattr(doctor.os, "access", lambda place, how: False)
    assert found("calibrations").works is False and "cannot be written to" in found("calibrations").advice


def test_the_command_measures_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["name"] == "the bundled model" and lines[-1]["works"] is True
    assert status == (0 if all(line["works"] is not False for line in lines) else 4)


def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:99"]) == 4
    told = capsys.readouterr().out
    assert "fails the bundled model: device 'cuda:99' was asked for" in told
    first = told.splitlines()[0]
    assert " not work here: " in first and first.endswith("the bundled model.")


def test_the_first_line_says_whether_all_works() -> None:
    sound = [Finding("torch", "2.1", True), Finding("peft", "not installed", None, "pip install peft")]
    assert doctor.headline(sound) == "Everything works on this machine."
    one = [*sound, Finding("cpu", "1.0 GiB free", False)]
    assert doctor.headline(one) == "1 thing does not work here: cpu."
    two = [*one, Finding("numpy", "not installed", False)]
    assert doctor.headline(two) == "2 things do not work here: cpu, numpy."


def test_a_host_is_not_asked_for_what_only_the_commands_need(tmp_path: Path) -> None:
    names = [line.name for line in doctor.findings(tmp_path, in_host=True)]
    assert "torch" in names and "diffusers" not in names and "pyarrow" not in names
    assert found("pyarrow")
    assert list(doctor.findings(tmp_path, in_host=True))[-1].value == f"0 kept in {tmp_path}"


def test_the_version_of_a_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    root = Path(doctor.__file__).parents[1]
    written = (root / "pyproject.toml").read_text(encoding="utf-8")
    number, place = doctor.version().split(", in the folder ")
    assert f'\nversion = "{number}"\n' in written and place == root.name
