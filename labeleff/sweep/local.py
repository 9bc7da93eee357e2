"""Runs on this machine: processes forked from one server that has imported everything and started no thread."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, ClassVar

from labeleff.sweep.worker import Outcome, Task, process

PRELOADED = ("labeleff.sweep.preload",)
ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_MAX_THREADS",
)


@dataclass(frozen=True)
class Local:
    """N runs at a time, each in its own process.

    Importing torch and Lightning costs seconds, so processes are forked from a server that has done it once. A fork copies
    one thread only, so the server must have none besides; libraries that start theirs at import are told not to. A run sets
    the number of threads its recipe asks for.

    Args:
        workers: Runs at a time.
        gpus: Devices to hand out, one per run, as in ``CUDA_VISIBLE_DEVICES``; empty: none is handed out.
    """

    workers: int
    gpus: tuple[str, ...] = ()
    shared: ClassVar[bool] = True

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Yield outcomes as runs end. Leaving early asks the runs in progress to write a checkpoint, and waits for them."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        waiting = deque(tasks)
        free = deque(self.gpus or [None] * self.workers)
        active: dict[Any, tuple[Any, Any, Task, str | None]] = {}
        try:
            while waiting or active:
                while waiting and free and len(active) < self.workers:
                    task, gpu = waiting.popleft(), free.popleft()
                    receiver, sender = context.Pipe(duplex=False)
                    worker = context.Process(target=process, args=(task, gpu, sender), name=task.name)
                    with _single_threaded():
                        worker.start()
                    sender.close()
                    active[worker.sentinel] = (worker, receiver, task, gpu)
                for sentinel in connection.wait(list(active)):
                    worker, receiver, task, gpu = active.pop(sentinel)
                    free.append(gpu)
                    yield _outcome(worker, receiver, task)
        finally:
            for worker, *_ in active.values():
                worker.terminate()
            for worker, receiver, task, _ in active.values():
                _outcome(worker, receiver, task)


def _outcome(worker: Any, receiver: Any, task: Task) -> Outcome:
    """Return what a process sent, or what its death says."""
    worker.join()
    try:
        found: Outcome = receiver.recv()
    except EOFError:
        code = worker.exitcode or 0
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        found = Outcome(task.name, f"its process {end}; see {task.log}", 0.0)
    receiver.close()
    worker.close()
    return found


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Start the server with libraries told to start no threads (it inherits the environment of its first use)."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
