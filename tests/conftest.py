"""Tests run in two processes side by side, each on one core: what shares a server or a module's fixtures stays together."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch; processes that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

TOGETHER = ("webui_kind", "front_end")  # parameters for whose sake a server is started


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Item) -> str:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    shared = [str(parameters[name]) for name in TOGETHER if name in parameters]
    return shared[0] if shared else item.path.stem
