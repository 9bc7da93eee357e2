"""Reading a sweep's folder back: what can be counted, and what cannot, by name and with the reason."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labeleff.errors import LabeleffError, RunError, one_line
from labeleff.evaluation.tables import METRICS, read_cases_csv
from labeleff.files import file_digest
from labeleff.recipe_io import load_recipe
from labeleff.sweep.grid import Job, result_key

MEAN = "mean"
OTHER = "its recipe is not the planned one"
Scores = dict[tuple[str, str], dict[str, float]]
"""By class (or ``mean``) and metric: the mean over a patient's cases, by patient; NaN where nothing could be measured."""


@dataclass(frozen=True)
class Record:
    """One run that counts."""

    name: str
    folder: Path
    dataset: str
    method: str
    labelled: str
    draw: int
    seed: int
    fold: int | None
    axes: Mapping[str, Any]
    labels: int
    scores: Scores
    summary: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class LeftOut:
    """A run that does not count, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Collected:
    """Everything a report is made from."""

    name: str
    folder: Path
    plan: Mapping[str, Any]
    records: tuple[Record, ...]
    left_out: tuple[LeftOut, ...]
    openings: Mapping[str, int]
    openings_so_far: Mapping[str, int] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return str(self.plan["baseline"])


def plan_file(folder: Path) -> Path:
    """Return where a sweep says what it consists of."""
    return folder / "plan.json"


def run_folder(folder: Path, name: str) -> Path:
    """Return the directory of one run of a sweep."""
    return folder / "runs" / name


def newest_sweep(folder: Path) -> Path:
    """Return the sweep below a folder whose plan was written last.

    Raises:
        RunError: There is none.
    """
    plans = sorted(folder.glob("*/plan.json"), key=lambda path: path.stat().st_mtime)
    if not plans:
        raise RunError(f"{folder}: no sweep is here; run one (labeleff sweep smoke), or give its folder")
    return plans[-1].parent


def plan_of(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the runs as plain values for ``plan.json``."""
    kept = ("name", "key", "dataset", "method", "labelled", "draw", "seed", "fold")
    return [{key: getattr(job, key) for key in kept} | {"axes": dict(job.axes)} for job in jobs]


