"""Cells of a sweep: all runs of one method at one budget on one data set, and what is measured of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.evaluation.statistics import Interval
from labeleff.sweep.collect import MEAN, Collected, Record

PRIMARY = (MEAN, "dice")
LOWER_IS_BETTER = ("hd95", "assd")
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """All runs of one method, variant of it, and budget, on one data set."""

    dataset: str
    method: str
    labelled: str
    labels: int
    axes: Mapping[str, Any]
    runs: Mapping[tuple[int, int], tuple[Record, ...]]

    def scores(self, place: tuple[int, int], what: tuple[str, str]) -> dict[str, float]:
        """Return the score of every patient at a draw and seed, folds joined."""
        return {p: v for record in self.runs[place] for p, v in record.scores[what].items()}


def variant(record: Record) -> str:
    """Return the name of a line: the method and, where further keys are varied, their values."""
    axes = ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in record.axes.items())
    return f"{record.method} ({axes})" if axes else record.method


def make_cells(found: Collected) -> tuple[list[Cell], list[str]]:
    """Return runs by data set, variant and budget, and what had to be left out to keep them complete."""
    folds = {job["dataset"]: set[Any]() for job in found.plan["jobs"]}
    for job in found.plan["jobs"]:
        folds[job["dataset"]].add(job["fold"])
    groups: dict[tuple[str, str, str], dict[tuple[int, int], list[Record]]] = {}
    for record in found.records:
        key = (dataset_of(record), variant(record), record.labelled)
        groups.setdefault(key, {}).setdefault((record.draw, record.seed), []).append(record)
    cells, notes = [], []
    for (dataset, method, labelled), places in groups.items():
        whole = {}
        for place, records in places.items():
            lacking = folds[records[0].dataset] - {record.fold for record in records}
            if lacking:
                said = ", ".join(str(fold) for fold in sorted(lacking))
                notes.append(f"{method} at {labelled} labels, draw {place[0]}, seed {place[1]}: fold {said} is missing")
            else:
                whole[place] = tuple(sorted(records, key=lambda r: r.fold or 0))
        if whole:
            first = next(iter(whole.values()))[0]
            cells.append(Cell(dataset, method, labelled, first.labels, first.axes, whole))
    return sorted(cells, key=lambda c: (c.dataset, c.labels)), notes


def dataset_of(record: Record) -> str:
    """Return the name of the data set that a run counts for."""
    return record.dataset or str(record.summary["dataset"])


def aligned(cells: Sequence[Cell], what: tuple[str, str]) -> tuple[list[NDArray[np.float64]], int]:
    """Return scores [draw, seed, patient] of several cells on the draws, seeds and patients that all of them have.

    Returns:
        One array per cell, of equal shapes, and the number of patients that could not be measured in every run.
    """
    places = set.intersection(*(set(cell.runs) for cell in cells))
    seeds = sorted({seed for _, seed in places})
    draws = [draw for draw in sorted({draw for draw, _ in places}) if all((draw, seed) in places for seed in seeds)]
    tables = [{(d, s): cell.scores((d, s), what) for d in draws for s in seeds} for cell in cells]
    every = [table for own in tables for table in own.values()]
    listed = sorted(set.intersection(*(set(table) for table in every))) if every else []
    patients = [p for p in listed if all(math.isfinite(table[p]) for table in every)]
    arrays = [np.array([[[own[d, s][p] for p in patients] for s in seeds] for d in draws]) for own in tables]
    return arrays, len(listed) - len(patients)


def baseline_of(cell: Cell, cells: Sequence[Cell], baseline: str) -> Cell | None:
    """Return the baseline's cell that a cell is compared with: same budget, same values of the keys both have."""
    for other in cells:
        record = next(iter(other.runs.values()))[0]
        if record.method != baseline or other.labelled != cell.labelled:
            continue
        if all(cell.axes.get(key) == value for key, value in other.axes.items()):
            return other
    return None


def is_baseline(cell: Cell, baseline: str) -> bool:
    """Return whether the runs of a cell are the baseline's."""
    return next(iter(cell.runs.values()))[0].method == baseline


def bounds(found: Interval, low: str = "low", high: str = "high") -> Row:
    """Return the bounds of an interval as columns of a row."""
    return {low: found.low, high: found.high}


def possible(found: Interval, metric: str) -> Interval:
    """Return an interval without the values that a metric cannot take."""
    if found.low is None or found.high is None:
        return found
    most = math.inf if metric in LOWER_IS_BETTER else 1.0
    return replace(found, low=max(0.0, found.low), high=min(most, found.high))
