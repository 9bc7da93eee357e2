"""What is said about runs and sweeps on the terminal, and what TensorBoard shows of a sweep."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from labeleff.errors import RunError
from labeleff.evaluation.forecasting import Forecast, NoGround
from labeleff.evaluation.tables import read_cases_csv
from labeleff.report.analysis import Analysis
from labeleff.report.cells import PRIMARY, aligned, make_cells
from labeleff.report.words import between, number
from labeleff.runlog import console
from labeleff.sweep.collect import Collected, patient_scores, unfinished


def say(analysis: Analysis) -> None:
    """Print the answer, the table of differences, and what was left out."""
    out = console()
    for dataset, sentences in analysis.answers.items():
        out.print(f"[bold]{dataset}[/]: {' '.join(sentences)}")
    table = Table(
        "data set", "labels", "method", "Dice", "95 %", f"to {analysis.baseline}", "95 %", "", box=None, pad_edge=False
    )
    differences = {
        (row["dataset"], row["method"], row["labelled"]): row
        for row in analysis.tables["differences"]
        if (row["class"], row["metric"]) == PRIMARY
    }
    for row in analysis.tables["curves"]:
        if (row["class"], row["metric"]) == PRIMARY:
            found = differences.get((row["dataset"], row["method"], row["labelled"]))
            table.add_row(
                row["dataset"],
                str(row["labels"]),
                row["method"],
                number(row["mean"]),
                between(row),
                number(found["difference"], signed=True) if found else "",
                between(found, signed=True) if found else "",
                found["verdict"] if found else "",
            )
    out.print(table)
    if analysis.tables["budget_areas"]:
        out.print(_areas(analysis))
    for row in analysis.tables["left_out"]:
        out.print(f"[yellow]left out[/] {row['run']}: {row['reason']}")
    for note in analysis.notes:
        out.print(f"[yellow]left out[/] {note}")


def _areas(analysis: Analysis) -> Table:
    """Return the areas under the budget curve of methods that ask."""
    titles = ("data set", "labels", "method", "voxels", "foreground", "area", "95 %", f"to {analysis.baseline}", "95 %")
    table = Table(*titles, "", title="area under the budget curve", title_justify="left", box=None, pad_edge=False)
    for row in analysis.tables["budget_areas"]:
        table.add_row(
            row["dataset"],
            str(row["labels"]),
            row["method"],
            number(row["voxels"], 0),
            number(row["foreground"]),
            number(row["area"]),
            between({"low": row["area_low"], "high": row["area_high"]}),
            number(row["difference"], signed=True) if row["difference"] is not None else "",
            between(row, signed=True),
            row["verdict"],
        )
    return table


def compare_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Print runs side by side, with the paired difference to the first where they were tested on the same patients.

    Raises:
        RunError: One of the folders holds no whole run.
    """
    runs = [_read_run(folder) for folder in folders]
    classes = list(dict.fromkeys(name for run in runs for name in run["dice"]))
    table = Table("run", "labels", *classes, "seconds", "to the first", "95 % of patients", box=None, pad_edge=False)
    for run in runs:
        patients = sorted(set(runs[0]["patients"]) & set(run["patients"]))
        same = set(runs[0]["patients"]) == set(run["patients"]) and run is not runs[0]
        difference, interval = "", "" if same or run is runs[0] else "other test patients"
        if same:
            values = np.array([run["patients"][p] - runs[0]["patients"][p] for p in patients])
            values = values[np.isfinite(values)]
            difference = number(float(values.mean()), signed=True)
            if len(values) > 1 and np.ptp(values) > 0:
                low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
                interval = between({"low": float(low), "high": float(high)}, signed=True)
            run["difference"] = float(values.mean())
        table.add_row(
            str(run["folder"]),
            str(run["labels"]),
            *(number(run["dice"].get(name)) for name in classes),
            f"{run['seconds']:.0f}",
            difference,
            interval,
        )
    console().print(table)
    console().print(
        "mean Dice; intervals are over test patients, for these training runs only: no ranking can be read from this"
    )
    return runs


