"""The budget curve of methods that ask: Dice over what they were told on request, the area under it, and what it cost.

A run is measured before every revision of its last stage and at its end (``evaluation.rounds``). What it had been told by
then is read from its summary by stage and step, since a revision may ask nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from labeleff.evaluation import statistics
from labeleff.evaluation.tables import ROUND
from labeleff.recipe_io import load_recipe
from labeleff.report.cells import PRIMARY, Cell, Row, aligned, baseline_of, bounds, is_baseline, possible
from labeleff.report.words import verdict
from labeleff.sweep.collect import Record, scores_by_selection

FEWEST_AMOUNTS = 3
"""Amounts told, none included, below which there is no curve: two points are a line between start and end."""
COSTS = ("regions", "labelled", "foreground", "boundary", "slices", "seconds")
UNTOLD = ("slices", "seconds")
"""Costs that a run may not know: slices are for volumes, seconds for people."""

Told = Mapping[str, float | None]
Patients = Mapping[str, float]
"""A value of every patient."""


@dataclass(frozen=True)
class Evaluation:
    """A run at one time.

    Args:
        told: What it had been told by then, by kind of cost; None where that is not known.
        dice: Mean Dice over classes, by patient.
    """

    told: Told
    dice: Patients

    @property
    def voxels(self) -> float:
        """Voxels whose label it had been told on request."""
        return self.told["labelled"] or 0.0


@dataclass(frozen=True)
class Asking:
    """A cell whose runs ask, and the evaluations of each run by its name, all equally many."""

    cell: Cell
    runs: Mapping[str, Sequence[Evaluation]]

    @property
    def amounts(self) -> int:
        """Different amounts told, none included, of the run that has fewest."""
        return min(len({found.voxels for found in run}) for run in self.runs.values())

    def cost(self, number: int, kind: str) -> float | None:
        """Return a cost up to an evaluation, as the mean over runs; None where no run knows it."""
        known = [value for run in self.runs.values() if (value := run[number].told[kind]) is not None]
        return sum(known) / len(known) if known else None

    def share(self, number: int, kind: str) -> float | None:
        """Return the share of a kind of voxels in all that were labelled up to an evaluation; None before the first."""
        labelled = self.cost(number, "labelled")
        return (self.cost(number, kind) or 0.0) / labelled if labelled else None

    def scored(self, values: Mapping[str, Patients]) -> Cell:
        """Return the cell with other scores of patients, by run."""
        runs = {
            place: tuple(replace(record, scores={PRIMARY: dict(values[record.name])}) for record in records)
            for place, records in self.cell.runs.items()
        }
        return replace(self.cell, runs=runs)

    def spent(self, number: int) -> Row:
        """Return what had been spent up to an evaluation, as columns of a row."""
        return {
            "regions": self.cost(number, "regions"), "voxels": self.cost(number, "labelled"),
            "slices": self.cost(number, "slices"), "seconds": self.cost(number, "seconds"),
            "foreground": self.share(number, "foreground"), "boundary": self.share(number, "boundary"),
        }  # fmt: skip


def asking(cells: Sequence[Cell]) -> list[Asking]:
    """Return the cells whose runs ask and are measured before every revision."""
    found = []
    for cell in cells:
        records = [record for own in cell.runs.values() for record in own]
        if any(record.summary.get("rounds") for record in records):
            runs = {record.name: evaluations(record) for record in records}
            if all(runs.values()):
                found.append(Asking(cell, runs))
    return found


def evaluations(record: Record) -> list[Evaluation]:
    """Return a run before every revision of its last stage and at its end; nothing where it was measured at the end only."""
    stages = load_recipe(record.folder / "recipe.yaml").stages
    times = {f"{ROUND}{k}": (len(stages) - 1, step) for k, step in enumerate(stages[-1].revisions)}
    scores = scores_by_selection(record)
    if not times or not scores.keys() >= times.keys():
        return []
    times[record.summary["selection"]] = (len(stages), 0)
    rounds = record.summary["rounds"]
    return [
        Evaluation(_told([r for r in rounds if (r["stage"], r["step"]) < time], rounds), scores[selection][PRIMARY])
        for selection, time in times.items()
    ]


def _told(before: Sequence[Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]) -> Told:
    """Return sums over the rounds before a time; None for what no round of the run knows."""
    return {
        kind: sum(one[kind] or 0 for one in before)
        if kind not in UNTOLD or any(one[kind] is not None for one in rounds)
        else None
        for kind in COSTS
    }


def area(run: Sequence[Evaluation]) -> Patients:
    """Return the mean Dice of every patient over the voxels told to a run, by trapezoids; of equal amounts the last counts."""
    curve = {found.voxels: found.dice for found in run}
    patients = list(run[-1].dice)
    table = np.array([[dice[patient] for dice in curve.values()] for patient in patients])
    return dict(zip(patients, map(float, statistics.area(list(curve), table)), strict=True))


def mean_of_evaluations(run: Sequence[Evaluation]) -> Patients:
    """Return the mean Dice of every patient over the evaluations of a run."""
    return {patient: float(np.mean([found.dice[patient] for found in run])) for patient in run[-1].dice}


def round_rows(one: Asking) -> Iterator[Row]:
    """Yield a row per evaluation: 0 before any question of the last stage, the last one at the end of the run."""
    for number in range(len(next(iter(one.runs.values())))):
        (scores,), _ = aligned([one.scored({name: run[number].dice for name, run in one.runs.items()})], PRIMARY)
        if scores.size:
            found = possible(statistics.interval(scores), "dice")
            yield {
                **_head(one.cell), "round": number, **one.spent(number), "dice": found.value, **bounds(found),
                "draws": scores.shape[0], "patients": scores.shape[2],
            }  # fmt: skip


def area_rows(found: Sequence[Asking], baseline: str) -> list[Row]:
    """Return a row per method that asks: its area, the paired difference to the baseline's, and all it was told."""
    curves = [
        one.scored({name: area(run) for name, run in one.runs.items()})
        for one in found
        if one.amounts >= FEWEST_AMOUNTS
    ]
    rows = [row for one in found for row in _area_row(one, curves, baseline)]
    for row, p in zip(rows, statistics.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
        row["verdict"] = _in_words(row)
    return rows


def _area_row(one: Asking, curves: Sequence[Cell], baseline: str) -> Iterator[Row]:
    (steps,), _ = aligned([one.scored({name: mean_of_evaluations(run) for name, run in one.runs.items()})], PRIMARY)
    if not steps.size:
        return
    average = possible(statistics.interval(steps), "dice")
    row: Row = {
        **_head(one.cell), "baseline": None, "amounts": one.amounts, "area": None, "area_low": None, "area_high": None,
        "difference": None, "low": None, "high": None, "p": None, "p_holm": None, "draws": steps.shape[0],
        "patients": steps.shape[2], "verdict": "", "area_steps": average.value,
        **bounds(average, "steps_low", "steps_high"), **one.spent(-1),
    }  # fmt: skip
    own = next((cell for cell in curves if _head(cell) == _head(one.cell)), None)
    if own is not None:
        (ours,), _ = aligned([own], PRIMARY)
        mean = possible(statistics.interval(ours), "dice")
        row |= {"area": mean.value, **bounds(mean, "area_low", "area_high")}
        other = None if is_baseline(own, baseline) else baseline_of(own, curves, baseline)
        if other is not None:
            row |= _difference(own, other)
    yield row


def _difference(own: Cell, other: Cell) -> Row:
    """Return the paired difference of two areas, as columns of a row; nothing where they share no draw."""
    (ours, theirs), _ = aligned([own, other], PRIMARY)
    if not ours.size:
        return {}
    found = statistics.compare(ours, theirs)
    return {
        "baseline": other.method, "difference": found.interval.value, **bounds(found.interval), "p": found.p,
        "draws": found.draws, "patients": ours.shape[2],
    }  # fmt: skip


def _in_words(row: Row) -> str:
    if row["area"] is None:
        return f"{'told nothing' if row['amounts'] < FEWEST_AMOUNTS - 1 else 'asks once'}: no curve"
    return verdict(row) if row["difference"] is not None else ""


def _head(cell: Cell) -> Row:
    return {"dataset": cell.dataset, "method": cell.method, "labelled": cell.labelled, "labels": cell.labels}
