"""An audit's tasks on a Ray cluster. Everything about distribution, retries and lost workers is Ray Data's.

Each task is a row of a data set; a pool of actors, each with a model of its own, maps rows to results, which come
back one task after the other and are kept by the caller. When a worker dies, Ray gives its task to another one.

A thousand rows are sent at a time, with their images: memory does not grow with the number of tasks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.settings import Checked, option
from .tasks import Bench, Engine, Task, Trained, Variant, Work

SENT_AT_ONCE = 1000  # tasks, after which the replicas load their model again


@dataclass(frozen=True)
class Cluster(Checked):
    """Where a Ray audit runs."""

    workers: int = option(1, "model replicas", minimum=1, maximum=10_000)
    ray_address: str = option(
        "", "address of a running cluster, such as ray://host:10001 or auto (default: this machine)"
    )
    gpus_a_worker: float = option(0.0, "GPUs for each replica; parts of one are possible", minimum=0, maximum=16)


class Worker:
    """One replica. Ray keeps it between rows."""

    def __init__(self, load: Callable[[Variant], Trained], work: Work, threads: int) -> None:
        torch.set_num_threads(threads)  # the same sums in the same order as in one process
        self._bench = Bench(load, work)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        values = self._bench(Task.of_row(row))
        return {"number": row["number"], "values": json.dumps(values)}


def on_ray(cluster: Cluster) -> Engine:
    """An engine on this cluster. Raises ValueError where Ray is not installed or the cluster cannot be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        import ray.data
    except ImportError as error:
        raise ValueError("the engine 'ray' needs Ray: pip install 'sd-dejavu[ray]'") from error

    def engine(
        tasks: Sequence[Task], load: Callable[[Variant], Trained], work: Work
    ) -> Iterator[tuple[Task, list[dict[str, Any]]]]:
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, cluster)
        try:
            for first in range(0, len(tasks), SENT_AT_ONCE):
                part = tasks[first : first + SENT_AT_ONCE]
                rows = [{"number": number, **task.as_row()} for number, task in enumerate(part)]
                results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                    Worker,  # type: ignore[arg-type, unused-ignore]
                    fn_constructor_args=(load, work, torch.get_num_threads()),
                    compute=ray.data.ActorPoolStrategy(size=min(cluster.workers, len(rows))),
                    num_gpus=cluster.gpus_a_worker or None,
                )
                del rows
                for found in results.iter_rows():
                    yield part[int(found["number"])], json.loads(found["values"])
        finally:
            if ours:
                ray.shutdown()

    return engine


def _connect(ray: Any, cluster: Cluster) -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    if cluster.ray_address:
        try:
            ray.init(cluster.ray_address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise ValueError(f"the Ray cluster {cluster.ray_address} cannot be reached: {error}") from error
    else:
        ray.init(
            num_cpus=cluster.workers + 1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
        )
