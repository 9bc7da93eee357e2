"""From collected runs to tables: curves, differences, savings, ranks, and the answer in words.

Every table is a list of rows of plain values. The page, the CSV files and the terminal show these rows and compute nothing.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from labeleff.evaluation import statistics
from labeleff.evaluation.tables import METRICS
from labeleff.files import write_json
from labeleff.report import budgets, labels
from labeleff.report.cells import (
    LOWER_IS_BETTER,
    PRIMARY,
    Cell,
    Row,
    aligned,
    baseline_of,
    bounds,
    dataset_of,
    is_baseline,
    make_cells,
    possible,
    variant,
)
from labeleff.report.words import answer, verdict
from labeleff.sweep.collect import MEAN, Collected, Record

TABLES: Mapping[str, tuple[str, ...]] = {
    "curves": (
        "dataset", "method", "labelled", "labels", "class", "metric", "mean", "low", "high", "draws", "seeds", "patients",
        "missed", "spurious", "unmeasured",
    ),
    "differences": (
        "dataset", "method", "baseline", "labelled", "labels", "class", "metric", "difference", "low", "high", "p", "p_holm",
        "p_these_runs", "effect_size", "draws", "patients", "verdict",
    ),
    "savings": (
        "dataset", "method", "baseline", "labelled", "labels", "factor", "low", "high", "censored", "limit", "gap_closed",
    ),
    "areas": ("dataset", "method", "scale", "from", "to", "area", "low", "high", "difference", "difference_low", "difference_high"),
    "ranks": ("dataset", "labelled", "labels", "method", "rank", "share", "tau_dice_hd95"),
    "cost": (
        "dataset", "method", "labelled", "labels", "dice", "steps", "seconds", "images_with_gradient", "images_without",
        "parameters",
    ),
    "cases": ("dataset", "method", "baseline", "labelled", "patient", "dice", "baseline_dice"),
    "runs": (
        "dataset", "method", "labelled", "labels", "draw", "seed", "fold", "dice", "hd95", "seconds", "split", "run",
    ),
    "training_iou": (
        "dataset", "method", "labelled", "labels", "draw", "seed", "fold", "run", "stage", "class", "due_since", "skipped",
        "curve",
    ),
    "diagnostics": (
        "dataset", "method", "labelled", "labels", "draw", "seed", "fold", "run", "stage", "step", "class",
        "early_learning", "memorisation", "label_iou",
    ),
    "corrections": (
        "dataset", "method", "labelled", "labels", "from", "to", "runs", "voxels", "share", "confidence", "first_step",
        "last_step",
    ),
    "rounds": (
        "dataset", "method", "labelled", "labels", "round", "regions", "voxels", "slices", "seconds", "foreground",
        "boundary", "dice", "low", "high", "draws", "patients",
    ),
    "budget_areas": (
        "dataset", "method", "baseline", "labelled", "labels", "amounts", "area", "area_low", "area_high", "difference",
        "low", "high", "p", "p_holm", "draws", "patients", "verdict", "area_steps", "steps_low", "steps_high", "regions",
        "voxels", "slices", "seconds", "foreground", "boundary",
    ),
    "published": ("method", "labelled", "dice", "source", "selection"),
    "left_out": ("run", "reason"),
    "openings": ("labels", "times", "so_far"),
    "machines": ("runs", "gpus", "cpu", "cores", "system", "python", "torch", "labeleff"),
}  # fmt: skip
"""Columns of every table, in order."""


@dataclass(frozen=True)
class Analysis:
    """What a report shows."""

    name: str
    baseline: str
    answers: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, list[Row]]
    classes: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    collected: Collected = field(repr=False)


def analyse(found: Collected) -> Analysis:
    """Return everything a report says about a sweep."""
    cells, notes = make_cells(found)
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    classes: dict[str, tuple[str, ...]] = {}
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        own = [cell for cell in cells if cell.dataset == dataset]
        names = next(iter(own[0].runs.values()))[0].summary["classes"][1:]
        classes[dataset] = (MEAN, *names) if len(names) > 1 else (MEAN,)
        for cell in own:
            tables["curves"] += _curve_rows(cell, classes[dataset])
            tables["cost"].append(_cost_row(cell))
        tables["differences"] += _difference_rows(own, found.baseline, classes[dataset])
        tables["savings"] += list(_savings_rows(own, found.baseline))
        tables["areas"] += list(_area_rows(own, found.baseline))
        tables["ranks"] += list(_rank_rows(own))
        tables["cases"] += list(_case_rows(own, found.baseline))
        asking = budgets.asking(own)
        tables["rounds"] += [row for one in asking for row in budgets.round_rows(one)]
        tables["budget_areas"] += budgets.area_rows(asking, found.baseline)
        for cell in own:
            head = {"dataset": cell.dataset, "method": cell.method, "labelled": cell.labelled, "labels": cell.labels}
            records = [record for run in cell.runs.values() for record in run]
            for record in records:
                place = head | {"draw": record.draw, "seed": record.seed, "fold": record.fold, "run": record.name}
                tables["training_iou"] += list(labels.training_iou_rows(record, place))
                tables["diagnostics"] += list(labels.diagnostic_rows(record, place))
            tables["corrections"] += list(labels.correction_rows(records, head))
    tables["runs"] = [_run_row(record) for record in found.records]
    tables["published"] = [dict(entry) for entry in found.plan["benchmark"].get("published", [])]
    tables["left_out"] = [{"run": entry.name, "reason": entry.reason} for entry in found.left_out]
    tables["openings"] = [
        {"labels": name, "times": times, "so_far": found.openings_so_far.get(name) or None}
        for name, times in found.openings.items()
    ]
    tables["machines"] = _machine_rows(found.records)
    references = found.plan["benchmark"].get("references", ())
    answers = {dataset: answer(dataset, found.baseline, tables, references) for dataset in classes}
    return Analysis(found.name, found.baseline, answers, tables, classes, tuple(notes), found)


def write_export(analysis: Analysis, path: Path) -> None:
    """Write all tables, the benchmark, versions and machine as one JSON file; ``inf`` becomes the text ``inf``."""
    plan = analysis.collected.plan
    value: dict[str, Any] = {
        "name": analysis.name,
        "answers": {dataset: list(sentences) for dataset, sentences in analysis.answers.items()},
        **{key: plan[key] for key in ("benchmark", "deviations", "tuned", "labeleff", "commit", "environment")},
        "notes": list(analysis.notes),
        "tables": {name: [_plain(row, name) for row in rows] for name, rows in analysis.tables.items()},
    }
    value["tables"]["scores"] = [
        {key: getattr(r, key) for key in ("dataset", "labelled", "draw", "seed", "fold")}
        | {"method": variant(r), "patients": {p: _finite(v) for p, v in sorted(r.scores[PRIMARY].items())}}
        for r in analysis.collected.records
    ]
    write_json(path, value)


def _plain(row: Row, table: str) -> Row:
    return {key: _finite(row[key]) for key in TABLES[table]}


def _finite(value: Any) -> Any:
    """Return a value that JSON can hold: floats rounded, ``inf`` and ``nan`` as text."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else str(value)


