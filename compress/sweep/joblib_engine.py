"""Workers on this machine, by loky, the engine of joblib.

One pool of one process for each worker: a pool that loses a process breaks as a whole, and the others must go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from compress.sweep.cell import GRACE_S, THREADS

NAME = "joblib"


@dataclass
class Joblib:
    work: Callable[[Any], Any]
    workers: int
    threads: int
    """Of each worker."""
    idle: list[Any] = field(default_factory=list, init=False)
    running: dict[Future[Any], tuple[Any, Any]] = field(default_factory=dict, init=False)
    name: str = field(default=NAME, init=False)

    @property
    def version(self) -> str:
        import joblib

        return str(joblib.__version__)

    def has_room(self) -> bool:
        """Whether another task would begin at once."""
        return len(self.running) < self.workers

    def submit(self, task: Any) -> None:
        pool = self.idle.pop() if self.idle else self._pool()
        self.running[pool.submit(self.work, task)] = task, pool

    def ended(self, timeout_s: float) -> list[tuple[Any, Any]]:
        """(task, result) of what ended within that time; the result is None where the worker was lost."""
        found = []
        for future in wait(self.running, timeout_s, FIRST_COMPLETED).done:
            task, pool = self.running.pop(future)
            if future.exception() is None:
                self.idle.append(pool)
                found.append((task, future.result()))
            else:  # killed, or interrupted by someone else than us
                pool.shutdown(kill_workers=True)
                found.append((task, None))
        return found

    def stop(self) -> None:
        """Ends all workers: those at work are asked to leave their folders in order, and have some seconds for it."""
        pools = [pool for _, pool in self.running.values()]
        for pool in pools:
            for process in list((pool._processes or {}).values()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
        late = wait(self.running, GRACE_S).not_done if self.running else set()
        dead = [pool for future, (_, pool) in self.running.items() if future in late]
        with ThreadPoolExecutor(max(1, self.workers)) as closing:  # a second or more for each
            list(closing.map(lambda pool: pool.shutdown(kill_workers=pool in dead), [*pools, *self.idle]))
        self.running.clear()
        self.idle.clear()

    def _pool(self) -> Any:
        from joblib.externals.loky import ProcessPoolExecutor

        # Set before numpy and torch are loaded: some of their libraries read it once.
        return ProcessPoolExecutor(max_workers=1, env=dict.fromkeys(THREADS, str(self.threads)), initializer=_alone)


def _alone() -> None:
    """Ctrl-C in a terminal reaches all processes: the sweep's is the one that decides what ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
