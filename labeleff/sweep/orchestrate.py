"""A sweep from its file to its folder: what is missing is run, what is there is left alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from labeleff import __version__
from labeleff.errors import Interrupted, RunError
from labeleff.files import write_json
from labeleff.machine import cores
from labeleff.recipe import Recipe
from labeleff.recipe_io import diff, load_recipe, to_mapping
from labeleff.rundir import environment, has_begun
from labeleff.runlog import console
from labeleff.sweep.benchmark import Benchmark, DataChoice
from labeleff.sweep.collect import OTHER, not_as_planned, plan_file, plan_of, run_folder, unfinished
from labeleff.sweep.grid import Grid, Job, expand, method_recipe
from labeleff.sweep.local import Local
from labeleff.sweep.starts import Start, in_order, shared_starts
from labeleff.sweep.tuning import tune
from labeleff.sweep.worker import Outcome, Task


class Engine(Protocol):
    """What runs tasks somewhere."""

    @property
    def shared(self) -> bool:
        """Whether every run can read the folders of the others."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Yield an outcome for every task, as runs end."""
        ...


def sweep(
    benchmark: Benchmark,
    folder: Path,
    engine: Engine,
    *,
    cache: Path | None = None,
    plugins: Sequence[Path] = (),
) -> Grid:
    """Run what a sweep's folder lacks, and write its plan.

    Args:
        benchmark: What is compared.
        folder: The sweep's directory: ``plan.json``, ``runs/``, ``logs/``, and ``tuning.json`` where there is tuning.
        engine: Where runs are executed.
        cache: Where prepared images are kept.
        plugins: Python files that every run loads.

    Raises:
        RunError: Runs failed; every one is named, and all others are whole. Or runs that are there have other settings.
        Interrupted: A signal arrived; runs in progress wrote checkpoints.
    """
    with _locked(folder), _signals():
        chosen: Mapping[str, Sequence[str]] = {}
        if benchmark.tuning is not None:

            def tried(jobs: Sequence[Job], place: Path) -> list[Outcome]:
                _refuse_others(jobs, place)
                return _execute(jobs, place, engine, cache, plugins)

            chosen = tune(benchmark, folder, tried)
        grid = expand(benchmark, chosen)
        _refuse_others(grid.jobs, folder)
        write_plan(benchmark, folder, grid, chosen)
        failed = _execute(grid.jobs, folder, engine, cache, plugins)
    if failed:
        lines = "\n  ".join(f"{outcome.name}: {outcome.error}" for outcome in failed)
        raise RunError(
            f"{len(failed)} of {len(grid.jobs)} runs failed; the others are whole, and the same command tries these again:"
            f"\n  {lines}"
        )
    return grid


def write_plan(benchmark: Benchmark, folder: Path, grid: Grid, chosen: Mapping[str, Sequence[str]]) -> None:
    """Write ``plan.json``: the benchmark, its runs, the terms on which methods differ, versions and machine."""
    write_json(
        plan_file(folder),
        {
            "name": benchmark.name,
            "baseline": benchmark.baseline,
            "benchmark": asdict(benchmark),
            "deviations": list(grid.deviations),
            "tuned": {key: list(value) for key, value in chosen.items()},
            "labeleff": __version__,
            "commit": checkout_commit(),
            "environment": environment(),
            "jobs": plan_of(grid.jobs),
        },
    )


