"""The folder of an audit: one file for each finished task, so that a stopped audit goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tasks import Task, Variant

_BEGUN = "begun.json"


class Ledger:
    """Results of tasks by their place. ``begun`` says what the audit is of; another one is refused.

    Raises ValueError where the folder holds another audit, or something else. ``restart`` drops what is there.
    """

    def __init__(self, folder: Path, begun: dict[str, Any], restart: bool = False) -> None:
        self._folder = folder
        note = folder / _BEGUN
        if restart and note.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            if any(file.suffix != ".partial" for file in folder.iterdir()):
                raise ValueError(f"the folder {folder} is not an audit's: give another one")
            _write(note, begun)
            return
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"the audit in {folder} is damaged: delete it, or give --restart to begin anew") from error
        changed = [name.replace("_", " ") for name in begun if before.get(name) != json.loads(json.dumps(begun[name]))]
        if changed:
            raise ValueError(
                f"{folder} holds an audit with another {' and '.join(changed)}: give another --out, or --restart to "
                "begin anew"
            )

    def result(self, task: Task) -> list[Any] | None:
        """What was found, or None where the task is still to be done."""
        try:
            found = json.loads(self._file(task).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found["values"] if isinstance(found, dict) and found.get("prompts") == _digest(task.prompts) else None

    def keep(self, task: Task, values: Sequence[Any]) -> None:
        _write(self._file(task), {"prompts": _digest(task.prompts), "values": list(values)})

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        return [task for task in tasks if self.result(task) is None]

    def values(self, tasks: Sequence[Task]) -> Iterator[Any]:
        """The value of each prompt of finished tasks, in their order."""
        for task in tasks:
            found = self.result(task)
            assert found is not None  # asked for when all are done
            yield from found

    def _file(self, task: Task) -> Path:
        return self._folder / f"{_key(task.variant)}-{task.kind}-{task.first:09d}.json"


def _key(variant: Variant) -> str:
    """Short and safe in a file's name; where a LoRA lies does not matter, what it is called does."""
    name = Path(variant.lora).name if variant.lora else ""
    base = "\0base" if variant.base else ""
    return hashlib.sha256(f"{name}\0{variant.strength!r}{base}".encode()).hexdigest()[:12]


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def _write(path: Path, document: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document), encoding="utf-8")
    partial.replace(path)
