"""Our own faults never cost a finished image: caught at the hook, told once, while a host's own interruption passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..core.memory import ran_out, release

NO_MEMORY = "there was not enough memory: choose 'remove-trigger', or a smaller batch"

log = logging.getLogger("dejavu")


@contextmanager
def caught(
    passing: tuple[type[BaseException], ...],
    tell: Callable[[str], bool],
    begins: str = "no verdict: ",
    no_memory: str = NO_MEMORY,
) -> Iterator[None]:
    """While open, whatever is not of the ``passing`` kinds is caught, and told as one sentence.

    ``tell`` gives False for what it was told before: then the log is not told again. Where memory ran out it is given
    back, and ``no_memory`` says what to do.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        if ran_out(error):
            release()
            text = no_memory
        else:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if tell(text):
            log.warning("[Déjà Vu] %s%s", begins, text, exc_info=not isinstance(error, ValueError))
