"""Workers of Ray: processes on this machine, or on all machines of a cluster that share a file system."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compress.errors import CompressError
from compress.extras import need
from compress.sweep.cell import GRACE_S, THREADS

NAME = "ray"


@dataclass
class Ray:
    work: Callable[[Any], Any]
    workers: int
    threads: int
    """Of each worker; a task takes as many of Ray's CPUs."""
    address: str | None = None
    """Of a cluster that runs; None starts one on this machine."""
    name: str = field(default=NAME, init=False)
    running: dict[Any, Any] = field(default_factory=dict, init=False)
    ray: Any = field(init=False)

    def __post_init__(self) -> None:
        self.ray = need("ray", "sweep", "--engine ray")
        options: dict[str, Any] = {"include_dashboard": False, "num_cpus": self.workers * self.threads}
        try:
            self.ray.init(
                **({"address": self.address} if self.address else options),
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise CompressError(f"ray {self.address or 'on this machine'}", said, "try --engine joblib") from error

    @property
    def version(self) -> str:
        return str(self.ray.__version__)

    def has_room(self) -> bool:
        """Whether another task would begin at once, as far as the number of workers goes."""
        return len(self.running) < self.workers

    def submit(self, task: Any) -> None:
        options: dict[str, Any] = {
            "num_cpus": self.threads,
            "max_retries": 0,  # the sweep counts the attempts, and says so
            "max_calls": 1,  # a process of its own for each task, as with `compress run`
            "runtime_env": {"env_vars": dict.fromkeys(THREADS, str(self.threads))},
        }
        if task.alone:  # all are timed on one machine: this one
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = self.ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
        self.running[self.ray.remote(**options)(self.work).remote(task)] = task

    def ended(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """(task, result) of what ended within that time; the result is None where the worker was lost."""
        found: list[tuple[Any, Any]] = []
        if not self.running:
            return found
        done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=timeout_s)
        for reference in done:
            task = self.running.pop(reference)
            try:
                found.append((task, self.ray.get(reference)))
            except self.ray.exceptions.RayError:
                found.append((task, None))
        return found

    def stop(self) -> None:
        """Ends all tasks, which have some seconds to leave their folders in order, and the cluster if it is ours."""
        if self.running and self.ray.is_initialized():
            for reference in self.running:
                self.ray.cancel(reference, force=False)
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=GRACE_S)
            for reference in self.running:
                self.ray.cancel(reference, force=True)
        self.running.clear()
        self.ray.shutdown()
