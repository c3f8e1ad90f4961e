"""What ComfyUI's registry and its installers read of the project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and newer
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_hosts_find_nothing_to_install(settings: dict[str, Any]) -> None:
    """ComfyUI has torch and all else that the nodes need; another build of it would break the user's install."""
    assert "dependencies" not in settings["project"] and settings["project"]["dynamic"] == ["dependencies"]
    assert requirements("requirements.txt") == []


def test_the_command_line_finds_what_it_needs(settings: dict[str, Any]) -> None:
    (name,) = settings["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    names = {re.split(r"[<>=]", line)[0] for line in requirements(name)}
    assert {"torch", "diffusers", "transformers", "safetensors", "numpy", "pillow"} <= names


def test_every_address_leads_into_the_repository(settings: dict[str, Any]) -> None:
    urls, comfy = settings["project"]["urls"], settings["tool"]["comfy"]
    repository = urls["Repository"]
    assert {"Documentation", "Issues"} <= urls.keys() and all(url.startswith(repository) for url in urls.values())
    raw = repository.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for name, shape in (("Icon", (1, 1)), ("Banner", (21, 9))):
        assert comfy[name].startswith(raw)
        drawing = ElementTree.parse(ROOT / comfy[name].removeprefix(raw)).getroot()
        width, height = int(drawing.attrib["width"]), int(drawing.attrib["height"])
        assert width * shape[1] == height * shape[0] and width <= 840
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= comfy.keys()


def test_the_pack_ships_what_the_host_reads(settings: dict[str, Any]) -> None:
    shipped = settings["tool"]["comfy"]["includes"]
    assert all((ROOT / folder).is_dir() for folder in shipped)
    assert {"example_workflows", "locales", "subgraphs", "web"} <= set(shipped)
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert not {f"/{folder}/" for folder in shipped} & set(left_out)


def test_one_version_and_one_licence(settings: dict[str, Any]) -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {settings['project']['version']}\n" in citation
    assert f"license: {settings['project']['license']}\n" in citation
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
