"""Cross-validation: every labelled patient is tested once, by a run that never saw it. Each fold is a run of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from labeleff.evaluation.tables import read_cases_csv, summarise, write_cases_csv
from labeleff.files import file_digest, write_atomically, write_json
from labeleff.recipe import Recipe
from labeleff.recipe_io import to_yaml
from labeleff.results import show


def one_fold(recipe: Recipe, fold: int) -> Recipe:
    """Return the recipe of one fold. Drawing, warm starts and pseudo-labels all happen inside its training part."""
    return replace(recipe, name=f"{recipe.name}-fold-{fold}", evaluation=replace(recipe.evaluation, fold=fold))


def fold_folder(folder: Path, fold: int) -> Path:
    """Return where the run of a fold lives."""
    return folder / f"fold-{fold}"


def pool_folds(recipe: Recipe, folder: Path, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write and show the pooled result of all folds: ``recipe.yaml``, ``cases.csv`` and ``summary.json``.

    Args:
        recipe: The run with all its folds.
        folder: Its directory.
        parts: Summaries of the folds; of runs with a baseline, the comparison.
    """
    whole = [part.get("runs", {}).get(one_fold(recipe, i).name, part) for i, part in enumerate(parts)]
    rows = [row for i in range(len(parts)) for row in read_cases_csv(fold_folder(folder, i) / "cases.csv")]
    write_atomically(folder / "recipe.yaml", to_yaml(recipe))
    write_cases_csv(folder / "cases.csv", rows)
    first = whole[0]
    kept = ("labeleff", "dataset", "classes", "selection", "predictor", "steps", "images_per_step", "parameters")
    summary = {
        "name": recipe.name,
        **{key: first[key] for key in kept},
        "folds": len(parts),
        "splits": [part["split"] for part in whole],
        "labelled_patients": first["labelled_patients"],
        "test_patients": sum(part["test_patients"] for part in whole),
        "evaluated_on": "folds",
        "notes": [f"{len(parts)} folds: each patient tested once, by a run that did not train on it"],
        "warnings": [{"fold": i, **one} for i, part in enumerate(whole) for one in part.get("warnings", ())],
        "results": summarise(rows),
        "training_seconds": round(sum(part["training_seconds"] for part in whole), 1),
        "cases_sha256": file_digest(folder / "cases.csv"),
    }
    write_json(folder / "summary.json", summary)
    show(recipe.name, summary)
    return summary