def checkout_commit() -> str:
    """Return the commit of the checkout that this package is used from; empty for an installed one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""


def _execute(
    jobs: Sequence[Job], folder: Path, engine: Engine, cache: Path | None, plugins: Sequence[Path]
) -> list[Outcome]:
    """Run the jobs that have no whole result yet, and return those that failed."""
    missing = []
    for job in jobs:
        reason = unfinished(run_folder(folder, job.name))
        if reason:
            if reason.startswith("corrupt"):
                console().print(f"{job.name}: {reason}; it is evaluated again")
                (run_folder(folder, job.name) / "summary.json").unlink(missing_ok=True)
            missing.append(job)
    done = len(jobs) - len(missing)
    console().print(f"{folder}: {len(jobs)} runs, {done} there already, {len(missing)} to do")
    task = partial(_task, folder=folder, cache=cache, plugins=plugins)
    fresh = [job for job in missing if engine.shared and not has_begun(run_folder(folder, job.name))]
    starts = shared_starts(fresh, folder)
    failed: list[Outcome] = []
    with _progress(len(jobs), done) as advance:
        for group in in_order(starts):
            lacking = [start for start in group if not start.ended(folder)]
            tasks = [task(start.recipe, start.folder(folder), start.after, evaluated=False) for start in lacking]
            for outcome in _outcomes(engine, tasks):
                advance(f"{outcome.name}, first stages of several runs: {_end(outcome)}", 0)
        tasks = [task(job.recipe, run_folder(folder, job.name), starts.get(job.name)) for job in missing]
        for number, outcome in enumerate(_outcomes(engine, tasks), done + 1):
            advance(f"[{number}/{len(jobs)}] {outcome.name}: {_end(outcome)}", 1)
            if outcome.error:
                failed.append(outcome)
    return failed


def _refuse_others(jobs: Sequence[Job], folder: Path) -> None:
    """Names leave out what is the default: a run that was made when a default was another must not count as done.

    Raises:
        RunError: There are such runs.
    """
    places = {run_folder(folder, job.name): job for job in jobs}
    found = [place for place, job in places.items() if not_as_planned(place, job.key) == OTHER]
    if found:
        changes = "\n  ".join(diff(load_recipe(found[0] / "recipe.yaml"), places[found[0]].recipe))
        raise RunError(
            f"{found[0]}: {len(found)} of {len(jobs)} runs, this one the first, were made when a default was another; remove "
            f"them to have them run anew, or give another --folder. The difference:\n  {changes}"
        )


def _task(
    recipe: Recipe,
    place: Path,
    start: Start | None,
    *,
    folder: Path,
    cache: Path | None,
    plugins: Sequence[Path],
    evaluated: bool = True,
) -> Task:
    """Return what a worker needs to know. First stages that could not be trained are not waited for."""
    return Task(
        recipe.name,
        to_mapping(recipe),
        place.resolve(),
        (folder / "logs" / f"{recipe.name}.log").resolve(),
        cache,
        tuple(path.resolve() for path in plugins),
        start.folder(folder).resolve() if start is not None and start.ended(folder) else None,
        evaluated,
    )


def _outcomes(engine: Engine, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Yield outcomes as runs end; an engine that is left early ends its runs in order."""
    with contextlib.closing(engine.run(tasks)) as outcomes:  # type: ignore[type-var]
        yield from outcomes


def _end(outcome: Outcome) -> str:
    return f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.0f} s"


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar where somebody looks, and a line per run."""
    if not console().is_terminal:
        yield lambda line, runs: console().print(line)  # noqa: ARG005
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task("runs", total=total, completed=done)

        def advance(line: str, runs: int) -> None:
            bar.console.print(line)
            bar.advance(task, runs)

        yield advance


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{folder}: another sweep is at work in this folder; give another --folder") from error
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into :class:`Interrupted`, so that engines end their runs in order."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, signal.SIG_IGN)
        raise Interrupted(
            f"{signal.Signals(number).name}: runs in progress wrote a checkpoint; the same command goes on"
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_workers(benchmark: Benchmark) -> int:
    """Return how many runs go at a time: one per GPU, or as many as the cores hold at the threads a run asks for."""
    first = next(iter(benchmark.datasets.values()), DataChoice())
    recipe = method_recipe(benchmark, first, benchmark.baseline, [*benchmark.set, *first.set])
    gpus = visible_gpus() if recipe.trainer.accelerator != "cpu" else ()
    return len(gpus) or max(1, cores() // max(1, recipe.trainer.threads))


def visible_gpus() -> tuple[str, ...]:
    """Return the devices this process may use, as in ``CUDA_VISIBLE_DEVICES``."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return tuple(named.split(",")[:count]) if named and count else tuple(str(i) for i in range(count))


def make_engine(name: str, workers: int, *, address: str, shared: bool, gpus: float) -> Engine:
    """Return the engine of that name.

    Raises:
        RunError: There is none.
    """
    if workers < 1:
        raise RunError(f"--workers {workers}: at least one run at a time")
    if name == "local":
        devices = visible_gpus()
        return Local(workers, tuple(devices[i % len(devices)] for i in range(workers)) if devices else ())
    if name == "ray":
        from labeleff.sweep.cluster import Cluster

        cluster: Engine = Cluster(address=address, shared=shared, gpus=gpus)
        return cluster
    raise RunError(f"--engine {name}: there is no such engine; known: local, ray")
