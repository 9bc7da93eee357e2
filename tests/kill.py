"""Runs recipes, killed by ``kill -9`` at chosen points, until they are done.

``python kill.py`` loads everything once and forks a process per attempt. Each line that it reads is a run, as JSON:
``[recipe, folder, cache, ["POINT:N", …]]``; its answer is a line, too: how many attempts were killed, or what went wrong.
What the runs print goes to the standard error. A point is ``step`` (after the N-th optimiser step of the process), ``write``
(half-way through the N-th atomic write), ``rename`` (before the N-th rename), ``edge`` (after the N-th checkpoint),
``revise`` (inside the N-th revision), ``ask`` (before the N-th question or answer is published), or ``charge`` (before the
N-th entry into the ledger).
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from labeleff import files, runner
from labeleff.data import rounds
from labeleff.data.annotations import AnnotationStore
from labeleff.learner import Learner
from labeleff.recipe_io import load_recipe
from labeleff.rundir import RunDirectory
from labeleff.sweep.preload import PRELOADED


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, number: int) -> None:
    """Make this process kill itself at a point."""
    count = itertools.count(1)
    if point == "step":
        plain = Learner.optimizer_step

        def optimizer_step(self, *args, **options):
            plain(self, *args, **options)
            if next(count) == number:
                die()

        Learner.optimizer_step = optimizer_step
    elif point in ("write", "rename"):
        replace, fsync = Path.replace, os.fsync

        def half(handle):
            if next(count) == number:
                with contextlib.suppress(OSError):  # a file that is open for reading only stays whole
                    os.ftruncate(handle, os.fstat(handle).st_size // 2)
                die()
            fsync(handle)

        def before(self, target):
            if next(count) == number:
                die()
            return replace(self, target)

        if point == "write":
            files.os.fsync = half
        else:
            Path.replace = before
    elif point == "edge":
        save = RunDirectory.save_checkpoint

        def save_checkpoint(self, state):
            path = save(self, state)
            if next(count) == number:
                die()
            return path

        RunDirectory.save_checkpoint = save_checkpoint
    elif point == "revise":
        write = AnnotationStore._write_label

        def write_label(self, case, revision, label):
            if revision and next(count) == number:
                die()
            return write(self, case, revision, label)

        AnnotationStore._write_label = write_label
    elif point == "ask":
        write_json = rounds.write_json

        def write(path, value):
            if next(count) == number:
                die()
            write_json(path, value)

        rounds.write_json = write
    elif point == "charge":
        reconcile = rounds.Rounds.reconcile

        def before_charging(self):
            if next(count) == number:
                die()
            reconcile(self)

        rounds.Rounds.reconcile = before_charging
    else:
        raise ValueError(point)


def attempts(recipe: dict, folder: str, cache: str, points: list[str]) -> int | str:
    """Run until nothing kills it any more; return how many attempts were killed, or which one failed."""
    loaded = load_recipe(recipe)
    killed = 0
    for point in [*points, ""]:
        child = os.fork()
        if not child:
            if point:
                name, _, number = point.partition(":")
                arm(name, int(number or 1))
            try:
                runner.run(loaded, Path(folder), cache=Path(cache))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += os.WTERMSIG(status) == signal.SIGKILL
        elif os.WEXITSTATUS(status):
            return f"attempt {point!r} failed with {os.WEXITSTATUS(status)}"
    return killed


def main() -> None:
    assert PRELOADED  # what a run would import itself, attempt after attempt
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(attempts(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