def _read_run(folder: Path) -> dict[str, Any]:
    reason = unfinished(folder)
    if reason:
        raise RunError(f"{folder}: {reason}")
    summary = json.loads((folder / "summary.json").read_text())
    chosen = (summary["predictor"], summary["selection"])
    rows = [row for row in read_cases_csv(folder / "cases.csv") if (row["predictor"], row["selection"]) == chosen]
    entries = [e for e in summary["results"] if (e["predictor"], e["selection"]) == chosen]
    return {
        "folder": folder,
        "labels": summary["labelled_patients"],
        "dice": {entry["class"]: entry["dice"] for entry in entries},
        "seconds": summary["training_seconds"],
        "patients": patient_scores(rows, summary["classes"][1:])[PRIMARY],
    }


def forecast(
    found: Collected, target: float, *, method: str | None = None, upto: int | None = None
) -> list[dict[str, Any]]:
    """Print and return how many labels a score takes, for every data set of a sweep.

    Args:
        found: The sweep.
        target: Mean Dice, a share.
        method: Whose curve; default: the baseline's.
        upto: Use budgets up to this one only (to see how good a forecast would have been).
    """
    method = method or found.baseline
    cells, _ = make_cells(found)
    results = []
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        own = {cell.labels: cell for cell in cells if cell.dataset == dataset and cell.method == method}
        budgets = sorted(own)
        known = [n for n in budgets if upto is None or n <= upto]
        result: dict[str, Any] = {"dataset": dataset, "method": method, "budgets": known, "target": target}
        try:
            arrays, _ = aligned([own[n] for n in known], PRIMARY) if known else ([], 0)
            curve = Forecast(known, arrays)
        except NoGround as error:
            console().print(f"{dataset}, {method}: no forecast: {error}")
            results.append(result | {"refused": str(error)})
            continue
        needed = curve.needed(target)
        result["needed"] = needed
        console().print(f"{dataset}: {said(method, known, target, needed)}")
        for n in budgets:
            if n > known[-1] and n <= needed.limit:
                expected = curve.at(n)
                (scores,), _ = aligned([own[n]], PRIMARY)
                result.setdefault("checked", {})[n] = (expected, float(scores.mean()))
                bounds = {"low": expected.low, "high": expected.high}
                console().print(
                    f"  at {n}: forecast {number(expected.value)} {between(bounds)}, observed {number(scores.mean())}"
                )
        results.append(result)
    return results


def said(method: str, budgets: Sequence[int], target: float, needed: Any) -> str:
    """Return a forecast in one sentence."""
    ground = f"(from {len(budgets)} budgets, {budgets[0]} to {budgets[-1]}; 95 % interval)"
    if needed.reached < 0.5:
        return (
            f"{method} is not expected to reach {target:.3f} Dice within {needed.limit:.0f} labelled patients: "
            f"{100 * needed.reached:.0f} % of the resampled curves do {ground}"
        )
    high = f"{needed.high:.0f}" if math.isfinite(needed.high) else f"more than {needed.limit:.0f}"
    where = "is expected to reach" if needed.labels > budgets[-1] else "reaches"
    return (
        f"{method} {where} {target:.3f} Dice with about {math.ceil(needed.labels)} labelled patients, "
        f"{math.ceil(needed.low)} to {high} {ground}"
    )


def write_tensorboard(analysis: Analysis, folder: Path) -> None:
    """Write hyper-parameters and scores of every run, and a curve of score against labels per method."""
    if folder.exists():
        shutil.rmtree(folder)
    from torch.utils.tensorboard import SummaryWriter

    for row in analysis.tables["runs"]:
        if row["dice"] is None:
            continue
        keys = ("dataset", "method", "labels", "draw", "seed")
        with SummaryWriter(str(folder)) as writer:
            writer.add_hparams(
                {key: row[key] for key in keys},
                {"test/dice": row["dice"]},
                run_name=f"runs/{row['run']}",
                global_step=0,
            )
    for dataset, method in dict.fromkeys((row["dataset"], row["method"]) for row in analysis.tables["curves"]):
        with SummaryWriter(str(folder / "curves" / f"{dataset}-{method}")) as writer:
            for row in analysis.tables["curves"]:
                if (row["dataset"], row["method"]) == (dataset, method) and row["class"] == "mean":
                    writer.add_scalar(f"{row['metric']} by labelled patients", row["mean"], row["labels"])
