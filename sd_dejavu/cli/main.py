"""``sd-dejavu``: is this image mine, or is the model replaying its training data?"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from typing import Any, NoReturn

from ..core.memory import telling
from ..report.terminal import one_line, safe
from . import audit, bench, calibrate, check, common, compare, demo, doctor, explain, finetune, mitigate, refset, repair

COMMANDS = (demo, doctor, check, explain, mitigate, compare, calibrate, bench, refset, finetune, audit, repair)
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


class _Warnings(logging.Handler):
    """What the core has to say beside its results, as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        common.warn(record.getMessage().removeprefix("[Déjà Vu] "))


_WARNINGS = _Warnings()


class Parser(argparse.ArgumentParser):
    """Its messages repeat what was typed, which can come from a file of somebody else's; errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {one_line(message)} (--help tells more)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(safe(message) if message else message, file)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="sd-dejavu", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rsplit(".", 1)[1]
        text = (module.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text.split("\n")[0], description=text)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(arguments: list[str] | None = None) -> int:
    """0; 2 with one sentence for bad input, or where nothing fits into memory; 3 with --fail-on-flag when something was
    flagged; 4 when some prompts were not measured, for want of memory or because they are too long."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _in_utf8(stream)
    logging.getLogger("dejavu").addHandler(_WARNINGS)  # one, however often it is added
    parsed = parser().parse_args(arguments)
    try:
        with telling():
            status: int = parsed.run(parsed)
            return status
    except KeyboardInterrupt:
        common.warn("interrupted")
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        common.warn(f"error: {error}")
        return EXIT_BAD_INPUT


def _in_utf8(stream: Any) -> None:
    """Prompts in any script come in and go out, whatever code page the system has for pipes and files."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=stream.errors)


if __name__ == "__main__":
    sys.exit(main())
