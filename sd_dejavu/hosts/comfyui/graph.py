"""Where a run's prompt was typed: found in the workflow that the host is executing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from comfy_execution.utils import get_executing_context

ONWARD = ("positive", "conditioning", "cond1", "guider")  # inputs that lead from a sampler to its prompt
PLAIN = "CLIPTextEncode"  # the host's own encode node
REPLACING = ("ConditioningZeroOut",)  # nodes behind which the rows are no longer those of the text

Graph = Mapping[str, Mapping[str, Any]]
MONITOR = "DejaVuMonitor"


def place() -> tuple[str | None, str | None]:
    """The host's names for what it executes now and for the node that runs; None outside of an execution."""
    context = get_executing_context()
    return (None, None) if context is None else (str(context.prompt_id), str(context.node_id))


def behind(graph: Graph, values: Iterable[object], wanted: Collection[str]) -> list[str]:
    """Those of the ``wanted`` nodes that these values of inputs come from, without what lies behind these."""
    links, seen, found = list(values), set(), []
    while links:
        link = links.pop(0)
        if not isinstance(link, list) or len(link) != 2 or str(link[0]) not in graph or str(link[0]) in seen:
            continue
        seen.add(source := str(link[0]))
        if source in wanted:
            found.append(source)
        else:
            links += graph[source]["inputs"].values()
    return found


def samplers_behind(graph: Graph, verdict: str, drew: Collection[str]) -> list[str]:
    """Of the nodes that ``drew`` under a Verdict's monitor: those that its samples come from, and that it watches now."""
    inputs = graph[verdict]["inputs"]
    monitor = {str(link[0]) for link in [inputs.get("monitor")] if isinstance(link, list) and link}
    return [
        node
        for node in behind(graph, [inputs.get("samples")], drew)
        if monitor.intersection(behind(graph, graph[node]["inputs"].values(), {*drew, *monitor}))
    ]


def executing() -> tuple[Graph, str] | None:
    """The workflow (the host's API format) and the node that runs now; None outside of a run."""
    from server import PromptServer

    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is None or server is None:
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    graph = next((item[2] for item in running if item[1] == context.prompt_id), None)
    return None if graph is None else (graph, context.node_id)


def typed_prompt(graph: Graph, node: str, negative: bool = False) -> tuple[str, str] | None:
    """(text, node that holds it) of the prompt that reaches this sampler; None where it is not one plain text.

    With ``negative`` that of the negative prompt: only from the host's own encode node, which adds nothing to the text.
    """
    output, to_negative = 0, negative
    for _ in range(len(graph)):
        found = graph.get(node)
        if found is None or found["class_type"] in REPLACING:
            return None
        inputs = found["inputs"]
        if "clip" in inputs and "text" in inputs:
            known = not negative or (found["class_type"] == PLAIN and not to_negative)
            return _text(graph, inputs["text"], node) if known else None
        names: Sequence[str] = ONWARD
        if to_negative:
            names = ("negative", "guider")
        elif output == 1 and "negative" in inputs:
            names = ("negative",)
        name = next((name for name in names if isinstance(inputs.get(name), list)), None)
        if name is None:
            return None
        to_negative = to_negative and name != "negative"
        node, output = str(inputs[name][0]), inputs[name][1]
    return None


def _text(graph: Graph, value: str | Sequence[object], node: str) -> tuple[str, str] | None:
    """A text as typed into the node, or into a primitive that is linked to it."""
    if isinstance(value, str):
        return value, node
    source = str(value[0])
    found = graph.get(source, {})
    typed = found.get("inputs", {}).get("value")
    is_primitive = found.get("class_type", "").startswith("PrimitiveString")
    return (typed, source) if is_primitive and isinstance(typed, str) else None


# ------------------------------------------------------------------------- before a workflow runs


def link_encoders(graph: dict[str, dict[str, Any]]) -> None:
    """Link the clip of a Monitor that needs one and has none to the text encoder of its sampler's prompt.

    It needs one to calibrate, and to measure against the empty prompt where the negative prompt is not known to be
    empty. Of what clients of the host's API send nothing is taken for granted.
    """
    for monitor, node in list(graph.items()):
        inputs = node.get("inputs") if isinstance(node, dict) and node.get("class_type") == MONITOR else None
        if not isinstance(inputs, dict) or "clip" in inputs:
            continue
        for sampler in _watched(graph, monitor):
            clip = _encoder_behind(graph, sampler)
            if clip is not None:
                against_empty = inputs.get("without") == "empty prompt" and not _has_empty_negative(graph, sampler)
                if inputs.get("calibrate_first") or against_empty:
                    inputs["clip"] = clip
                break


def _watched(graph: Graph, monitor: str) -> list[str]:
    """The nodes that take a Monitor's model, nearest first: patches, guiders and samplers."""
    found = [monitor]
    for node in found:
        for other, taking in graph.items():
            links = [v for n, v in _inputs(taking).items() if n.startswith(("model", "guider")) and _source(v) == node]
            if node == monitor:
                links = [link for link in links if link[1] == 0]  # of its outputs the first is the model
            if links and other not in found:
                found.append(other)
    return found[1:]


def _encoder_behind(graph: Graph, sampler: str) -> list[Any] | None:
    """The link to the text encoder with which a sampler's prompt was encoded; None without one."""
    found = [sampler]
    for node in found:
        inputs = _inputs(graph.get(node))
        clip = inputs.get("clip")
        if node != sampler and isinstance(clip, list) and _source(clip) is not None:
            return clip
        onward = (v for name, v in inputs.items() if name.startswith(("positive", "cond")))
        found += [source for v in onward if (source := _source(v)) is not None and source not in found]
    return None


def _has_empty_negative(graph: Graph, sampler: str) -> bool:
    typed = typed_prompt(graph, sampler, negative=True)
    return typed is not None and not typed[0].strip()


def _inputs(node: object) -> Mapping[str, Any]:
    found = node.get("inputs") if isinstance(node, dict) else None
    return found if isinstance(found, dict) else {}


def _source(value: object) -> str | None:
    """The node that a link of the host's API format comes from."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
        return str(value[0])
    return None
