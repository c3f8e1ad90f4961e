"""The folder of an audit, or a repair: one file for each finished task, so that a stopped one goes on where it stood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..kept import Resumable, digest_of, json_digest, json_text, write_text
from ..kept.foreign import Unreadable, json_of
from .tasks import Engine, Task, Trained, Variant, Work, check_values

Progress = Callable[[str, int, int], None]  # told the stage, how much of it is done, and of how much
_ADVICE = "remove that folder, or give --restart, to begin anew"


class Ledger:
    """Results of tasks by their place. ``begun`` says what the work of this ``kind`` is of; another one is refused with
    ``advice``.

    Raises ValueError where the folder holds other work, or something else. ``restart`` drops what is there.
    """

    def __init__(
        self, folder: Path, begun: dict[str, Any], restart: bool = False, advice: str = _ADVICE, kind: str = "an audit"
    ) -> None:
        self._folder = folder
        self._work = Resumable(folder, kind, advice)
        if restart:
            self._work.discard()
        self._work.begin(begun)

    @classmethod
    def below(cls, folder: Path, begun: dict[str, Any], kind: str = "an audit") -> Ledger:
        """One of several: each has a folder of its own, found again by what it is of."""
        return cls(folder / json_digest(begun), begun, advice="remove that folder to begin anew", kind=kind)

    def discard(self) -> None:
        """Removes what is kept."""
        self._work.discard()

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

    def finish(
        self,
        tasks: Sequence[Task],
        stage: str,
        load: Callable[[Variant], Trained],
        work: Work,
        engine: Engine,
        on_progress: Progress,
    ) -> None:
        """Does those of the tasks that are missing, and keeps what comes of them."""
        left = self.missing(tasks)
        total = sum(len(task.prompts) for task in tasks)
        done = total - sum(len(task.prompts) for task in left)
        on_progress(stage, done, total)
        if not left:
            return
        with self.held():
            for task, values in engine(left, load, work):
                self.keep(task, values)
                done += len(task.prompts)
                on_progress(stage, done, total)

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
