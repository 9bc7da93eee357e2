"""``labeleff suspects``: cases whose labels look wrong, ranked, with pictures.

Every labelled training case is judged by a network that was not trained on it; beside that, volumes and numbers of parts
that stand out. Test labels are not opened.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy import ndimage, stats

from labeleff import registry
from labeleff.batch import IGNORE
from labeleff.corruption import open_data
from labeleff.data.formats.base import DataSet
from labeleff.evaluation.inference import segment
from labeleff.files import write_atomically, write_csv
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.recipe import Recipe
from labeleff.recipe_io import load_recipe, to_mapping
from labeleff.report.pictures import draw_case
from labeleff.report.templates import template
from labeleff.results import load_snapshot, snapshot_path
from labeleff.rundir import RunDirectory
from labeleff.runlog import console
from labeleff.runner import resolve, run

MEASURES = ("loss", "flagged", "quality", "dice", "volume", "parts")
"""What cases are ranked by; small quality and Dice are suspicious, large values of the others."""
MAD = 1.4826
LARGEST_PATCH = 128
HEADINGS = {
    "loss": "loss",
    "flagged": "flagged",
    "quality": "quality",
    "dice": "Dice",
    "volume": "volume",
    "parts": "parts",
}


def suspects(
    data: str,
    folder: Path,
    *,
    steps: int = 300,
    folds: int = 3,
    top: int = 12,
    fresh: bool = False,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Train, rank and write ``suspects.csv``, ``index.html`` and ``pictures/``; goes on where an earlier call stopped.

    Args:
        data: A manifest (``.json``), or a recipe for its data, network and patch.
        folder: Where to; the run lies in ``run`` below it.
        steps: Optimiser steps of each network.
        folds: Networks, each without one part of the patients.
        top: Cases that are drawn; pictures of an earlier ranking are removed.
        fresh: Remove the run of an earlier call rather than go on with it.
        cache: Where prepared images are kept.

    Returns:
        One row per case, the most suspicious first: ``rank``, ``score`` (mean of the case's places in all measures, as
        shares: 1 is the most suspicious in all), the measures of :data:`MEASURES`, ``dice:CLASS``, ``parts:CLASS``, and
        ``volume:CLASS`` in ml (in voxels if the spacing of a case is unknown).

    Raises:
        LabeleffError: The data cannot be used.
    """
    recipe = recipe_for(data, steps=steps, folds=folds)
    place = folder / "run"
    run(recipe, place, fresh=fresh, cache=cache)
    recipe = resolve(recipe)
    prepared = prepare(recipe, place, cache=cache)
    rows = ranked(measured(prepared, place))
    write_csv(folder / "suspects.csv", list(rows[0]), rows)
    drawn = _draw(prepared, place, folder, rows[:top])
    _write_page(folder / "index.html", prepared, recipe, rows, drawn)
    _show(rows[:top], folder)
    return rows


def recipe_for(data: str, *, steps: int, folds: int) -> Recipe:
    """Return the run that judges every labelled case by a network that never saw it."""
    if data.endswith(".json"):
        plain: dict[str, Any] = {
            "data": proposed(open_data(data), data),
            "backbone": {"name": "unet", "channels": [16, 32, 64, 128]},
        }
        batch = 16
    else:
        given = load_recipe(data)
        plain = {key: to_mapping(given)[key] for key in ("data", "backbone", "trainer", "seed")}
        batch = given.stages[0].batch
    plain["data"] |= {
        "labelled": "all",
        "unlabelled": "none",
        "validation": 0,
        "evaluate_on": "none",
        "drop_noisy": False,
    }
    stage = {
        "strategy": "supervised",
        "annotator": "label_quality",
        "folds": folds,
        "start": "fresh",
        "steps": steps,
        "batch": batch,
        "optimiser": {"name": "adamw", "lr": 4e-3},
        "schedule": {"name": "cosine", "warmup": min(20, steps)},
        "augment": {"rotate": 20.0, "scale": 0.15, "shift": 0.1, "gain": 0.2, "offset": 0.2},
    }
    return load_recipe({"name": "suspects", **plain, "stages": [stage], "evaluation": {"pictures": False}})


def proposed(dataset: DataSet, path: str) -> dict[str, Any]:
    """Return how a network is to see the cases of a manifest: slice by slice, in patches of the size of a usual slice."""
    manifest = dataset.manifest()
    shapes = [dataset.read_image(case).shape[1:] for case in manifest.cases[:5]]
    axes = [a for a in range(manifest.axes) if manifest.axes == 2 or a != manifest.slice_axis]
    middle = [int(np.median([shape[a] for shape in shapes])) for a in axes]
    patch = [min(LARGEST_PATCH, max(16, 16 * math.ceil(n / 16))) for n in middle]
    return {"dataset": {"name": "manifest", "path": path}, "dimensions": 2, "patch": patch}


