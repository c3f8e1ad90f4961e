"""The folder of an audit: one file for each finished task, so that a stopped audit goes on where it stood."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..foreign import Unreadable, json_of
from ..kept import LOCK, PARTIAL, json_text, locked, write_text
from .tasks import Task, Variant, check_values

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
            if any(file.suffix != PARTIAL for file in folder.iterdir()):
                raise ValueError(f"the folder {folder} is not an audit's: give another one")
            write_text(note, json.dumps(begun))
            return
        try:
            before = json_of(note)
            if not isinstance(before, dict):
                raise Unreadable("no settings in it")
        except Unreadable as error:
            raise ValueError(
                f"the audit in {folder} is damaged ({_BEGUN}: {error}): delete it, or give --restart to begin anew"
            ) from error
        changed = [name.replace("_", " ") for name in begun if before.get(name) != json.loads(json.dumps(begun[name]))]
        if changed:
            raise ValueError(
                f"{folder} holds an audit with another {' and '.join(changed)}: give another --out, or --restart to "
                "begin anew"
            )

    def held(self) -> AbstractContextManager[None]:
        """While open, no other process can keep results here."""
        return locked(self._folder, self._folder / LOCK)

    def result(self, task: Task) -> list[dict[str, Any]] | None:
        """What was found, or None where the task is still to be done. Raises ValueError where it cannot be true."""
        file = self._file(task)
        try:
            found = json_of(file)
        except Unreadable:  # not there, or not wholly written when the machine lost power
            return None
        try:
            if not isinstance(found, dict) or not isinstance(found.get("prompts"), str):
                raise ValueError("it does not say of which prompts it is")
            return check_values(task, found.get("values")) if found["prompts"] == _digest(task.prompts) else None
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and this part is done again") from error

    def keep(self, task: Task, values: Sequence[Any]) -> None:
        """Raises ValueError for what :meth:`result` would not take."""
        kept = check_values(task, list(values))
        write_text(self._file(task), json_text({"prompts": _digest(task.prompts), "values": kept}))

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
