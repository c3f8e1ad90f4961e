"""Work that goes on where it was stopped: a folder with a note of what it is of, so that nothing else goes on there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import PARTIAL, write_text
from .foreign import Unreadable, json_of
from .lock import LOCK, locked

_OVER = ".over"


@dataclass(frozen=True)
class Resumable:
    """A folder of unfinished work, such as ``kind`` ('an audit'); ``advice`` tells how to begin anew.

    ``shared`` says that the user's own files may lie there too: then it is never removed as a whole.
    """

    folder: Path
    kind: str
    advice: str
    note: str = "begun.json"
    shared: bool = False

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Notes what this work is of, or goes on with the work of this very ``identity``: plain values by their names.

        Raises ValueError with a sentence where the folder holds other work, other files or a damaged note.
        """
        self.sweep()
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / self.note
        asked = json.loads(json.dumps(identity))
        if not note.is_file():
            if not self.shared and any(file.suffix != PARTIAL for file in self.folder.iterdir()):
                raise ValueError(f"the folder {self.folder} is not {self.kind}: move it away, or name another one")
            write_text(note, json.dumps(asked, indent=1) + "\n")
            return
        held, asked = _flat(self.read(self.note)), _flat(asked)
        changed = [_change(name, held, asked) for name in {**asked, **held} if held.get(name) != asked.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds {self.kind} with {' and '.join(changed)}: go on as it was begun, or {self.advice}"
            )

    def read(self, name: str, needed: Collection[str] = ()) -> dict[str, Any]:
        """The JSON object in a file of the folder. Raises ValueError with a sentence where it lacks a ``needed`` key."""
        try:
            found = json_of(self.folder / name)
            if not isinstance(found, dict) or not found.keys() >= set(needed):
                raise Unreadable("it holds something else")
        except Unreadable as error:
            raise ValueError(f"{self.folder / name} is damaged ({error}): {self.advice}") from error
        return found

    def held(self) -> AbstractContextManager[None]:
        """While open, no other process can work here. Raises InUse where one does."""
        return locked(self.folder, self.folder / LOCK)

    def discard(self) -> None:
        """Removes the folder. Renamed first: half a folder must not be taken for unfinished work."""
        self.sweep()
        if (self.folder / self.note).is_file():
            self.folder.rename(self._over)
            shutil.rmtree(self._over)

    def sweep(self) -> None:
        """Removes what a process that ended while it discarded the folder has left."""
        if self._over.is_dir():
            shutil.rmtree(self._over, ignore_errors=True)

    @property
    def _over(self) -> Path:
        return self.folder.with_name(self.folder.name + _OVER)


def _flat(noted: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of settings as their settings."""
    flat: dict[str, Any] = {}
    for name, value in noted.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def _change(name: str, held: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    shown, pair = name.replace("_", " "), (held.get(name), asked.get(name))
    if all(value is None or isinstance(value, (bool, int, float)) for value in pair):
        return f"{shown} {pair[0]} instead of {pair[1]}"
    return f"another {shown}"