# -- tables -------------------------------------------------------------------------------------------------------------


def _machine_rows(records: Sequence[Record]) -> list[Row]:
    """Return how many of the runs that count were made where, and with which versions; most first."""
    runs: Counter[tuple[Any, ...]] = Counter()
    for record in records:
        try:
            found = json.loads((record.folder / "environment.json").read_text())
            machine = (", ".join(found["gpus"]), *(found[key] for key in ("cpu", "cores", "system", "python")))
            runs[*machine, found["packages"]["torch"], found["packages"]["labeleff"]] += 1
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of an earlier version, or damaged: its results are checked by themselves
    columns = TABLES["machines"]
    return [dict(zip(columns, (count, *machine), strict=True)) for machine, count in runs.most_common()]


def _curve_rows(cell: Cell, classes: Sequence[str]) -> Iterator[Row]:
    for name in classes:
        for metric in METRICS:
            (scores,), lost = aligned([cell], (name, metric))
            if not scores.size:
                continue
            found = statistics.interval(scores)
            yield {
                "dataset": cell.dataset, "method": cell.method, "labelled": cell.labelled, "labels": cell.labels,
                "class": name, "metric": metric, "mean": found.value, **bounds(possible(found, metric)),
                "draws": scores.shape[0], "seeds": scores.shape[1], "patients": scores.shape[2],
                "missed": _count(cell, name, "missed"), "spurious": _count(cell, name, "spurious"), "unmeasured": lost,
            }  # fmt: skip


