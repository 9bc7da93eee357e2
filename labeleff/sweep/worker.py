"""What one process of a sweep does: one run, its words into a file, its end in a line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from signal import SIGTERM
from typing import Any

from labeleff.errors import Interrupted, LabeleffError, one_line
from labeleff.files import write_atomically
from labeleff.machine import PROCESSES

LOCK_PATIENCE = 60.0
"""Seconds to wait for a process of an earlier, killed sweep to let go of a folder."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to know.

    Args:
        name: Name of the run.
        recipe: Its recipe, plain values.
        folder: Its run directory.
        log: File that gets what it prints.
        cache: Where prepared images are kept.
        plugins: Python files to load first.
        start: Run directory of its first stages, to be taken over; None: it trains them itself.
        evaluated: False for stages that are only trained, for other runs to take over.
    """

    name: str
    recipe: Mapping[str, Any]
    folder: Path
    log: Path
    cache: Path | None = None
    plugins: tuple[Path, ...] = ()
    start: Path | None = None
    evaluated: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``error`` is empty where it reached its end."""

    name: str
    error: str
    seconds: float
    interrupted: bool = False


def execute(task: Task) -> Outcome:
    """Run a task in this process and say how it ended; nothing it does raises."""
    began = time.perf_counter()
    error, stopped = "", False
    try:
        from labeleff.plugins import load_plugins
        from labeleff.recipe_io import load_recipe
        from labeleff.runner import run, train

        os.environ.setdefault(PROCESSES, "1")  # the cores are shared out to runs already
        load_plugins(task.plugins)
        wait_for_lock(task.folder)
        (run if task.evaluated else train)(load_recipe(task.recipe), task.folder, cache=task.cache, start=task.start)
    except Interrupted as stop:
        error, stopped = str(stop), True
    except LabeleffError as problem:
        error = str(problem)
    except KeyboardInterrupt:
        error, stopped = "interrupted", True
    except Exception as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {one_line(problem, 300)}"
    outcome = Outcome(task.name, error, round(time.perf_counter() - began, 2), stopped)
    with contextlib.suppress(OSError):
        if error:
            write_atomically(
                task.log.with_suffix(".error.json"), json.dumps({"name": task.name, "error": error}) + "\n"
            )
        else:
            task.log.with_suffix(".error.json").unlink(missing_ok=True)
    return outcome


def wait_for_lock(folder: Path) -> None:
    """Wait until no other process is at work in a run directory, or until patience ends (the run then says so)."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LOCK_PATIENCE
    with (folder / ".lock").open("w") as handle:
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.2)
            else:
                return


def process(task: Task, gpu: str | None, sender: Any) -> None:
    """Run a task as the main function of a process, and send its outcome.

    Args:
        task: What to run.
        gpu: The device this process may see, as in ``CUDA_VISIBLE_DEVICES``; None: all.
        sender: Connection that takes the outcome.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    _end_with_parent()
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        outcome = execute(task)
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(OSError):  # nobody listens any more
        sender.send(outcome)


def _end_with_parent() -> None:
    """Ask this process to stop when the sweep is gone: it writes a checkpoint, and a later sweep goes on from it."""
    parent = parent_process()
    if parent is None:
        return

    def watch(sentinels: Sequence[Any]) -> None:
        connection.wait(sentinels)
        os.kill(os.getpid(), SIGTERM)

    threading.Thread(target=watch, args=([parent.sentinel],), daemon=True).start()
