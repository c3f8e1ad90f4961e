"""What the host's page is told: the report while a run goes on, and the report kept in saved pictures."""

from __future__ import annotations

import time
from typing import Any

from comfy_execution.utils import get_executing_context

from ...monitor import Report, Watch

EVENT = "dejavu.run"
PAUSE = 0.25  # seconds between two reports on one run


class LiveReport:
    """Sends the report so far to the page that queued the run: at its first step, now and then, and at its end.

    ``node`` is the monitor's, so that the page knows which of its nodes are meant.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._told: tuple[str, float] | None = None

    def __call__(self, run: str, watch: Watch) -> None:
        from server import PromptServer

        server, context = getattr(PromptServer, "instance", None), get_executing_context()
        if server is None or context is None or server.client_id is None:
            return  # nobody looks on
        now, over = time.monotonic(), watch.finished or watch.stopped
        if not over and self._told is not None and self._told[0] == run and now - self._told[1] < PAUSE:
            return
        self._told = (run, now)
        report = {**Report.of(watch).as_json(), "monitor": self._node}
        message = {"run": run, "monitor": self._node, "prompt_id": context.prompt_id, "finished": over}
        server.send_sync(EVENT, {**message, "report": report}, server.client_id)


def tell(node: str, text: str) -> None:
    """A line on the node, on the page that queued the run."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        server.send_progress_text(text, node, server.client_id)


def keep_in_picture(extra: dict[str, Any], node: str, document: dict[str, Any]) -> None:
    """Put a report into what the host saves with pictures: by node, and into the workflow, which shows it again."""
    extra.setdefault("dejavu", {})[node] = document
    if (found := _node_of(extra.get("workflow"), node)) is not None:
        found.setdefault("properties", {})["dejavu"] = document


def _node_of(workflow: Any, node: str) -> dict[str, Any] | None:
    """The node of a saved workflow; '12:5' is node 5 of the subgraph that node 12 stands for."""
    if not isinstance(workflow, dict):
        return None
    subgraphs = {s.get("id"): s for s in workflow.get("definitions", {}).get("subgraphs", [])}
    graph: Any = workflow
    found = None
    for part in node.split(":"):
        found = next((n for n in (graph or {}).get("nodes", []) if str(n.get("id")) == part), None)
        graph = subgraphs.get(found.get("type")) if found is not None else None
    return found
