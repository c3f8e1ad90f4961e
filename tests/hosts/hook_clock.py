"""What a monitor's hooks take of the sampling thread, without what they spend in the host. Knows no host, needs none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

HOOKS = ("_outer_sample", "_sampler_sample", "_predict_noise")  # these call on to the host: executor first
INNER = ("read", "guide")  # of its runs: these are called from within the host


class HookClock:
    """Seconds in our hooks, less what they spend in the host: the thread's own time, or all of it with ``wall``."""

    def __init__(self, wall: bool) -> None:
        self.now = time.perf_counter if wall else time.thread_time
        self.hooks = self.step = 0.0
        self.steps: list[float] = []

    def watch(self, monitor: Any) -> None:
        """From now on this monitor's hooks are timed."""
        for name in HOOKS:
            setattr(monitor, name, self._outside(getattr(monitor, name), name == "_predict_noise"))
        runs = monitor.runs_as
        monitor.runs_as = type("Timed", (runs,), {name: self._inside(getattr(runs, name)) for name in INNER})

    @staticmethod
    def leave(monitor: Any) -> None:
        """Its hooks are its own again."""
        for name in (*HOOKS, "runs_as"):
            vars(monitor).pop(name, None)

    def _outside(self, hook: Callable[..., Any], is_step: bool) -> Callable[..., Any]:
        def timed(executor: Any, *given: Any, **named: Any) -> Any:
            away, self_ = 0.0, self

            class Executor:
                class_obj = executor.class_obj

                def __call__(self, *a: Any, **k: Any) -> Any:
                    nonlocal away
                    began = self_.now()
                    try:
                        return executor(*a, **k)
                    finally:
                        away += self_.now() - began

            began, before = self.now(), self.step
            found = hook(Executor(), *given, **named)
            ours = self.now() - began - away
            self.hooks += ours
            if is_step:
                self.steps.append(ours + self.step - before)
            return found

        return timed

    def _inside(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = self.now()
            try:
                return hook(*given, **named)
            finally:
                took = self.now() - began
                self.hooks += took
                self.step += took

        return timed
