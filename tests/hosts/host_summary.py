"""What the last lines of a test run say of the real hosts. A plugin: the process that prints them runs no tests itself."""

from __future__ import annotations

import comfyui_server
import host_process
import pytest
import webui_server
from webui_server import KINDS

NEEDS = "needs the host"  # a property of a test: it goes with its report from the process that ran it
COMFYUI = "ComfyUI {}"  # the host of a version


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    installs = comfyui_server.find_installs()
    for known, install in installs.items():
        _ran(terminalreporter, COMFYUI.format(known), f"ComfyUI {comfyui_server.version(install)}")
    if not installs:
        _absent(terminalreporter, COMFYUI.format("not found"), "ComfyUI", comfyui_server.VARIABLE, "comfyui*")
    else:
        for folder in host_process.not_there(comfyui_server.VARIABLE, comfyui_server.PROGRAM):
            message = f"NO COMFYUI WAS FOUND IN {folder}: NO TEST RAN ON IT"
            terminalreporter.write_sep("=", message, red=True, bold=True)
    for kind in KINDS.values():
        install = webui_server.find_install(kind)
        if install is None:
            _absent(terminalreporter, kind.folder, kind.name, kind.variable, kind.folder)
        else:
            _ran(terminalreporter, kind.folder, f"{kind.name} {webui_server.version(kind, install)}")


def _ran(reporter: pytest.TerminalReporter, host: str, name: str) -> None:
    """How many tests ran on a host."""
    if ran := _those_of(host, reporter, "passed", "failed", "error"):
        reporter.write_sep("=", f"real {name}: {count(len(ran), 'test')} ran", green=True)


def _absent(reporter: pytest.TerminalReporter, host: str, name: str, variable: str, folder: str) -> None:
    """How many tests did not run for want of it."""
    if skipped := _those_of(host, reporter, "skipped"):
        message = f"{name} was not found: {count(len(skipped), 'real-host test')} did not run"
        reporter.write_sep("=", message.upper(), red=True, bold=True)
        reporter.write_line(f"Install it where ${variable} says, or in ~/.cache/sd-dejavu/hosts/{folder}.")


def _those_of(host: str, reporter: pytest.TerminalReporter, *outcomes: str) -> set[str]:
    reports = [report for outcome in outcomes for report in reporter.stats.get(outcome, [])]
    return {report.nodeid for report in reports if (NEEDS, host) in map(tuple, getattr(report, "user_properties", ()))}


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
