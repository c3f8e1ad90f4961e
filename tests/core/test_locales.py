"""ComfyUI shows the pack's texts in the user's language: every language says all that the nodes and settings say, no more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from node_schemas import declared

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "locales"
LANGUAGES = ["de", "es", "fr", "ja", "ko", "zh"]  # English is told by the source
FILES = ["commands.json", "main.json", "nodeDefs.json", "settings.json"]
SCRIPT = (ROOT / "web" / "dejavu.js").read_text(encoding="utf-8")
OF_THE_HOST = {"Sidebar"}  # a heading of the settings that the host has translated itself
MARKS = "@{}|"  # the host's front end takes them for commands


def written(language: str, file: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / file).read_text(encoding="utf-8"))


def texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [text for one in value.values() for text in texts(one)]


def shape(value: Any) -> Any:
    """The same keys, without the texts."""
    return {key: shape(one) for key, one in value.items()} if isinstance(value, dict) else None


def test_every_language_has_the_same_files() -> None:
    assert sorted(p.name for p in LOCALES.iterdir()) == sorted([*LANGUAGES, "en"])
    for language in LANGUAGES:
        assert sorted(p.name for p in (LOCALES / language).iterdir()) == FILES


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_have_exactly_what_they_declare(language: str) -> None:
    said: dict[str, Any] = {"name": None, "tooltip": None}
    expected = {
        node.id: {
            "display_name": None,
            "description": None,
            "inputs": {i.name: said for i in node.inputs},
            "outputs": {str(place): said for place, _ in enumerate(node.outputs)},
        }
        for node in declared().values()
    }
    assert shape(written(language, "nodeDefs.json")) == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_choice_is_called_stays(language: str) -> None:
    """The host does not translate choices: where the English help explains one by its name, so does each other."""
    found = written(language, "nodeDefs.json")
    for node in declared().values():
        for known in node.inputs:
            options = known.given.get("options")
            explained = [c for c in options if f"{c}:" in known.tooltip] if isinstance(options, list) else []
            for choice in explained:
                assert choice in found[node.id]["inputs"][known.name]["tooltip"], (node.id, choice)


@pytest.mark.parametrize("language", LANGUAGES)
def test_settings_commands_and_headings_are_those_of_the_script(language: str) -> None:
    settings = written(language, "settings.json")
    assert sorted(settings) == sorted(id_.replace(".", "_") for id_ in re.findall(r"id: '(DejaVu\.\w+)'", SCRIPT))
    palettes = re.findall(r"'(\w+)'", SCRIPT.split("const PALETTES = ", 1)[1].split("\n", 1)[0])
    assert sorted(settings["DejaVu_Palette"].pop("options")) == sorted(palettes)
    assert all(set(setting) == {"name", "tooltip"} for setting in settings.values())
    assert (
        list(written(language, "commands.json")) == ["Workspace_ToggleSidebarTab_dejavu"] and "id: 'dejavu'," in SCRIPT
    )
    headings = set(re.findall(r"category: \['Déjà Vu', '(\w+)'", SCRIPT))
    assert shape(written(language, "main.json")) == {"settingsCategories": dict.fromkeys(headings - OF_THE_HOST)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_empty_or_a_command_to_the_front_end(language: str) -> None:
    for file in FILES:
        for text in texts(written(language, file)):
            assert text.strip() and not set(MARKS) & set(text), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_left_in_english(language: str) -> None:
    found = written(language, "nodeDefs.json")
    for node in declared().values():
        told = found[node.id]
        assert told["description"] != node.description
        for known in node.inputs:
            assert told["inputs"][known.name]["tooltip"] != known.tooltip, (node.id, known.name)


@pytest.mark.parametrize("node", list(declared()))
def test_the_chinese_help_names_every_slot_as_the_node_does(node: str) -> None:
    page = (ROOT / "web" / "docs" / node / "zh.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0]: part for part in page.split("\n## ")}
    told = written("zh", "nodeDefs.json")[node]
    for heading, slots in (("输入", told["inputs"]), ("输出", told["outputs"])):
        rows = [line.split("|")[1].strip() for line in sections[heading].splitlines() if line.startswith("|")]
        assert rows[2:] == [slot["name"] for slot in slots.values()], heading
    assert {"如何连接", "须知"} <= sections.keys()
