"""What the host's page is told: the report while a run goes on, the report kept in saved images, what works here.

Reports are judged and written on a thread of their own: the sampling thread only hands over what it has recorded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from comfy_execution.utils import get_executing_context

from ...doctor import Finding, findings, headline, in_lines, version
from ...run.report import Report
from ...run.state import RunState
from .graph import link_encoders

Document = dict[str, Any]  # a report, or a part of a saved workflow
EVENT = "dejavu.run"
PAUSE = 0.5  # seconds between two reports on one run

log = logging.getLogger("dejavu")


class LiveReport:
    """Sends the report so far to the page that queued the run: at its first step, now and then, and at its end.

    ``node`` is the monitor's, so that the page knows which of its nodes are meant. Without a page that is open,
    nothing is made.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._told: tuple[str, float] | None = None
        self._faults: set[str] = set()

    def __call__(self, run: str, state: RunState) -> None:
        """To be called from the sampling thread, which does not wait for the report."""
        from server import PromptServer

        server, context = getattr(PromptServer, "instance", None), get_executing_context()
        if server is None or context is None or server.client_id not in server.sockets:
            return  # nobody looks on
        now, over = time.monotonic(), state.finished or state.stopped
        if not over and self._told is not None and self._told[0] == run and now - self._told[1] < PAUSE:
            return
        self._told = (run, now)
        message = {"run": run, "monitor": self._node, "prompt_id": context.prompt_id, "finished": over}
        message["workflow"] = _workflow(server, context.prompt_id)
        _writer().submit(self._send, server, server.client_id, message, state.so_far())

    def _send(self, server: Any, page: str, message: dict[str, object], state: RunState) -> None:
        try:
            report = {**Report.of(state).as_json(), "monitor": self._node}
            server.send_sync(EVENT, {**message, "report": report}, page)
        except Exception as error:  # the run goes on; the page does without
            text = f"{type(error).__name__}: {error}"
            if text not in self._faults:
                log.warning("[Déjà Vu] the page was not told: %s", text, exc_info=True)
            self._faults.add(text)


def _workflow(server: Any, prompt_id: str) -> str | None:
    """The id of the workflow that queued this prompt: the page may have another one open by now."""
    running = {item[1]: item[3] for item in getattr(server.prompt_queue, "currently_running", {}).values()}
    name = _entry(_entry(_entry(running.get(prompt_id), "extra_pnginfo"), "workflow"), "id")
    return name if isinstance(name, str) else None


@cache
def _writer() -> ThreadPoolExecutor:
    """The one thread that writes reports, in the order they were asked for; it ends with the process."""
    return ThreadPoolExecutor(1, thread_name_prefix="dejavu-report")


def wait_until_told() -> None:
    """Until the page has been sent all reports that were asked for, so that what a node sends next comes after them."""
    _writer().submit(lambda: None).result()


def tell(node: str, text: str) -> None:
    """A line on the node, on the page that queued the run."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        server.send_progress_text(text, node, server.client_id)


def link_encoders_of_prompts() -> None:
    """Have the host show us each workflow before it runs it, by the way it has for that."""
    from server import PromptServer

    def seen(asked: Document) -> Document:
        graph = asked.get("prompt")
        if isinstance(graph, dict):
            try:
                link_encoders(graph)
            except Exception as error:  # the host says what is wrong with a workflow that is none
                log.debug("[Déjà Vu] a workflow was left as it is: %s", error)
        return asked

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(seen)


def add_routes(calibrations: Path) -> None:
    """What works on this machine, at GET /dejavu/doctor as {"lines": [text]}: for the sidebar and the settings.

    The host lets the same clients in as to its own routes. Nothing is changed by asking. ``calibrations`` is the folder
    where they are kept.
    """
    from aiohttp import web
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/dejavu/doctor")
    async def doctor(request: web.Request) -> web.Response:
        return web.json_response({"lines": await asyncio.to_thread(_doctor, calibrations)})


def _doctor(calibrations: Path) -> list[str]:
    import comfyui_version

    here = [Finding("Déjà Vu", version()), Finding("ComfyUI", comfyui_version.__version__)]
    every = [*here, *findings(calibrations, in_host=True)]
    return [headline(every), *(line for found in every for line in in_lines(found))]


def keep_in_image(extra: object, node: str, document: Document) -> None:
    """Put a report into what the host saves with images: by node, and into the workflow, which shows it again.

    A node that runs for each item of a list has all of its reports made before the first image is saved, and one
    place for them: there the one with the highest score stays. Clients of the host's API write into ``extra`` what they
    like: where a part of it is not what the host's page makes, that part is left alone.
    """
    if not isinstance(extra, dict):
        return
    reports = extra.setdefault("dejavu", {})
    if isinstance(reports, dict):
        if isinstance(before := reports.get(node), dict) and _is_report(before):
            document = max(before, document, key=_highest_score)
            note = "several runs were told by this node: this is the one with the highest score"
            document = {**document, "notes": [*(n for n in document["notes"] if n != note), note]}
        reports[node] = document
    found = _node_of(extra.get("workflow"), node)
    if found is not None and isinstance(found.setdefault("properties", {}), dict):
        found["properties"]["dejavu"] = document


def _is_report(document: Document) -> bool:
    """Whether it is one of ours: of what clients of the host's API have put there, nothing is read."""
    lists = all(isinstance(document.get(name), list) for name in ("verdicts", "notes"))
    return document.get("format") == "dejavu-report" and lists


def _highest_score(document: Document) -> float:
    found = (_entry(verdict, "score") for verdict in document["verdicts"])
    return max((score for score in found if isinstance(score, int | float)), default=0.0)


def _node_of(workflow: object, node: str) -> Document | None:
    """The node of a saved workflow; '12:5' is node 5 of the subgraph that node 12 stands for."""
    subgraphs = {str(graph.get("id")): graph for graph in _entries(_entry(workflow, "definitions"), "subgraphs")}
    graph: object = workflow
    found = None
    for part in node.split(":"):
        found = next((n for n in _entries(graph, "nodes") if str(n.get("id")) == part), None)
        graph = subgraphs.get(str(found.get("type"))) if found is not None else None
    return found


def _entry(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _entries(value: object, key: str) -> list[Document]:
    """The dictionaries of a list in a dictionary."""
    found = _entry(value, key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