def _count(cell: Cell, name: str, what: str) -> float:
    """Return the mean number of cases of a kind per run (folds joined)."""
    totals = [sum(float(_entry(record, name)[what]) for record in records) for records in cell.runs.values()]
    return sum(totals) / len(totals)


def _entry(record: Record, name: str) -> Mapping[str, Any]:
    summary = record.summary
    chosen: Mapping[str, Any] = next(
        entry
        for entry in summary["results"]
        if (entry["predictor"], entry["selection"], entry["class"])
        == (summary["predictor"], summary["selection"], name)
    )
    return chosen


def _difference_rows(cells: Sequence[Cell], baseline: str, classes: Sequence[str]) -> list[Row]:
    """Return paired differences to the baseline; p values are adjusted within a data set, class and metric."""
    rows: list[Row] = []
    for name in classes:
        for metric in METRICS:
            own = [
                row
                for cell in cells
                if not is_baseline(cell, baseline) and (other := baseline_of(cell, cells, baseline)) is not None
                for row in _difference(cell, other, name, metric)
            ]
            for row, p in zip(own, statistics.holm([row["p"] for row in own]), strict=True):
                row["p_holm"] = p
                row["verdict"] = verdict(row, lower_is_better=metric in LOWER_IS_BETTER)
            rows += own
    return rows


def _difference(cell: Cell, other: Cell, name: str, metric: str) -> Iterator[Row]:
    (ours, theirs), _ = aligned([cell, other], (name, metric))
    if not ours.size:
        return
    found = statistics.compare(ours, theirs)
    yield {
        "dataset": cell.dataset, "method": cell.method, "baseline": other.method, "labelled": cell.labelled,
        "labels": cell.labels, "class": name, "metric": metric, "difference": found.interval.value,
        **bounds(found.interval), "p": found.p, "p_holm": None, "p_these_runs": found.p_these_runs,
        "effect_size": found.effect_size, "draws": found.draws, "patients": ours.shape[2], "verdict": "",
    }  # fmt: skip


def _curve_of(cell: Cell, cells: Sequence[Cell], baseline: str) -> list[Cell]:
    """Return the baseline's cells at rising budgets that a cell is compared with."""
    chosen = [c for c in cells if is_baseline(c, baseline) and all(cell.axes.get(k) == v for k, v in c.axes.items())]
    by_labels = {c.labels: c for c in chosen}
    return [by_labels[n] for n in sorted(by_labels)]


def _savings_rows(cells: Sequence[Cell], baseline: str) -> Iterator[Row]:
    for cell in cells:
        curve = _curve_of(cell, cells, baseline)
        if is_baseline(cell, baseline) or len(curve) < 2:
            continue
        arrays, _ = aligned([cell, *curve], PRIMARY)
        if not arrays[0].size:
            continue
        found = statistics.savings([float(c.labels) for c in curve], arrays[1:], arrays[0], float(cell.labels))
        same = next((array for c, array in zip(curve, arrays[1:], strict=True) if c.labels == cell.labels), None)
        closed = None
        if same is not None and curve[-1].labels > cell.labels:
            closed = statistics.gap_closed(float(arrays[0].mean()), float(same.mean()), float(arrays[-1].mean()))
        yield {
            "dataset": cell.dataset, "method": cell.method, "baseline": curve[0].method, "labelled": cell.labelled,
            "labels": cell.labels, "factor": found.factor, "low": found.low, "high": found.high,
            "censored": found.censored, "limit": found.limit, "gap_closed": closed,
        }  # fmt: skip


