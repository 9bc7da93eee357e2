"""What the local engine loses: the same runs one at a time and two at a time, one thread each.

Parallel efficiency is the time of all runs one after the other, over twice the time with two workers; 1 is perfect. The
machine's own limit is measured beside it: the same number of bare matrix products, alone and in two processes.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import provenance, write

from labeleff.sweep.benchmark import parse_benchmark
from labeleff.sweep.local import Local
from labeleff.sweep.orchestrate import sweep

ROUNDS, RUNS, STEPS = 3, 8, 120


def sweep_seconds(workers: int, cache: Path) -> float:
    """Return the time of a sweep of equal runs."""
    benchmark = parse_benchmark(
        {
            "name": "efficiency",
            "base": "phantom/supervised",
            "methods": ["supervised"],
            "labelled": [2],
            "draws": RUNS,
            "steps": STEPS,
            "set": ["data.dataset.patients=20", "data.dataset.test=10", "evaluation.pictures=false"],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        sweep(benchmark, Path(folder), Local(workers), cache=cache)
        return time.perf_counter() - began


def burn(times: int) -> None:
    """Multiply matrices on one thread."""
    import torch

    torch.set_num_threads(1)
    one = torch.rand(512, 512)
    for _ in range(times):
        one @ one


def burn_seconds(workers: int) -> float:
    """Return the time of ``RUNS`` loads on so many processes."""
    began = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(burn, [400] * RUNS, chunksize=1)
    return time.perf_counter() - began


def main() -> None:
    """Measure in alternation and write the result."""
    found: dict[str, list[float]] = {"sweep 1": [], "sweep 2": [], "machine 1": [], "machine 2": []}
    with tempfile.TemporaryDirectory() as cache:
        sweep_seconds(2, Path(cache))  # prepares the images
        for _ in range(ROUNDS):
            for workers in (1, 2):
                found[f"machine {workers}"].append(burn_seconds(workers))
                found[f"sweep {workers}"].append(sweep_seconds(workers, Path(cache)))
    medians = {name: statistics.median(values) for name, values in found.items()}
    result: dict[str, Any] = {
        **provenance(),
        "runs": RUNS,
        "steps": STEPS,
        "seconds": found,
        "efficiency": medians["sweep 1"] / (2 * medians["sweep 2"]),
        "efficiency_of_the_machine": medians["machine 1"] / (2 * medians["machine 2"]),
    }
    write("sweep_efficiency", result)
    print({key: value for key, value in result.items() if key.startswith("efficiency")})


if __name__ == "__main__":
    main()
