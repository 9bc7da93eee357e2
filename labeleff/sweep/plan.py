"""``labeleff sweep --plan``: what a sweep would cost and the smallest difference it could show, before anything is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy import stats

from labeleff.checking import estimate
from labeleff.evaluation.statistics import FEWEST_DRAWS, FEWEST_FOR_INTERVAL, Spread, detectable_difference
from labeleff.rundir import has_begun
from labeleff.runlog import console
from labeleff.sweep.benchmark import Benchmark
from labeleff.sweep.collect import run_folder, unfinished
from labeleff.sweep.grid import Grid, Job, expand
from labeleff.sweep.starts import shared_starts
from labeleff.sweep.tuning import trial_jobs

TYPICAL: Mapping[str, float] = {"draw": 8.39e-5, "patient": 6.83e-4, "draw:patient": 8.20e-4}
"""Variances of paired Dice differences on the left atrium in ``benchmarks/results``, means over its comparisons."""


def plan(benchmark: Benchmark, folder: Path, *, workers: int, cache: Path | None = None) -> dict[str, Any]:
    """Print and return the grid, its hours from timed steps, and the smallest difference it could show.

    Every method is timed once per data set, at its largest budget. Test labels are not opened.

    Args:
        benchmark: What would be compared.
        folder: The sweep's directory; runs that are there already are not counted.
        workers: Runs at a time.
        cache: Where prepared images are kept.
    """
    grid = expand(benchmark)
    jobs = list(grid.jobs)
    if benchmark.tuning is not None:
        jobs += [job for own in trial_jobs(benchmark, benchmark.tuning).values() for _, job in own]
    costs: dict[tuple[str, str], dict[str, Any]] = {}
    patients = 0
    for job in jobs:
        if (job.dataset, job.method) not in costs:
            found = costs[job.dataset, job.method] = estimate(job.recipe, cache=cache)
            patients = max(patients, found["test_patients"] * max(1, job.recipe.evaluation.folds))
    seconds = {place: found["total_seconds"] for place, found in costs.items()}
    missing = [job for job in jobs if unfinished(_place(folder, job))]
    total = sum(seconds[job.dataset, job.method] for job in missing) - _saved(missing, costs, folder)
    result = {
        "runs": len(jobs),
        "missing": len(missing),
        "hours": total / 3600 / workers,
        "workers": workers,
        "seconds_per_run": {f"{d}/{m}".lstrip("/"): value for (d, m), value in seconds.items()},
        **power(len(benchmark.draws), benchmark.seeds, patients),
    }
    _print(benchmark, grid, result)
    return result


def _saved(missing: Sequence[Job], costs: Mapping[tuple[str, str], Mapping[str, Any]], folder: Path) -> float:
    """Return the seconds that are saved since first stages in common are trained once."""
    saved = 0.0
    for base in (folder, folder / "tuning"):
        waiting = [job for job in missing if _base(folder, job) == base and not has_begun(run_folder(base, job.name))]
        trained: dict[str, float] = {}
        starts = shared_starts(waiting, base)
        for job in waiting:
            found, start = costs[job.dataset, job.method], starts.get(job.name)
            stages = [one * found["steps"][name] for name, one in found["seconds_per_step"].items()]
            saved += sum(stages[: len(start.recipe.stages)]) if start is not None else 0.0
            while start is not None:
                before = len(start.after.recipe.stages) if start.after is not None else 0
                trained[start.key] = sum(stages[before : len(start.recipe.stages)])
                start = start.after
        saved -= sum(trained.values())
    return saved


def _base(folder: Path, job: Job) -> Path:
    return folder / "tuning" if job.recipe.data.evaluate_on == "development" else folder


def _place(folder: Path, job: Job) -> Path:
    return run_folder(_base(folder, job), job.name)


def power(draws: int, seeds: int, patients: int) -> dict[str, Any]:
    """Return what a design can show: the detectable difference (from six draws on) and the half width of an interval.

    Both assume that paired differences vary as they did on the left atrium (:data:`TYPICAL`).
    """
    found = Spread(0.0, math.inf, dict(TYPICAL))
    numbers = {"draw": draws, "seed": seeds, "patient": patients}
    variance = sum(v / math.prod(numbers[part] for part in name.split(":")) for name, v in TYPICAL.items())
    half = float(stats.t.ppf(0.975, max(1, draws - 1))) * math.sqrt(variance) if draws >= FEWEST_FOR_INTERVAL else None
    detectable = detectable_difference(found, draws, patients, seeds=seeds) if draws >= FEWEST_DRAWS else None
    return {"detectable_difference": detectable, "half_width": half}


def _print(benchmark: Benchmark, grid: Grid, result: Mapping[str, Any]) -> None:
    out = console()
    table = Table(
        "data set", "method", "labelled patients", "draws × seeds", "runs", "minutes each", box=None, pad_edge=False
    )
    for dataset, method in dict.fromkeys((job.dataset, job.method) for job in grid.jobs):
        own = [job for job in grid.jobs if (job.dataset, job.method) == (dataset, method)]
        budgets = ", ".join(dict.fromkeys(job.labelled for job in own))
        repeats = f"{len({job.draw for job in own})} × {benchmark.seeds}"
        minutes = result["seconds_per_run"][f"{dataset}/{method}".lstrip("/")] / 60
        table.add_row(dataset or benchmark.base, method, budgets, repeats, str(len(own)), f"{minutes:.1f}")
    out.print(table)
    for line in grid.deviations:
        out.print(f"not on equal terms: {line}")
    out.print(
        f"{result['missing']} of {result['runs']} runs to do: about {result['hours']:.2g} hours with {result['workers']} at a time"
    )
    if result["half_width"] is None:
        out.print(
            f"fewer than {FEWEST_FOR_INTERVAL} draws: no interval and no test; nothing can be shown about other draws"
        )
    elif result["detectable_difference"] is None:
        out.print(
            f"{len(benchmark.draws)} draws are too few for a test (six are needed); "
            f"expect intervals of ± {result['half_width']:.3f} Dice"
        )
    else:
        out.print(
            f"the smallest difference that would be found in 4 of 5 such sweeps: {result['detectable_difference']:.3f} Dice"
        )
    out.print("(if paired differences vary as they did on the left atrium)")
