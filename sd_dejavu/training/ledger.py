"""The folder of an audit: one file for each finished task, so that a stopped audit goes on where it stood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..kept import Resumable, digest_of, json_digest, json_text, write_text
from ..kept.foreign import Unreadable, json_of
from .tasks import Task, Variant, check_values

_ADVICE = "remove that folder, or give --restart, to begin anew"


class Ledger:
    """Results of tasks by their place. ``begun`` says what the audit is of; another one is refused with ``advice``.

    Raises ValueError where the folder holds another audit, or something else. ``restart`` drops what is there.
    """

    def __init__(self, folder: Path, begun: dict[str, Any], restart: bool = False, advice: str = _ADVICE) -> None:
        self._folder = folder
        self._work = Resumable(folder, "an audit", advice)
        if restart:
            self._work.discard()
        self._work.begin(begun)

    @classmethod
    def below(cls, folder: Path, begun: dict[str, Any]) -> Ledger:
        """One of several: each audit has a folder of its own, found again by what it is of."""
        return cls(folder / json_digest(begun), begun, advice="remove that folder to begin anew")

    def held(self) -> AbstractContextManager[None]:
        """While open, no other process can keep results here."""
        return self._work.held()

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
            return check_values(task, found.get("values")) if found["prompts"] == json_digest(task.prompts) else None
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and this part is done again") from error

    def keep(self, task: Task, values: Sequence[Any]) -> None:
        """Raises ValueError for what :meth:`result` would not take."""
        kept = check_values(task, list(values))
        write_text(self._file(task), json_text({"prompts": json_digest(task.prompts), "values": kept}))

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
    return digest_of([f"{name}\0{variant.strength!r}{base}"], 12)
