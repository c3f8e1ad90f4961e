"""What ComfyUI serves of the pack beside its nodes: translations, help pages, templates and blueprints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
from comfyui_server import ComfyServer

PACK = Path(__file__).parents[2]
LANGUAGES = {"en", "zh", "ja", "ko", "de", "fr", "es"}


def read(comfy: ComfyServer, path: str) -> Any:
    return json.loads(comfy.get(path))


def test_translations_are_merged(comfy: ComfyServer) -> None:
    found = read(comfy, "/i18n")
    assert found.keys() >= LANGUAGES
    for language in LANGUAGES:
        for path in (PACK / "locales" / language).glob("*.json"):
            written = json.loads(path.read_text(encoding="utf-8"))
            part = found[language] if path.stem == "main" else found[language][path.stem]
            assert written.items() <= part.items(), path


def test_templates_have_their_images(comfy: ComfyServer) -> None:
    ((pack, names),) = read(comfy, "/workflow_templates").items()
    assert sorted(names) == sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
    for name in names:
        for ending in ("json", "jpg"):
            path = PACK / "example_workflows" / f"{name}.{ending}"
            assert comfy.get(quote(f"/api/workflow_templates/{pack}/{path.name}")) == path.read_bytes()


def test_help_pages_are_there_in_both_languages(comfy: ComfyServer) -> None:
    (pack,) = read(comfy, "/workflow_templates")
    for path in sorted((PACK / "web" / "docs").rglob("*.md")):
        assert comfy.get(quote(f"/extensions/{pack}/{path.relative_to(PACK / 'web').as_posix()}")) == path.read_bytes()


def test_the_blueprint_is_offered(comfy: ComfyServer) -> None:
    try:
        listed = read(comfy, "/global_subgraphs")
    except HTTPError:
        pytest.skip("this ComfyUI has no blueprints")
    offered = {entry["name"]: key for key, entry in listed.items() if entry["source"] == "custom_node"}
    (path,) = (PACK / "subgraphs").glob("*.json")
    assert list(offered) == [path.stem]
    given = read(comfy, f"/global_subgraphs/{offered[path.stem]}")["data"]
    assert json.loads(given) == json.loads(path.read_text(encoding="utf-8"))
