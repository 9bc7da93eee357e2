"""``labeleff budget``: what a run has asked, what was answered, and what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from labeleff import asking, registry
from labeleff.data.rounds import Rounds
from labeleff.errors import DataError, RunError
from labeleff.recipe import Recipe
from labeleff.rundir import recipe_of
from labeleff.runlog import console

COLUMNS = ("regions", "answered", "voxels", "labelled", "foreground", "boundary", "slices", "seconds")


def show_budget(run: Path) -> list[dict[str, Any]]:
    """Print a table of the rounds of a run, and return its rows.

    Raises:
        RunError: There is no run there, or it has asked nothing.
        StoreError: The ledger was changed.
    """
    recipe, rounds = recipe_of(run), Rounds(run)
    rows = asking.summary(rounds, _slice_axis(recipe))
    if not rows:
        raise RunError(f"{run}: this run has asked nothing; give a stage an annotator that asks, such as region_query")
    rounds.verify()
    table = Table("round", *COLUMNS, "by", box=None, pad_edge=False)
    for row in rows:
        table.add_row(str(row["round"]), *(_shown(row[name]) for name in COLUMNS), ", ".join(row["authors"]))
    total = {name: _sum(rows, name) for name in COLUMNS}
    table.add_row("all", *(_shown(total[name]) for name in COLUMNS), "")
    console().print(table)
    if total["labelled"]:
        console().print(f"foreground: {total['foreground'] / total['labelled']:.1%} of what was labelled")
    console().print(_next(recipe, rows))
    return rows


def _next(recipe: Recipe, rows: list[dict[str, Any]]) -> str:
    """Return what one more round would cost, in words."""
    last = rows[-1]
    stage = recipe.stages[last["stage"]]
    options = stage.annotator.options if stage.annotator is not None else {}
    planned = options.get("rounds")
    asked = sum(row["stage"] == last["stage"] for row in rows)
    cost = f"{last['regions']} regions, {last['voxels']} voxels"
    if last["slices"] is not None:
        cost += f", {last['slices']} slices"
    if last["seconds"] is not None:
        cost += f", {last['seconds']:.0f} s"
    if planned is not None and asked >= planned:
        return f"the budget of {options.get('budget'):g} {options.get('unit')} is planned for {planned} rounds, and all were asked"
    return f"one more round, as the last one: {cost}"


def _slice_axis(recipe: Recipe) -> int | None:
    """Return the axis of slices where cases are volumes; None where they are not, or the data are not at hand."""
    if recipe.data.slice_axis is not None:
        return recipe.data.slice_axis
    try:
        spec = recipe.data.dataset
        manifest = registry.made("dataset", spec).manifest()
    except DataError:
        return None
    return int(manifest.slice_axis) if manifest.axes == 3 else None


def _sum(rows: list[dict[str, Any]], name: str) -> Any:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) if values else None


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.0f}"
