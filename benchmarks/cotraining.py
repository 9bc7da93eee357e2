"""Ensembles and single views of a sweep of co-training, each against its own continuation without co-training.

    labeleff sweep cotraining_phantom
    python benchmarks/cotraining.py cotraining_phantom

Reads the finished runs of ``runs/sweeps/NAME``. Per method: Dice of the ensemble, and the mean over views of the Dice of each
view alone; both as paired differences to the same of the suite's baseline (to its network, where it has one), by draw and test
patient. Writes ``results/NAME_views.json``, with the per-case table of the ensemble.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import provenance, write
from numpy.typing import NDArray

from labeleff.evaluation.statistics import compare, interval
from labeleff.evaluation.tables import MEAN, read_cases_csv
from labeleff.sweep.collect import Record, collect, patient_scores

PRIMARY = (MEAN, "dice")


def scores(record: Record) -> dict[str, dict[str, float]]:
    """Return the Dice of every patient by predictor, and that of ``mean view``."""
    rows = [
        row for row in read_cases_csv(record.folder / "cases.csv") if row["selection"] == record.summary["selection"]
    ]
    classes = record.summary["classes"][1:]
    found = {
        name: dict(patient_scores([row for row in rows if row["predictor"] == name], classes)[PRIMARY])
        for name in dict.fromkeys(row["predictor"] for row in rows)
    }
    views = [values for name, values in found.items() if name.startswith("view_")]
    if views:
        found["mean view"] = {patient: float(np.mean([view[patient] for view in views])) for patient in views[0]}
    return found


def matrix(runs: Sequence[dict[str, dict[str, float]]], predictor: str) -> NDArray[np.float64]:
    """Return [draws, 1, patients] of one predictor."""
    patients = sorted(runs[0][predictor])
    return np.array([[[run[predictor][patient] for patient in patients]] for run in runs])


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the suite")
    parser.add_argument("--sweep", type=Path, help="folder of the sweep; default runs/sweeps/NAME")
    arguments = parser.parse_args()
    found = collect(arguments.sweep or Path("runs/sweeps") / arguments.name)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    for record in sorted(found.records, key=lambda record: record.draw):
        runs.setdefault(record.method, []).append(scores(record))
    rows: list[dict[str, Any]] = []
    for method, own in runs.items():
        for predictor in own[0]:
            cells = matrix(own, predictor)
            value = interval(cells)
            row: dict[str, Any] = {"method": method, "predictor": predictor, "draws": len(own)}
            row |= {"dice": value.value, "low": value.low, "high": value.high}
            against = runs[found.baseline]
            # a single network is compared with whatever a method has
            same = predictor if predictor in against[0] else next(iter(against[0]))
            views = "mean view" in against[0]
            if method != found.baseline and (same == predictor or not views) and len(against) == len(own):
                other = compare(cells, matrix(against, same))
                bounds = other.interval
                row["difference"] = {"mean": bounds.value, "low": bounds.low, "high": bounds.high, "p": other.p}
            rows.append(row)
            if predictor in ("ensemble", "mean view", next(iter(own[0]))):
                said = {key: round(part, 4) for key, part in row.get("difference", {}).items() if part is not None}
                print(
                    f"{method:24} {predictor:10} {value.value:.3f} [{value.low or 0:.3f}, {value.high or 0:.3f}]", said
                )
    cases = {
        method: {predictor: [run[predictor] for run in own] for predictor in own[0]} for method, own in runs.items()
    }
    write(f"{arguments.name}_views", {**provenance(), "baseline": found.baseline, "rows": rows, "patients": cases})


if __name__ == "__main__":
    main()