def measured(prepared: Prepared, place: Path) -> list[dict[str, Any]]:
    """Return one row per labelled case: what the networks said, and what stands out in volume and number of parts."""
    said: dict[str, list[float | None]] = {}
    for line in (place / "metrics.jsonl").read_text().splitlines():
        said = json.loads(line).get("annotator", said)
    cases = sorted(prepared.split.labelled)
    rows: list[dict[str, Any]] = []
    spacings = {case: prepared.store.spacing(case) for case in cases}
    in_ml = not any(math.isnan(s) for spacing in spacings.values() for s in spacing)  # of all: volumes are compared
    for index, case in enumerate(cases):
        label = prepared.annotations.read_given(case)
        voxel = float(np.prod(spacings[case])) / 1000 if in_ml else 1.0
        own: dict[str, Any] = {"case": case, "patient": prepared.manifest.case(case).patient}
        own |= {_column(name, prepared.task.classes): values[index] for name, values in said.items()}
        for c, name in enumerate(prepared.task.classes[1:], start=1):
            mask = label == c
            own[f"volume:{name}"] = float(mask.sum()) * voxel
            own[f"parts:{name}"] = int(ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim))[1])
        rows.append(own | {"unit": "ml" if in_ml else "voxel"})
    names = prepared.task.classes[1:]
    volumes = np.array([[np.cbrt(row[f"volume:{n}"]) for n in names] for row in rows])
    parts = np.array([[row[f"parts:{n}"] for n in names] for row in rows], float)
    for row, volume, part in zip(rows, outliers(volumes), outliers(parts), strict=True):
        row["volume"], row["parts"] = float(volume), float(part)
    return rows


def _column(name: str, classes: Sequence[str]) -> str:
    """Return what a measure is called in the table: ``dice_2`` is the Dice of a class, and gets its name."""
    measure, _, number = name.partition("_")
    return f"{measure}:{classes[int(number)]}" if number else name


def outliers(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return per case [N] of values [N, classes] the largest distance from the median, in robust standard deviations.

    The deviation of a class is 1.4826 times the median absolute one, or the mean absolute one where that is 0.
    """
    distance = np.abs(values - np.median(values, axis=0))
    scale = MAD * np.median(distance, axis=0)
    scale = np.where(scale > 0, scale, distance.mean(axis=0))
    return np.asarray((distance / np.where(scale > 0, scale, 1.0)).max(axis=1))


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with ``score`` and ``rank``, the most suspicious first; a measure that is missing counts half."""
    places = []
    for name in MEASURES:
        sign = -1 if name in ("quality", "dice") else 1
        values = np.array([np.nan if row.get(name) is None else sign * row[name] for row in rows], float)
        place = np.full(len(rows), 0.5)
        known = ~np.isnan(values)
        if known.sum() > 1:
            place[known] = (stats.rankdata(values[known]) - 1) / (known.sum() - 1)
        places.append(place)
    score = np.stack(places).mean(axis=0).round(12)  # or the order of summation would settle ties
    order = sorted(range(len(rows)), key=lambda i: (-score[i], rows[i]["case"]))
    return [{"rank": n, "score": float(score[i]), **rows[i]} for n, i in enumerate(order, start=1)]


def _draw(prepared: Prepared, place: Path, folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """Draw the given label beside what the network that never saw it says."""
    wanted, drawn = {row["case"]: row for row in rows}, {}
    directory = RunDirectory(place)
    for earlier in (folder / "pictures").glob("*.png"):
        earlier.unlink()
    for index, stage in enumerate(prepared.recipe.stages):
        own = [case for case in prepared.held_out(stage) if case in wanted]
        strategy = registry.made("strategy", stage.strategy)
        backbone = prepared.backbone(0)
        strategy.build(backbone, prepared.task)
        load_snapshot(snapshot_path(directory, index, stage.steps), backbone, strategy)
        viewer = prepared.viewer(backbone)
        for case in own:
            label = prepared.annotations.read_given(case)
            drawn[case] = folder / "pictures" / f"{case}.png"
            draw_case(
                drawn[case],
                prepared.store.read(case)[0],
                np.where(label == IGNORE, 0, label),
                {"never saw it": segment(viewer.probabilities(backbone, case))},
                title=f"{wanted[case]['rank']}. {case}",
                classes=prepared.task.classes,
                slice_axis=prepared.manifest.slice_axis,
                beside="given label",
            )
    return drawn


def _write_page(
    path: Path, prepared: Prepared, recipe: Recipe, rows: Sequence[Mapping[str, Any]], drawn: Mapping[str, Path]
) -> None:
    pictures = {case: base64.b64encode(file.read_bytes()).decode() for case, file in drawn.items()}
    page = template("suspects.html.j2").render(
        name=prepared.manifest.name,
        rows=rows,
        headings=HEADINGS,
        classes=prepared.task.classes[1:],
        unit=rows[0]["unit"],
        pictures=pictures,
        folds=recipe.stages[0].folds,
        steps=recipe.stages[0].steps,
    )
    write_atomically(path, page)


def _show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    table = Table("", "case", "score", *HEADINGS.values(), box=None, pad_edge=False)
    for row in rows:
        numbers = ["–" if row.get(name) is None else f"{row[name]:.3f}" for name in HEADINGS]
        table.add_row(str(row["rank"]), row["case"], f"{row['score']:.2f}", *numbers)
    console().print(table)
    console().print(f"a high score is a reason to look, not a verdict; all cases: {folder / 'suspects.csv'}")
    console().print(f"page: {folder / 'index.html'}")
