"""How cases that are not prepared yet are: first what it takes in disk and time, then side by side."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from labeleff.data.manifest import Case
from labeleff.errors import DataError, StoreError
from labeleff.machine import PROCESSES, ProcessDied, free_memory, in_bytes, most_processes, shared_out

FEW = 8
"""So many cases are prepared without a word."""
TIMED, TIMED_SECONDS = 3, 2.0
"""The rest is estimated from so many cases, or from those of so many seconds."""
WORTH_WHILE = 4.0
"""Seconds of work below which processes are not worth their start."""
MARGIN = 1.1
"""Other cases may be larger than the first."""

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """What the preparation of the cases that are left takes, from those that were timed.

    Args:
        cases: How many are left.
        disk: Bytes that they take.
        free: Bytes that are free there.
        seconds: How long one process takes.
        processes: How many share them.
    """

    cases: int
    disk: float
    free: float
    seconds: float
    processes: int

    def in_words(self, cache: Path) -> str:
        """Return it as one line."""
        shared = f" in {self.processes} processes" if self.processes > 1 else ""
        return (
            f"preparing {self.cases} images in {cache}: about {in_bytes(self.disk)} ({in_bytes(self.free)} free), "
            f"about {in_time(self.seconds / self.processes)}{shared}"
        )


def prepare_missing(
    make: Callable[[Case], T],
    cases: Sequence[Case],
    cost: Callable[[T, Path], tuple[int, int]],
    cache: Path,
    *,
    processes: int | None,
    say: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> None:
    """Make all that is missing, leaving it on the disk.

    Args:
        make: Prepares a case.
        cases: What is missing.
        cost: Bytes on the disk and in memory of what was made.
        cache: Where it is left.
        processes: How many work at a time; None: what cores and memory allow, where it is worth while.
        say: Called with the estimate, where more than a few cases are left.
        on_progress: Called with (done, of).

    Raises:
        DataError: A case cannot be used, or there is no room.
        StoreError: A process was killed.
    """
    timed, disk, memory, began = 0, 0, 0, time.perf_counter()
    for case in cases[:TIMED]:
        used = cost(make(case), cache)
        timed, disk, memory = timed + 1, disk + used[0], max(memory, used[1])
        on_progress(timed, len(cases))
        if time.perf_counter() - began > TIMED_SECONDS:
            break
    rest = cases[timed:]
    if not rest:
        return
    seconds = (time.perf_counter() - began) / timed * len(rest)
    shared = _processes(len(rest), seconds, memory) if processes is None else min(processes, len(rest))
    found = Estimate(len(rest), disk / timed * len(rest), shutil.disk_usage(cache).free, seconds, shared)
    if found.disk * MARGIN > found.free:
        raise DataError(
            f"{cache}: the {len(rest)} images that are still to be prepared take about {in_bytes(found.disk)}, and "
            f"{in_bytes(found.free)} are free; make room, or give --cache a folder on another disk"
        )
    if len(cases) > FEW:
        say(found.in_words(cache))
    done = timed

    def count(_: int) -> None:
        nonlocal done
        done += 1
        on_progress(done, len(cases))

    if shared < 2:
        for number, case in enumerate(rest):
            make(case)
            count(number)
        return
    try:
        shared_out(lambda number: make(rest[number]), len(rest), shared, count)
    except ProcessDied as error:
        raise StoreError(
            f"case {rest[error.item].id!r}: the process that prepared it {error.words}, perhaps for want of memory; the same "
            f"command goes on with what is missing, with fewer processes where {PROCESSES} says how many"
        ) from error


def _processes(cases: int, seconds: float, memory: int) -> int:
    """Return how many processes are worth while, and have room beside one another."""
    if seconds < WORTH_WHILE:
        return 1
    free = free_memory()
    fitting = cases if free is None else int(free / (2 * memory))  # others may be twice as large as those seen
    return max(1, min(most_processes(), cases, fitting))


def in_time(seconds: float) -> str:
    """Return a number of seconds in words."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
