"""``labeleff evaluate``: a trained run is measured again, as it was at its end or on cases that are not tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from labeleff.errors import RunError
from labeleff.folds import fold_folder, pool_folds
from labeleff.recipe import Recipe
from labeleff.results import Results, compare
from labeleff.rundir import RunDirectory, is_trained, recipe_of
from labeleff.runner import Run, resolve
from labeleff.signals import stopping_at_once


def evaluate(folder: Path, *, on: Literal["test", "development"] = "test", cache: Path | None = None) -> dict[str, Any]:
    """Evaluate a run whose stages are finished from its last checkpoint; nothing is trained.

    On ``test`` all that a run writes at its end is written again, and ``summary.json`` last, in one piece; where nothing has
    changed, every number is the same. A run with a baseline is compared with it anew, and folds are pooled anew. Every opening
    of test labels is logged, as in ``labeleff run``.

    Args:
        folder: The run directory.
        on: ``test``: what the recipe says (``data.evaluate_on``); ``development``: all cases with a label that are not of the
            test list, see :meth:`labeleff.results.Results.on_development`. The results of the run stay as they are.
        cache: Where prepared images are kept.

    Returns:
        What ``summary.json`` holds (with a baseline: ``comparison.json``), or ``development.json``.

    Raises:
        RunError: There is no run, its stages are not finished, or its last checkpoint is gone.
    """
    folder = Path(folder)
    recipe = recipe_of(folder)
    if recipe.evaluation.folds and recipe.evaluation.fold is None:
        if on == "development":
            raise RunError(f"{folder}: this run has folds; evaluate one of them: {fold_folder(folder, 0)}")
        parts = [evaluate(fold_folder(folder, fold), cache=cache) for fold in range(recipe.evaluation.folds)]
        return pool_folds(recipe, folder, parts)
    baseline = folder / "baseline"
    if on == "development" or not (baseline / "recipe.yaml").is_file():
        return _one(recipe, folder, on, cache)
    results = {
        "baseline": _one(recipe_of(baseline), baseline, on, cache),
        recipe.name: _one(recipe, folder, on, cache),
    }
    return compare(recipe, folder, results)


def _one(recipe: Recipe, folder: Path, on: str, cache: Path | None) -> dict[str, Any]:
    """Evaluate the run of one folder."""
    resolved, directory = resolve(replace(recipe, baseline=())), RunDirectory(folder)
    with directory.locked(), stopping_at_once():
        state, notes = directory.load_checkpoint()
        if not is_trained(resolved, state):
            raise RunError(f"{folder}: {_unfinished(resolved, directory, state, notes)}")
        run = Run(resolved, directory, cache)
        strategy = run.go_on(state)
        results = Results(resolved, directory, run.data, run.log)
        if on == "development":
            return results.on_development(run.backbone, strategy)
        return results.finish(run.backbone, strategy, run.history, run.seconds, run.images)


def _unfinished(recipe: Recipe, directory: RunDirectory, state: Any, notes: list[str]) -> str:
    """Return why a run cannot be evaluated."""
    if directory.summary.exists():
        gone = f"its last checkpoint is {'damaged' if notes else 'gone'}, which all predictors are in"
        return f"{gone}; labeleff predict still has the first one, and labeleff run --fresh starts over"
    stage, step = (state["stage"], state["step"]) if state is not None else (0, 0)
    place = f"stage {stage} of 0 … {len(recipe.stages) - 1}, step {step} of {recipe.stages[stage].steps}"
    return f"its stages are not finished ({place}); labeleff run goes on with it"
