"""What the last lines of a test run say of the real hosts. A plugin: the process that prints them runs no tests itself."""

from __future__ import annotations

import comfyui_server
import pytest
import webui_server
from webui_server import KINDS

NEEDS = "needs the host"  # a property of a test: it goes with its report from the process that ran it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    install = comfyui_server.find_install()
    known = comfyui_server.version(install) if install else None
    _summary(terminalreporter, "comfyui", "ComfyUI", "DEJAVU_COMFYUI", known)
    for kind in KINDS.values():
        install = webui_server.find_install(kind)
        known = webui_server.version(kind, install) if install else None
        _summary(terminalreporter, kind.folder, kind.name, kind.variable, known)


def _summary(reporter: pytest.TerminalReporter, folder: str, name: str, variable: str, version: str | None) -> None:
    """How many tests ran on a host, or did not for want of it; ``version`` is None where it was not found."""
    outcomes = {kind: _those_of(folder, reporter, kind) for kind in ("passed", "failed", "error", "skipped")}
    if version is not None and (ran := outcomes["passed"] | outcomes["failed"] | outcomes["error"]):
        reporter.write_sep("=", f"real {name} {version}: {_count(len(ran), 'test')} ran", green=True)
    elif version is None and (skipped := outcomes["skipped"]):
        message = f"{name} was not found: {_count(len(skipped), 'real-host test')} did not run"
        reporter.write_sep("=", message.upper(), red=True, bold=True)
        reporter.write_line(f"Install it where ${variable} says, or in ~/.cache/sd-dejavu/hosts/{folder}.")


def _those_of(host: str, reporter: pytest.TerminalReporter, outcome: str) -> set[str]:
    reports = reporter.stats.get(outcome, [])
    return {report.nodeid for report in reports if (NEEDS, host) in map(tuple, report.user_properties)}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
