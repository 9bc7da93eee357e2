"""Settings chosen on development patients: as many trials for every method, the baseline included, then frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from labeleff.batch import derive_seed
from labeleff.errors import RunError
from labeleff.files import write_json
from labeleff.sweep.benchmark import Benchmark, DataChoice, Tuning
from labeleff.sweep.collect import run_folder, unfinished
from labeleff.sweep.grid import Job, method_recipe, result_key
from labeleff.sweep.worker import Outcome

Execute = Callable[[Sequence[Job], Path], Sequence[Outcome]]


def trials(tuning: Tuning, method: str) -> list[list[str]]:
    """Return the settings to try for a method, the method as it stands first; drawn without replacement, by name.

    A method without a declared space has its one setting; a space smaller than the number of trials is tried whole.
    """
    space = tuning.space.get(method, {})
    sizes = [len(values) for values in space.values()]
    total = int(np.prod(sizes)) if sizes else 0
    order = np.random.default_rng(derive_seed("tuning", method)).permutation(total)[: tuning.trials - 1]
    found: list[list[str]] = [[]]
    for number in order:
        where = np.unravel_index(int(number), sizes)
        found.append(
            [f"{key}={json.dumps(values[int(i)])}" for (key, values), i in zip(space.items(), where, strict=True)]
        )
    return found


def trial_jobs(benchmark: Benchmark, tuning: Tuning) -> dict[str, list[tuple[list[str], Job]]]:
    """Return the trial runs by ``dataset/method``. They are evaluated on development patients only."""
    found: dict[str, list[tuple[list[str], Job]]] = {}
    for dataset, choice in (benchmark.datasets or {"": DataChoice()}).items():
        for method, spec in benchmark.methods.items():
            for number, settings in enumerate(trials(tuning, method)):
                recipe = method_recipe(
                    benchmark,
                    choice,
                    method,
                    [
                        *benchmark.set,
                        *choice.set,
                        *spec.set,
                        *settings,
                        f"data.labelled={tuning.labelled}",
                        f"data.draw={tuning.draw}",
                        f"seed={tuning.draw}",
                        "data.evaluate_on=development",
                        f"data.development={tuning.development}",
                        "evaluation.folds=0",
                        "evaluation.fold=null",
                        "evaluation.pictures=false",
                    ],
                )
                key = result_key(recipe)
                name = "-".join(part for part in (dataset, method, f"trial{number}", key) if part)
                job = Job(
                    name,
                    key,
                    dataset,
                    method,
                    str(tuning.labelled),
                    tuning.draw,
                    0,
                    None,
                    {},
                    replace(recipe, name=name),
                )
                found.setdefault(f"{dataset}/{method}", []).append((settings, job))
    return found


def tune(benchmark: Benchmark, folder: Path, execute: Execute) -> dict[str, list[str]]:
    """Run the trials, write ``tuning.json``, and return the chosen settings by ``dataset/method``.

    Chosen is the highest mean Dice on the development patients; the earlier trial of equals.

    Raises:
        RunError: A trial failed: a method with fewer trials than another would not be on equal terms.
    """
    assert benchmark.tuning is not None  # noqa: S101  callers have looked
    place = folder / "tuning"
    jobs = trial_jobs(benchmark, benchmark.tuning)
    failed = execute([job for own in jobs.values() for _, job in own], place)
    if failed:
        raise RunError(
            f"{len(failed)} tuning trials failed, so that methods would not be on equal terms; the first: "
            f"{failed[0].name}: {failed[0].error}"
        )
    log: dict[str, Any] = {}
    chosen: dict[str, list[str]] = {}
    for key, own in jobs.items():
        dice = [_dice(run_folder(place, job.name)) for _, job in own]
        best = max(range(len(own)), key=lambda i: (dice[i], -i))
        chosen[key] = own[best][0]
        found = [{"settings": own[i][0], "dice": dice[i], "run": own[i][1].name} for i in range(len(own))]
        log[key] = {"trials": found, "chosen": best, "development": _development(run_folder(place, own[0][1].name))}
    write_json(folder / "tuning.json", log)
    return chosen


def _dice(place: Path) -> float:
    reason = unfinished(place)
    if reason:
        raise RunError(f"{place}: {reason}")
    summary = json.loads((place / "summary.json").read_text())
    chosen: Mapping[str, Any] = next(
        entry
        for entry in summary["results"]
        if (entry["predictor"], entry["selection"], entry["class"])
        == (summary["predictor"], summary["selection"], "mean")
    )
    return float(chosen["dice"])


def _development(place: Path) -> dict[str, Any]:
    """Return the development cases and their hash: fixed, listed, never used for claims."""
    cases = json.loads((place / "split.json").read_text())["test"]
    return {"cases": cases, "hash": hashlib.sha256(json.dumps(cases).encode()).hexdigest()[:16]}
