"""Tests run in two processes side by side, each on one core: what shares a server or a module's fixtures stays together."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch; processes that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("hosts", "page")]
pytest_plugins = ("host_summary", "page_summary")

SERVERS = ("a1111", "forge", "pinned", "newest")  # parameters for whose sake a server is started


class Together(LoadScopeScheduling):
    """One file in one process, but all tests of a server of Automatic1111's, Forge's or a front end's in one."""

    def _split_scope(self, nodeid: str) -> str:
        parameters = re.findall(r"[^\[\]-]+", nodeid.partition("[")[2])
        return next((name for name in SERVERS if name in parameters), nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Together(config, log)