def unfinished(folder: Path) -> str:
    """Return why a run directory holds no whole result; empty where it does."""
    summary = folder / "summary.json"
    if not folder.exists() or not (folder / "recipe.yaml").exists():
        return "missing: it has not been run"
    if not summary.exists():
        return "half-finished: it has no summary.json; run the sweep again to go on"
    try:
        found = json.loads(summary.read_text())
        digest = found["cases_sha256"]
        if file_digest(folder / "cases.csv") != digest:
            return "corrupt: cases.csv is not the file that its summary was made with"
        found["results"][0]["dice"], found["labelled_patients"], found["predictor"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return f"corrupt: its summary.json or cases.csv is not readable ({type(error).__name__}: {error})"
    return ""


def collect(folder: Path) -> Collected:
    """Return the runs of a sweep that count, and those that do not.

    A run counts where it is the one planned under its name, complete, undamaged, and tested on the same patients as the
    others of its data set. Copies and runs of no plan are left out.

    Raises:
        RunError: There is no sweep here.
    """
    try:
        plan = json.loads(plan_file(folder).read_text())
        jobs = {job["name"]: job for job in plan["jobs"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{plan_file(folder)}: no readable plan of a sweep ({error}); give the folder of a sweep"
        ) from error
    records, left_out = [], []
    for name, job in jobs.items():
        place = run_folder(folder, name)
        reason = unfinished(place) or not_as_planned(place, job["key"])
        if reason:
            said = _failure(folder, name) if not reason.startswith("corrupt") else ""
            left_out.append(LeftOut(name, reason + said))
            continue
        try:
            records.append(_record(place, job))
        except (LabeleffError, KeyError, TypeError, ValueError) as error:
            left_out.append(LeftOut(name, f"corrupt: {one_line(error, None)}"))
    left_out += _unplanned(folder, jobs)
    records, strange = _same_patients(records)
    return Collected(plan["name"], folder, plan, tuple(records), (*left_out, *strange), *_openings(folder))


def not_as_planned(place: Path, key: str) -> str:
    """Return why a run is not the one with this key; empty where it is."""
    try:
        found = result_key(load_recipe(place / "recipe.yaml"))
    except LabeleffError as error:
        return f"corrupt: its recipe is not readable ({error})"
    return "" if found == key else OTHER


def _failure(folder: Path, name: str) -> str:
    try:
        return f" (it failed: {json.loads((folder / 'logs' / f'{name}.error.json').read_text())['error']})"
    except (OSError, ValueError, KeyError):
        return ""


def _unplanned(folder: Path, jobs: Mapping[str, Mapping[str, Any]]) -> list[LeftOut]:
    """Return the run directories that no plan names: copies of planned runs, and others."""
    keys = {job["key"]: name for name, job in jobs.items()}
    found = []
    for place in sorted((folder / "runs").glob("*")) if (folder / "runs").is_dir() else []:
        if place.name in jobs or not place.is_dir():
            continue
        try:
            original = keys.get(result_key(load_recipe(place / "recipe.yaml")))
        except LabeleffError:
            original = None
        reason = f"duplicate of {original}, which counts alone" if original else "not in the plan of this sweep"
        found.append(LeftOut(place.name, reason))
    return found


def _record(place: Path, job: Mapping[str, Any]) -> Record:
    summary = json.loads((place / "summary.json").read_text())
    rows = [
        row
        for row in read_cases_csv(place / "cases.csv")
        if (row["predictor"], row["selection"]) == (summary["predictor"], summary["selection"])
    ]
    classes = summary["classes"][1:]
    counts = Counter(row["case"] for row in rows)
    if not rows or set(counts.values()) != {len(classes)}:
        raise ValueError("cases.csv does not hold every class of every case once")
    return Record(
        **{key: job[key] for key in ("name", "dataset", "method", "labelled", "draw", "seed", "fold", "axes")},
        folder=place,
        labels=summary["labelled_patients"] + summary.get("validation_patients", 0),
        scores=patient_scores(rows, classes),
        summary=summary,
    )


def scores_by_selection(record: Record) -> dict[str, Scores]:
    """Return the scores of a run's predictor by selection: of the final one, and of any round of questions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_cases_csv(record.folder / "cases.csv"):
        if row["predictor"] == record.summary["predictor"]:
            found.setdefault(row["selection"], []).append(row)
    return {selection: patient_scores(rows, record.summary["classes"][1:]) for selection, rows in found.items()}


def patient_scores(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Scores:
    """Return the score of every patient: per class over its cases, and the mean over classes."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        for metric in METRICS:
            values.setdefault((row["class"], metric), {}).setdefault(row["patient"], []).append(row[metric])
    scores: Scores = {
        key: {patient: _mean(found) for patient, found in by_patient.items()} for key, by_patient in values.items()
    }
    for metric in METRICS:
        patients = list(scores[classes[0], metric])
        scores[MEAN, metric] = {p: _mean([scores[name, metric][p] for name in classes]) for p in patients}
    return scores


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _same_patients(records: Sequence[Record]) -> tuple[list[Record], list[LeftOut]]:
    """Drop runs that were tested on other patients than most runs of their data set (and fold)."""
    groups: dict[tuple[str, int | None], Counter[tuple[str, ...]]] = {}

    def patients(record: Record) -> tuple[str, ...]:
        return tuple(sorted(record.scores[MEAN, "dice"]))

    for record in records:
        groups.setdefault((record.dataset, record.fold), Counter())[patients(record)] += 1
    kept, strange = [], []
    for record in records:
        usual = groups[record.dataset, record.fold].most_common(1)[0][0]
        if patients(record) == usual:
            kept.append(record)
        else:
            strange.append(LeftOut(record.name, "tested on other patients than the runs it would be compared with"))
    return kept, strange


def _openings(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return how often evaluation labels were opened, by data set and part.

    Returns:
        By all runs of the folder, counted or not; and by all runs that share its prepared images, as far as they know.
    """
    here: Counter[str] = Counter()
    so_far: dict[str, int] = {}
    for path in sorted((folder / "runs").glob("*/test_openings.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                name = f"{entry['dataset']} ({entry['evaluated_on']})"
                so_far[name] = max(so_far.get(name, 0), int(entry.get("so_far", 0)))
            except (ValueError, KeyError):
                name = "unreadable line"
            here[name] += 1
    return dict(here), so_far
