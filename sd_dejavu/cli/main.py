"""``sd-dejavu``: is this picture mine, or is the model replaying its training data?"""

from __future__ import annotations

import argparse
import sys

from ..memory import telling
from . import audit, bench, calibrate, check, compare, demo, explain, finetune, mitigate, refset

COMMANDS = (demo, check, explain, mitigate, compare, calibrate, bench, refset, finetune, audit)
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sd-dejavu", description=__doc__)
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
    flagged; 4 when some prompts were not measured for want of memory."""
    parsed = parser().parse_args(arguments)
    try:
        with telling():
            return parsed.run(parsed)
    except KeyboardInterrupt:
        print("sd-dejavu: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"sd-dejavu: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
