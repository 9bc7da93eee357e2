"""``labeleff corrupt``: a copy of a data set whose training labels are wrong, and a report of how wrong."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table

from labeleff import registry
from labeleff.data.formats.base import DataSet
from labeleff.data.formats.files import readable
from labeleff.data.manifest import Case, Manifest, Source, write_manifest
from labeleff.data.noise.measure import Achieved
from labeleff.data.raters import check_alone
from labeleff.errors import RunError
from labeleff.files import write_atomically, write_json
from labeleff.labels import make_noise
from labeleff.recipe import Component
from labeleff.recipe_io import load_recipe
from labeleff.report.pictures import draw_noise
from labeleff.runlog import console


def corrupt(data: str, noise: Component, folder: Path) -> dict[str, Any]:
    """Write ``manifest.json``, ``labels/``, ``noise.json`` and ``pictures/``; the manifest comes last.

    Labels of training cases are made wrong; those of validation and test cases stay. Images stay where they are, unless
    they are generated or of a format that a manifest does not name: then they are written as ``.npz``.

    Args:
        data: A manifest, or a recipe (file or shipped name) for its data set.
        noise: The noise model.
        folder: A folder that is new or empty.

    Returns:
        What ``noise.json`` holds.

    Raises:
        RunError: The folder holds something already.
        DataError: The data cannot be read.
        RecipeError: Cases have several raters.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: not empty; a noisy copy is made in a folder of its own")
    dataset = open_data(data)
    manifest, model = dataset.manifest(), make_noise(noise)
    check_alone(manifest, data)
    achieved, cases = Achieved(manifest.classes), []
    for case in track(manifest.cases, description="corrupting", console=console(), transient=True):
        wrong = None
        if case.role == "train" and case.label is not None:
            clean = dataset.read_label(case)
            found = model.corrupt(
                clean, case=case.id, names=manifest.classes, spacing=case.spacing, slice_axis=manifest.slice_axis
            )
            wrong = found.label
            achieved.add(case.id, clean, wrong, spacing=case.spacing, strength=found.strength)
        cases.append(written(case, dataset, folder, wrong))
    summary = {"model": {"name": noise.name, **noise.options}, **achieved.summary()}
    _draw(dataset, manifest, cases, achieved, folder)
    write_json(folder / "noise.json", summary)
    write_manifest(
        replace(manifest, name=f"{manifest.name}-{noise.name}", cases=tuple(cases)), folder / "manifest.json"
    )
    _show(summary, folder)
    return summary


def open_data(data: str) -> DataSet:
    """Return the data set of a manifest file or of a recipe."""
    if data.endswith(".json"):
        found: DataSet = registry.build("dataset", "manifest", path=data)
        return found
    component = load_recipe(data).data.dataset
    made: DataSet = registry.made("dataset", component)
    return made


def written(case: Case, dataset: DataSet, folder: Path, new: NDArray[np.uint8] | None) -> Case:
    """Return the case for a manifest in a folder: with a new label, and files written where there were none to name."""
    image, label = case.image, case.label
    if "image" not in dataset.verbatim or not all(readable(s) and s.path.is_file() for s in image):
        image = (_save(folder / "images" / f"{case.id}.npz", "image", dataset.read_image(case)),)
    if new is not None:
        label = _save(folder / "labels" / f"{case.id}.npz", "label", new)
    elif label is not None and not (
        "label" in dataset.verbatim and readable(label) and all(part.path.is_file() for part in label.parts)
    ):
        label = _save(folder / "labels" / f"{case.id}.npz", "label", dataset.read_label(case))
    return replace(case, image=image, label=label)


def _save(path: Path, key: str, array: NDArray[Any]) -> Source:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **{key: array})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return Source(path, key)


def _draw(dataset: DataSet, manifest: Manifest, cases: list[Case], achieved: Achieved, folder: Path) -> None:
    """Draw the cases that were changed least, most and in between."""
    reader = registry.build("dataset", "manifest", path=str(folder / "manifest.json"))
    reader.head = manifest
    written = {case.id: case for case in cases}

    def maps(name: str) -> tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.uint8]]:
        original = manifest.case(name)
        return dataset.read_image(original)[0], dataset.read_label(original), reader.read_label(written[name])

    draw_noise(
        folder / "pictures",
        achieved.rows,
        maps,
        called="noisy",
        among="all cases",
        classes=manifest.classes,
        slice_axis=manifest.slice_axis,
    )


def _show(summary: dict[str, Any], folder: Path) -> None:
    table = Table(
        "class", "Dice", "IoU, pooled", "ASSD", "volume", "objects missed", "invented", box=None, pad_edge=False
    )
    for name, found in summary["classes"].items():
        distance, volume = found["assd"], found["volume_error"]
        table.add_row(
            name,
            "–" if found["dice"] is None else f"{found['dice']:.3f}",
            f"{found['iou_pooled']:.3f}",
            "–" if distance is None else f"{distance:.2f} {found['unit']}",
            "–" if volume is None else f"{volume:+.0%}",
            f"{found['objects_missed']} of {found['objects']}",
            str(found["objects_spurious"]),
        )
    console().print(table)
    console().print(
        f"noise level {summary['noise_level']:.3f} (1 - pooled foreground IoU; mean IoU with background "
        f"{summary['mean_iou_with_background']:.3f}), {summary['cases_touched']} of {summary['cases']} training cases changed"
    )
    console().print(
        f"everything is in {folder}; use it as data.dataset: {{name: manifest, path: {folder}/manifest.json}}"
    )
