"""What a run says while it runs: lines of metrics, TensorBoard, a few words on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from labeleff.recipe import Recipe
from labeleff.rundir import RunDirectory

EVERY = 60.0
"""Seconds between lines of progress where there is no terminal."""


@cache
def console() -> Console:
    """Return the one console that runs print to."""
    # tables are cut to the width, and 80 columns are too few for them where there is no terminal to ask
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 140)


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Give a function to be called with (done, of): a bar on a terminal; elsewhere a line now and then.

    Nothing here has a thread of its own: processes may be forked meanwhile.
    """
    if quiet:
        yield lambda *_: None
    elif console().is_terminal:
        bar = Progress(*Progress.get_default_columns(), console=console(), transient=True, auto_refresh=False)
        number = bar.add_task(title, total=None)
        with bar:

            def move(done: int, of: int) -> None:
                bar.update(number, completed=done, total=of, refresh=True)

            yield move
    else:
        said = time.monotonic()

        def tell(done: int, of: int) -> None:
            nonlocal said
            if time.monotonic() - said > EVERY and done < of:
                said = time.monotonic()
                console().print(f"{title}: {done} of {of}")

        yield tell


class RunLog:
    """Metrics of a run. Lines are buffered and reach the disk before the checkpoint that covers them.

    Args:
        directory: The run directory.
        recipe: The run.
        write: False on all but the first process.
    """

    def __init__(self, directory: RunDirectory, recipe: Recipe, *, write: bool = True) -> None:
        self.directory, self.write = directory, write
        self.latest: dict[str, float] = {}
        self.interactive = write and console().is_terminal
        self._lines: list[str] = []
        self._warned: set[tuple[int, str]] = set()
        self._board: Any = None
        self._offsets = [sum(stage.steps for stage in recipe.stages[:index]) for index in range(len(recipe.stages) + 1)]

    def rewind(self, stage: int, step: int) -> None:
        """Forget everything after a step: what comes now is written in its place."""
        self._lines.clear()
        if self.write:
            self.directory.cut_metrics(stage, step)
            self._warned = {(where, found["what"]) for where, _, found in self._kept("warning")}
            from torch.utils.tensorboard import SummaryWriter

            purge = self._offsets[stage] + step + 1
            self._board = SummaryWriter(str(self.directory.folder / "tensorboard"), purge_step=purge)

    def step(self, stage: int, step: int, values: dict[str, float]) -> None:
        """Note the losses and the learning rate of an optimiser step."""
        self.latest = values
        if not self.write:
            return
        self._lines.append(json.dumps({"stage": stage, "step": step, **values}))
        for name, value in values.items():
            self.scalar(stage, step, f"train/{name}", value)

    def scalar(self, stage: int, step: int, name: str, value: float) -> None:
        """Draw one point in TensorBoard; steps count on through the stages."""
        if self._board is not None:
            self._board.add_scalar(name, value, self._offsets[stage] + step)

    def revision(self, stage: int, step: int, values: Mapping[str, float | list[float | None]]) -> None:
        """Note what an annotator says of a revision; only numbers are drawn in TensorBoard, curves are in the lines."""
        self._note(stage, step, "annotator", values)

    def diagnostics(self, stage: int, step: int, values: Mapping[str, float | None]) -> None:
        """Note how wrong labels are learnt."""
        self._note(stage, step, "diagnostics", values)

    def probe(self, stage: int, step: int, values: Mapping[str, float | None]) -> None:
        """Note what the features of the network know."""
        self._note(stage, step, "probe", values)

    def _note(self, stage: int, step: int, what: str, values: Mapping[str, Any]) -> None:
        if self.write and values:
            self._lines.append(json.dumps({"stage": stage, "step": step, what: dict(values)}))
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.scalar(stage, step, f"{what}/{name}", value)

    def noted(self, stage: int, what: str) -> list[tuple[int, dict[str, Any]]]:
        """Return steps and values of what was noted in a stage so far, by this process and those before it."""
        return [(step, values) for where, step, values in self._kept(what) if where == stage]

    def _kept(self, what: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield stage, step and values of what was noted so far."""
        self.flush()
        text = self.directory.metrics.read_text() if self.directory.metrics.exists() else ""
        for line in (json.loads(line) for line in text.splitlines() if f'"{what}"' in line):
            if what in line:
                yield line["stage"], line["step"], line[what]

    def warn(self, stage: int, step: int, what: str, words: str) -> None:
        """Say that learning goes wrong, and keep it for the summary: once in a stage, however often it was stopped.

        Args:
            stage: Number of the stage.
            step: Steps done.
            what: Names what is the matter.
            words: Says it.
        """
        if self.write and (stage, what) not in self._warned:
            self._warned.add((stage, what))
            self.say(f"stage {stage}, step {step}: {words}")
            self._lines.append(json.dumps({"stage": stage, "step": step, "warning": {"what": what, "words": words}}))

    def warnings(self) -> list[dict[str, Any]]:
        """Return ``stage``, ``step`` and ``words`` of all warnings of the run."""
        return [{"stage": stage, "step": step, "words": found["words"]} for stage, step, found in self._kept("warning")]

    def image(self, stage: int, step: int, name: str, picture: NDArray[np.uint8]) -> None:
        """Show a picture [3, H, W] in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, picture, self._offsets[stage] + step)

    def say(self, text: str) -> None:
        """Print a line on the first process."""
        if self.write:
            console().print(text)

    def flush(self) -> None:
        """Push what was noted to the disk."""
        if self._lines:
            with self.directory.metrics.open("a") as file:
                file.writelines(line + "\n" for line in self._lines)
                file.flush()
            self._lines.clear()
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write everything and let TensorBoard go."""
        self.flush()
        if self._board is not None:
            self._board.close()
            self._board = None
