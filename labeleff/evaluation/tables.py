"""Tables of results: per case as CSV, per class with counts and intervals, on the terminal."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from labeleff.errors import DataError
from labeleff.files import write_csv

METRICS = ("dice", "iou", "hd95", "assd")
COUNTS = ("missed", "spurious", "absent")
SIZES = ("reference_voxels", "predicted_voxels")
FURTHER = ("nsd", "volume_error")
"""Metrics that no method is compared by; tables of cases that were written before there were any lack them."""
COLUMNS = (
    "case", "patient", "domain", "predictor", "selection", "class", *METRICS, "unit", *COUNTS, *SIZES, *FURTHER,
)  # fmt: skip
MEAN = "mean"
FEWEST_PATIENTS = 5
ROUND = "round_"
"""Selection of the predictor as it was before a revision of the last stage, with the number of revisions before it."""


def write_cases_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per case, predictor, selection and class, in a fixed order of columns, atomically."""

    def plain(value: Any) -> Any:
        return f"{value:.6f}" if isinstance(value, float) else int(value) if isinstance(value, bool) else value

    write_csv(path, COLUMNS, ({key: plain(value) for key, value in row.items()} for row in rows))


def read_cases_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that :func:`write_cases_csv` wrote.

    Raises:
        DataError: It is missing, or is not such a file.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) not in (COLUMNS, COLUMNS[: -len(FURTHER)]):
                raise ValueError(f"its columns are {reader.fieldnames}")
            return [_typed(row) for row in reader]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no readable table of cases ({error})") from error


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = dict(row)
    found.update({metric: float(row[metric]) for metric in METRICS})
    found.update({count: bool(int(row[count])) for count in COUNTS})
    found.update({size: int(row[size]) for size in SIZES})
    found.update({metric: float(row.get(metric) or "nan") for metric in FURTHER})
    return found


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry per selection, predictor and class, and their mean over classes.

    Means run from cases to classes to the mean of class means; voxels are never pooled. The interval is a 95 % bootstrap
    interval of the mean Dice over test patients: it says nothing about another training run, and is None below five.
    """
    entries = []
    for selection, predictor in dict.fromkeys((r["selection"], r["predictor"]) for r in rows):
        own = [r for r in rows if (r["selection"], r["predictor"]) == (selection, predictor)]
        head = {"selection": selection, "predictor": predictor}
        by_class = [
            head | {"class": name} | _summary([r for r in own if r["class"] == name])
            for name in dict.fromkeys(r["class"] for r in own)
        ]
        entries += by_class
        overall = {metric: _mean([entry[metric] for entry in by_class]) for metric in (*METRICS, *FURTHER)}
        counts = {count: sum(entry[count] for entry in by_class) for count in COUNTS}
        patients = _patient_means(own)
        entries.append(
            head
            | {"class": MEAN, **overall, "unit": by_class[0]["unit"], "cases": max(e["cases"] for e in by_class)}
            | {"patients": len(patients), **counts, "dice_interval": _interval(patients)}
        )
    return entries


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    patients = _patient_means(rows)
    return {
        **{metric: _mean([row[metric] for row in rows]) for metric in METRICS},
        **{metric: _mean([row.get(metric) for row in rows]) for metric in FURTHER},
        "unit": rows[0]["unit"],
        "cases": len(rows),
        "patients": len(patients),
        **{count: sum(bool(row[count]) for row in rows) for count in COUNTS},
        "dice_interval": _interval(patients),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and not np.isnan(v)]
    return float(np.mean(known)) if known else None


def _patient_means(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the mean Dice of every patient: over classes of the mean over the patient's cases."""
    means = []
    for patient in dict.fromkeys(row["patient"] for row in rows):
        classes: dict[str, list[float]] = {}
        for row in rows:
            if row["patient"] == patient and not np.isnan(row["dice"]):
                classes.setdefault(row["class"], []).append(row["dice"])
        if classes:
            means.append(float(np.mean([np.mean(values) for values in classes.values()])))
    return means


def _interval(values: Sequence[float]) -> list[float] | None:
    if len(values) < FEWEST_PATIENTS or np.ptp(values) == 0:
        return None
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    )
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def rich_table(name: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of one run for the terminal; it fits into 80 columns."""
    unit = results[0]["unit"] if results else "voxel"
    table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("predictor", "class", "Dice", "95 %", "IoU", f"HD95 {unit}", "ASSD", "missed", "spurious"):
        table.add_column(title, justify="left" if title in ("predictor", "class") else "right")
    for entry in results:
        weights = "" if entry["selection"] == "last" else f" {entry['selection']}"
        marked = f"{entry['predictor']}{weights}{' (not a result)' if entry['selection'] == 'oracle' else ''}"
        table.add_row(
            marked, entry["class"], _number(entry["dice"], 3), _range(entry["dice_interval"]), _number(entry["iou"], 3),
            _number(entry["hd95"], 1), _number(entry["assd"], 2), str(entry["missed"]), str(entry["spurious"]),
            style="bold" if entry["class"] == MEAN else None,
        )  # fmt: skip
    return table


def rich_comparison(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Return a table of several runs side by side: mean Dice of every predictor's chosen weights, by class."""
    names = list(runs)
    table = Table(title="side by side: mean Dice", title_justify="left")
    for title in ("class", *names):
        table.add_column(title, justify="left" if title == "class" else "right")
    tops = {name: _first_predictor(results) for name, results in runs.items()}
    for label in dict.fromkeys(label for top in tops.values() for label in top):
        cells = [
            f"{_number(top[label]['dice'], 3)} {_range(top[label]['dice_interval'])}" if label in top else ""
            for top in tops.values()
        ]
        table.add_row(label, *cells, style="bold" if label == MEAN else None)
    return table


def _first_predictor(results: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    first = (results[0]["selection"], results[0]["predictor"])
    return {r["class"]: r for r in results if (r["selection"], r["predictor"]) == first}


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"
