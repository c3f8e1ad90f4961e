"""Where we are in Automatic1111 or Forge: the host, the folders of ours, and the turn in its queue."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from . import door, references
from .controls import NO_REFERENCES
from .hosted import Component
from .run import this_host
from .session import Session

Found = TypeVar("Found")


class Here:
    """The host that has loaded us, with what we keep in its data folder."""

    def __init__(self) -> None:
        from modules import paths, shared

        self.host = this_host()
        self.session = Session(shared.state)
        folder = Path(paths.data_path) / "dejavu"
        self.calibrations, self.references, self.audits, self.repairs = (
            folder / name for name in ("calibration", "references", "audits", "repairs")
        )
        self.has_panel = False  # whether the host's page shows reports
        self.lists: list[Component] = []  # of the reference sets that a run can be led away from, one a tab
        self._hidden = (paths.data_path, paths.script_path, paths.models_path, Path.home())

    def sentence(self, error: Exception | str) -> str:
        """An error in one line, for clients: without where on this machine things are."""
        return door.sentence(error, self._hidden)

    def sets(self) -> list[str]:
        """What can be chosen as reference images of a run."""
        return [NO_REFERENCES, *references.names(self.references)]

    def lacking(self) -> list[str]:
        """What nothing can be measured without and this host has not."""
        from modules import script_callbacks, scripts

        needed = {"on_cfg_denoiser": script_callbacks, "process_before_every_sampling": scripts.Script}
        if self.host.name != "Forge":
            needed["on_cfg_denoised"] = script_callbacks
        return [name for name, owner in needed.items() if not hasattr(owner, name)]

    def in_turn(self, work: Callable[[], Found], task: str = "") -> Found:
        """What ``work`` gives when the host's other runs are done, and where it samples; see :meth:`page` for ``task``."""
        from modules import call_queue, progress

        with call_queue.queue_lock:
            if task:
                progress.start_task(task)
            return self._where_it_samples(work)

    @contextmanager
    def page(self, task: str) -> Iterator[str]:
        """While open, a page that asks for the host's progress of its ``task`` is told that it is not over.

        Gives the name, for :meth:`in_turn`; empty for any that is not like those of the host.
        """
        from modules import progress

        if not re.fullmatch(r"task\([a-z0-9]{1,40}\)", task):
            yield ""
            return
        progress.add_task_to_queue(task)
        try:
            yield task
        finally:
            progress.pending_tasks.pop(task, None)  # of one that was refused
            progress.finish_task(task)

    def _where_it_samples(self, work: Callable[[], Found]) -> Found:
        if self.host.name != "Forge":
            return work()
        from modules_forge import main_thread

        outcome: list[Found | Exception] = []

        def kept() -> None:  # that thread keeps to itself what is raised there
            try:
                outcome.append(work())
            except Exception as error:
                outcome.append(error)

        main_thread.run_and_wait_result(kept)
        (found,) = outcome
        if isinstance(found, Exception):
            raise found
        return found