def _area_rows(cells: Sequence[Cell], baseline: str) -> Iterator[Row]:
    """Yield the area under each line over the budgets it shares with the baseline, as a mean score over them."""
    for method in dict.fromkeys(cell.method for cell in cells):
        line = {cell.labels: cell for cell in cells if cell.method == method}
        first = next(iter(line.values()))
        other = {cell.labels: cell for cell in _curve_of(first, cells, baseline)}
        budgets = sorted(set(line) & set(other))
        if len(budgets) < 2:
            continue
        arrays, _ = aligned([*(line[n] for n in budgets), *(other[n] for n in budgets)], PRIMARY)
        if not arrays[0].size:
            continue
        ours, theirs = np.stack(arrays[: len(budgets)], -1), np.stack(arrays[len(budgets) :], -1)
        for scale in ("linear", "log"):
            area = statistics.interval(statistics.area(budgets, ours, scale=scale))
            row = {
                "dataset": first.dataset, "method": method, "scale": scale, "from": budgets[0], "to": budgets[-1],
                "area": area.value, **bounds(area), "difference": None, "difference_low": None, "difference_high": None,
            }  # fmt: skip
            if not is_baseline(first, baseline):
                gain = statistics.interval(statistics.area(budgets, ours - theirs, scale=scale))
                row |= {"difference": gain.value, **bounds(gain, "difference_low", "difference_high")}
            yield row


def _rank_rows(cells: Sequence[Cell]) -> Iterator[Row]:
    """Yield how often each line takes each rank when draws, seeds and patients are drawn again."""
    for labelled in dict.fromkeys(cell.labelled for cell in cells):
        own = [cell for cell in cells if cell.labelled == labelled]
        if len(own) < 2:
            continue
        arrays, _ = aligned(own, PRIMARY)
        distances, _ = aligned(own, (MEAN, "hd95"))
        if not arrays[0].size or arrays[0].shape[0] < 2:
            continue
        tau = None
        if distances[0].size:
            tau = statistics.rank_agreement([a.mean() for a in arrays], [-d.mean() for d in distances])
        shares = statistics.rank_shares(arrays)
        for cell, share in zip(own, shares, strict=True):
            for rank, value in enumerate(share):
                yield {
                    "dataset": cell.dataset, "labelled": labelled, "labels": cell.labels, "method": cell.method,
                    "rank": rank + 1, "share": float(value), "tau_dice_hd95": tau,
                }  # fmt: skip


def _cost_row(cell: Cell) -> Row:
    records = [record for own in cell.runs.values() for record in own]
    first = records[0].summary
    images = {"with_gradient": 0, "without": 0}
    for steps, seen in zip(first["steps"], first["images_per_step"], strict=True):
        for kind in images:
            images[kind] += steps * seen.get(kind, 0)
    (scores,), _ = aligned([cell], PRIMARY)
    return {
        "dataset": cell.dataset, "method": cell.method, "labelled": cell.labelled, "labels": cell.labels,
        "dice": float(scores.mean()) if scores.size else None, "steps": sum(first["steps"]),
        "seconds": float(np.mean([record.summary["training_seconds"] for record in records])),
        "images_with_gradient": images["with_gradient"], "images_without": images["without"],
        "parameters": first["parameters"],
    }  # fmt: skip


def _case_rows(cells: Sequence[Cell], baseline: str) -> Iterator[Row]:
    for cell in cells:
        other = baseline_of(cell, cells, baseline)
        if other is None or is_baseline(cell, baseline):
            continue
        places = sorted(set(cell.runs) & set(other.runs))
        tables = [[c.scores(place, PRIMARY) for place in places] for c in (cell, other)]
        for patient in sorted(tables[0][0]) if places else []:
            means = [float(np.mean([table[patient] for table in own])) for own in tables]
            if all(map(math.isfinite, means)):
                yield {
                    "dataset": cell.dataset, "method": cell.method, "baseline": other.method, "labelled": cell.labelled,
                    "patient": patient, "dice": means[0], "baseline_dice": means[1],
                }  # fmt: skip


def _run_row(record: Record) -> Row:
    def mean(metric: str) -> float | None:
        values = [v for v in record.scores[MEAN, metric].values() if math.isfinite(v)]
        return float(np.mean(values)) if values else None

    return {
        "dataset": dataset_of(record), "method": variant(record), "labelled": record.labelled, "labels": record.labels,
        "draw": record.draw, "seed": record.seed, "fold": record.fold, "dice": mean("dice"), "hd95": mean("hd95"),
        "seconds": record.summary["training_seconds"], "split": record.summary["split"], "run": record.name,
    }  # fmt: skip
