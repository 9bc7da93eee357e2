"""Methods beside their baseline on the same label draws: ``python benchmarks/paired.py left_atrium``.

Reads ``benchmarks/suites/NAME.yaml``, runs what is missing (one process and one thread per run), and writes
``benchmarks/results/NAME.json``: every run, and the paired difference to the baseline with an interval over draws.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import provenance, write
from scipy import stats

HERE = Path(__file__).parent


def plan(suite: dict[str, Any], extra: list[str]) -> list[dict[str, Any]]:
    """Return the runs: every recipe at every budget and draw, and the reference."""
    cells = [(method, budget) for budget in suite["labelled"] for method in suite["recipes"]]
    if "reference" in suite:
        cells.append((suite["reference"]["recipe"], suite["reference"]["labelled"]))
    return [
        {
            "method": method,
            "labelled": budget,
            "draw": draw,
            "recipe": suite["recipes"][method],
            "overrides": [f"data.labelled={budget}", f"data.draw={draw}", f"seed={draw}", *extra],
        }
        for draw in suite["draws"]
        for method, budget in cells
    ]


def execute(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one recipe in a process of its own and return what it found."""
    place = folder / f"{job['method']}-{job['labelled']}-{job['draw']}"
    command = [sys.executable, "-m", "labeleff", "run", job["recipe"], *job["overrides"], "--folder", str(place)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        return {**job, "error": done.stderr.strip().splitlines()[-1]}
    summary = json.loads((place / "summary.json").read_text())
    chosen = [
        r
        for r in summary["results"]
        if r["predictor"] == summary["predictor"] and r["selection"] == summary["selection"]
    ]
    return {
        **job,
        "split": summary["split"],
        "dice": {r["class"]: r["dice"] for r in chosen},
        "hd95": {r["class"]: r["hd95"] for r in chosen},
        "unit": chosen[0]["unit"],
        "missed": sum(r["missed"] for r in chosen if r["class"] != "mean"),
        "teacher_dice": next(
            (r["dice"] for r in summary["results"] if r["predictor"] == "teacher" and r["class"] == "mean"), None
        ),
        "steps": summary["steps"],
        "seconds_per_step": summary["training_seconds"] / max(1, sum(summary["steps"])),
        "cases": per_case(place),
    }


def per_case(place: Path) -> dict[str, float]:
    """Return the mean Dice over classes of every case, of the first predictor and the last weights."""
    import csv

    with (place / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]["predictor"]
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["predictor"] == first and row["selection"] == rows[0]["selection"]:
            found.setdefault(row["case"], []).append(float(row["dice"]))
    return {case: round(float(np.nanmean(values)), 4) for case, values in found.items()}


def differences(runs: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return the paired difference of the mean Dice to the baseline, per method and budget, with a t interval over draws."""
    found = []
    for method, budget in dict.fromkeys((r["method"], str(r["labelled"])) for r in runs if r["method"] != baseline):
        pairs = []
        for run in runs:
            if (run["method"], str(run["labelled"])) == (method, budget):
                other = next(
                    r
                    for r in runs
                    if r["method"] == baseline and str(r["labelled"]) == budget and r["draw"] == run["draw"]
                )
                pairs.append(run["dice"]["mean"] - other["dice"]["mean"])
        entry: dict[str, Any] = {
            "method": method,
            "labelled": budget,
            "draws": len(pairs),
            "pairs": pairs,
            "mean": float(np.mean(pairs)),
        }
        if len(pairs) > 1:
            test = stats.ttest_1samp(pairs, 0.0)
            low, high = test.confidence_interval(0.95)
            entry |= {"interval": [float(low), float(high)], "p": float(test.pvalue)}
            entry["verdict"] = "gain" if low > 0 else "loss" if high < 0 else "no evidence of a gain"
        found.append(entry)
    return found


def main() -> None:
    """Run a suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=sorted(p.stem for p in (HERE / "suites").glob("*.yaml")))
    parser.add_argument("overrides", nargs="*", help="key=value for every run, said in the result")
    parser.add_argument("--folder", type=Path, help="run directories; default runs/benchmarks/SUITE")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    suite = yaml.safe_load((HERE / "suites" / f"{arguments.suite}.yaml").read_text())
    folder = arguments.folder or Path("runs/benchmarks") / arguments.suite
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda job: execute(job, folder), plan(suite, arguments.overrides)))
    failed = [run for run in runs if "error" in run]
    for run in failed:
        print(f"failed: {run['method']} {run['labelled']} {run['draw']}: {run['error']}")
    whole = [run for run in runs if "error" not in run]
    result = {"suite": arguments.suite, "overrides": arguments.overrides, **provenance(), "failed": len(failed)}
    result |= {"differences": [] if failed else differences(whole, suite["baseline"]), "runs": whole}
    write(arguments.suite, result)
    for entry in result["differences"]:
        print({k: v for k, v in entry.items() if k != "pairs"})


if __name__ == "__main__":
    main()
