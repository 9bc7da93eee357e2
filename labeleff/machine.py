"""What of this machine a process may use, and work that is shared out to processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

from labeleff.errors import LabeleffError

PROCESSES = "LABELEFF_PROCESSES"
"""Environment variable: the most processes that images are prepared in."""
_CGROUP = Path("/sys/fs/cgroup")


def is_distributed() -> bool:
    """Return whether this process is one of several that train together."""
    from torch import distributed  # what prepares images in processes of its own has no need of torch

    return distributed.is_available() and distributed.is_initialized()


def process_count() -> int:
    """Return how many processes train together."""
    from torch import distributed

    return distributed.get_world_size() if is_distributed() else 1


class ProcessDied(LabeleffError):
    """A process that work was shared out to ended before it had done it.

    Args:
        item: The number of the piece of work it was at.
        words: How it ended.
    """

    def __init__(self, item: int, words: str) -> None:
        super().__init__(f"the process {words}")
        self.item, self.words = item, words


def cores() -> int:
    """Return how many cores this process may use: a queue, a container or ``taskset`` may have given it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def free_memory() -> int | None:
    """Return the bytes of memory that are free for this process; None where the system does not tell."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with suppress(OSError, ValueError):  # of a container; "max" is no number
        limit, used = (int((_CGROUP / f"memory.{what}").read_text()) for what in ("max", "current"))
        rows = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        given_back = sum(int(rows.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))  # copies of files
        found.append(max(limit - used + given_back, 0))
    return min(found, default=None)


def in_bytes(count: float) -> str:
    """Return a number of bytes in words."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def most_processes() -> int:
    """Return how many processes work may be shared out to from here; 1: none but this one.

    A process that another one has made shares nothing out: a sweep, or a loader of batches, has done so already. Nor does
    one on a system whose libraries do not survive a fork.
    """
    if multiprocessing.parent_process() is not None or sys.platform != "linux":
        return 1
    asked = os.environ.get(PROCESSES, "")
    return max(1, int(asked)) if asked.isdigit() else cores()


def shared_out(work: Callable[[int], object], count: int, processes: int, done: Callable[[int], None]) -> None:
    """Call ``work`` with 0 … count - 1, handed out in this order, in processes of their own.

    Processes are forked: ``work`` may be anything that this process holds (the data set of a plug-in or of a script), and
    nothing has to be imported anew. A fork copies the calling thread alone, so that pools of threads are dead in it; torch is
    told to use one thread there, which needs no pool. They end with this process, however it ends.

    Args:
        work: Leaves its result on the disk.
        count: Pieces of work.
        processes: How many work at a time.
        done: Called here with the number of a piece that is done, in the order they get done.

    Raises:
        LabeleffError: What ``work`` has raised first, in the order of the numbers; pieces that were at work are finished.
        ProcessDied: A process was killed.
    """
    team = _Team(work, count)
    try:
        team.start(min(processes, count))
        while team.at_work:
            for number in team.heard():
                done(number)
    finally:
        team.dismiss()
    if team.failures:
        raise team.failures[min(team.failures)]


class _Team:
    """Processes at work, each behind a link of its own."""

    def __init__(self, work: Callable[[int], object], count: int) -> None:
        self.work, self.left = work, iter(range(count))
        self.workers: dict[connection.Connection, Any] = {}
        self.at_work: dict[connection.Connection, int] = {}
        self.failures: dict[int, Exception] = {}

    def start(self, processes: int) -> None:
        for _ in range(processes):
            link, worker = _worker(self.work, list(self.workers))
            self.workers[link] = worker
        for link in self.workers:
            self._hand_out(link)

    def _hand_out(self, link: connection.Connection) -> None:
        number = None if self.failures else next(self.left, None)
        if number is None:
            return
        try:
            link.send(number)
        except OSError:  # killed while it was idle
            self.failures[number] = ProcessDied(number, _end_of(self.workers[link]))
        else:
            self.at_work[link] = number

    def heard(self) -> Iterator[int]:
        """Wait, yield the numbers of what is done, and hand out more."""
        ready = connection.wait(list(self.at_work))
        for link in [one for one in self.at_work if one in ready]:
            number = self.at_work.pop(link)
            failure = _heard(link, number, self.workers[link])
            if failure is not None:
                self.failures[number] = failure
            else:
                yield number
                self._hand_out(link)

    def dismiss(self) -> None:
        for link, worker in self.workers.items():
            link.close()  # an idle one reads the end, and ends
            if link in self.at_work:
                worker.terminate()
        for worker in self.workers.values():
            worker.join()


def _worker(work: Callable[[int], object], links: Sequence[connection.Connection]) -> tuple[connection.Connection, Any]:
    """Start a process, and return the link to it and itself."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(work, theirs, [*links, ours]), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, see above
        worker.start()
    theirs.close()
    return ours, worker


def _heard(link: connection.Connection, number: int, worker: Any) -> Exception | None:
    """Return what came of a piece of work."""
    try:
        failure: Exception | None = link.recv()
    except (EOFError, OSError):
        return ProcessDied(number, _end_of(worker))
    return failure


def _end_of(worker: Any) -> str:
    worker.join()
    code = worker.exitcode or 0
    return (
        f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    )


def _serve(work: Callable[[int], object], link: connection.Connection, others: Sequence[connection.Connection]) -> None:
    """Do what comes through a link until its other end is gone. Ends of other links are closed, else they would never be."""
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    with suppress(EOFError, OSError):  # nobody is there any more
        while True:
            number = link.recv()
            link.send(_failure(work, number))


def _failure(work: Callable[[int], object], number: int) -> Exception | None:
    """Return what a piece of work has raised, as something that can be sent."""
    try:
        work(number)
    except LabeleffError as error:
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())
    return None
