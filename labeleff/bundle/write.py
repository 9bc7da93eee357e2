"""``labeleff query``: the folder that a person is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from labeleff.asking import current_label
from labeleff.batch import IGNORE
from labeleff.bundle.geometry import as_volume, grid_of, write_nifti
from labeleff.data.rounds import Asked, Region, Rounds
from labeleff.errors import RunError
from labeleff.files import write_atomically, write_json
from labeleff.prepare import prepare
from labeleff.prepared import Prepared
from labeleff.rundir import recipe_of

SCHEMA = 1
Mode = Literal["blank", "correct"]
COLOURS = ((0, 0, 0), (230, 75, 53), (77, 187, 213), (0, 160, 135), (60, 84, 136), (243, 155, 127), (132, 145, 180))
IGNORE_COLOUR = (255, 215, 0)
STEPS = """Round {round} of the run {run}: {regions} regions in {cases} cases.

1. Open CASE_image.nii.gz with CASE_edit.nii.gz as its segmentation (labels.txt for ITK-SNAP, labels.ctbl for 3D Slicer).
   regions.mrk.json (3D Slicer) jumps from region to region; CASE_query.nii.gz shows where they are.
2. Within the regions, replace "ignore" (value {ignore}, yellow) by what is there. Everything else stays as it is.
3. Save CASE_edit.nii.gz in its place and run: labeleff answer RUN THIS_FOLDER

From 3D Slicer, save the names of labels too, as CASE_edit.json beside the file: [{{"name": ..., "idx": ...}}, ...]; then values
may be numbered anew. Slicer cannot tell background from what nobody has looked at: list finished regions
under "done" in manifest.json, or answer with --done.
"""


def open_run(run: Path, cache: Path | None) -> Prepared:
    """Return what a run works on.

    Raises:
        RunError: There is no run there.
    """
    return prepare(recipe_of(run), run, cache=cache, write=False)


def open_round(rounds: Rounds, number: int | None) -> Asked:
    """Return the round of a number, or the newest one that waits.

    Raises:
        RunError: None does.
    """
    if number is not None:
        return rounds.get(number)
    waiting = [n for n in rounds.numbers() if rounds.open_regions(n)]
    if not waiting:
        raise RunError(f"{rounds.folder}: no round waits for labels; `labeleff run` asks the next one")
    return rounds.get(waiting[-1])


def write_bundle(
    run: Path,
    out: Path | None = None,
    *,
    number: int | None = None,
    mode: Mode = "blank",
    images: bool = True,
    cache: Path | None = None,
) -> Path:
    """Write a round for a person; the same round gives the same bytes.

    Args:
        run: The run directory.
        out: The folder; default ``RUN/bundles/round_NNN``.
        number: Which round; default: the newest one that waits.
        mode: ``blank``: regions are to be filled; ``correct``: they hold the prediction.
        images: Copy the images, so that nothing else is needed.
        cache: Where prepared images are kept.

    Returns:
        The folder.

    Raises:
        RunError: There is no such run, no round waits, or the folder holds edited labels.
    """
    data, rounds = open_run(run, cache), Rounds(run)
    asked = open_round(rounds, number)
    folder = out or run / "bundles" / f"round_{asked.number:03d}"
    waiting = rounds.open_regions(asked.number)
    for case in dict.fromkeys(region.case for region in waiting):
        own = [region for region in waiting if region.case == case]
        _write_case(folder, data, rounds, asked, own, mode, images=images)
    _write_tables(folder, data)
    _write_marks(folder, data, waiting)
    text = STEPS.format(
        round=asked.number,
        run=data.recipe.name,
        regions=len(waiting),
        cases=len({r.case for r in waiting}),
        ignore=len(data.task.classes),
    )
    write_atomically(folder / "README.txt", text)
    write_json(folder / "manifest.json", _manifest(data, rounds, asked, waiting, mode))
    return folder


def expected(
    data: Prepared, rounds: Rounds, asked: Asked, regions: list[Region], mode: Mode
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the label map [*S] of one case as it is handed out, the class K for what is unknown, and what is locked."""
    case = regions[0].case
    label = current_label(data.annotations, rounds, case)
    locked = label != IGNORE
    found = np.where(locked, label, len(data.task.classes)).astype(np.uint8)
    prediction = rounds.prediction(asked.number, case) if mode == "correct" else None
    if mode == "correct" and prediction is None:
        raise RunError(f"round {asked.number} kept no predictions to correct; write it with --blank")
    for region in regions:
        locked[region.box] = False
        if prediction is not None:
            found[region.box] = prediction[region.box]
        else:
            found[region.box] = len(data.task.classes)
    return found, locked


def _write_case(
    folder: Path, data: Prepared, rounds: Rounds, asked: Asked, regions: list[Region], mode: Mode, *, images: bool
) -> None:
    """Write image, query, edit and locked files of one case."""
    case = regions[0].case
    _, affine = grid_of(data, case)
    label, locked = expected(data, rounds, asked, regions, mode)
    path = folder / f"{case}_edit.nii.gz"
    query = np.zeros(label.shape, np.uint16)
    for region in regions:
        query[region.box] = region.number
    if images:
        write_nifti(folder / f"{case}_image.nii.gz", as_volume(_picture(data, case)), affine)
    write_nifti(folder / f"{case}_query.nii.gz", as_volume(query), affine)
    write_nifti(folder / f"{case}_locked.nii.gz", as_volume(locked.astype(np.uint8)), affine)
    fresh = folder / f".{case}_edit.nii.gz"
    write_nifti(fresh, as_volume(label), affine)
    if path.exists() and path.read_bytes() != fresh.read_bytes():
        fresh.unlink()
        raise RunError(f"{path}: somebody has edited it; answer with it, give another --out, or move it away")
    fresh.replace(path)


def _picture(data: Prepared, case: str) -> NDArray[Any]:
    """Return one channel [*S] of the image as it came, where it was not resampled; colours are averaged."""
    if data.store.shape(case) == data.store.original_shape(case):
        image = data.dataset.read_image(data.manifest.case(case))
    else:
        image = data.store.read(case)
    first: NDArray[Any] = image[0]
    if len(image) == 3 and image.dtype == np.uint8:
        first = image.mean(0).round().astype(np.uint8)
    return first if first.dtype == np.uint8 else first.astype(np.float32)


def label_table(data: Prepared) -> list[dict[str, Any]]:
    """Return name, value and colour of every class, and of ``ignore``, which is the highest value."""
    classes = data.task.classes
    rows = [{"name": n, "value": v, "colour": list(_colour(v))} for v, n in enumerate(classes)]
    return [*rows, {"name": "ignore", "value": len(classes), "colour": list(IGNORE_COLOUR)}]


def _colour(value: int) -> tuple[int, int, int]:
    if value < len(COLOURS):
        return COLOURS[value]
    return (37 * value % 200 + 40, 91 * value % 200 + 40, 151 * value % 200 + 40)


def _write_tables(folder: Path, data: Prepared) -> None:
    """Write the colours for ITK-SNAP and for 3D Slicer."""
    table = label_table(data)
    snap = ["# ITK-SNAP labels: value, red, green, blue, alpha, visible, mesh, name"]
    slicer = ["# 3D Slicer colours: value, name, red, green, blue, alpha"]
    for row in table:
        red, green, blue = row["colour"]
        seen = 0 if row["value"] == 0 else 1
        snap.append(f'{row["value"]:5d} {red:5d} {green:4d} {blue:4d} {seen:8d} {seen:2d} {seen:2d}    "{row["name"]}"')
        name = row["name"].replace(" ", "_")
        slicer.append(f"{row['value']} {name} {red} {green} {blue} {255 * seen}")
    write_atomically(folder / "labels.txt", "\n".join(snap) + "\n")
    write_atomically(folder / "labels.ctbl", "\n".join(slicer) + "\n")


def centre(region: Region, affine: NDArray[np.float64]) -> list[float]:
    """Return the centre of a region in patient coordinates, right, anterior, superior, mm."""
    middle = [o + (n - 1) / 2 for o, n in zip(region.origin, region.size, strict=True)]
    point = affine @ np.array([*middle, *[0.0] * (3 - len(middle)), 1.0])
    return [round(float(p), 4) for p in point[:3]]


def _write_marks(folder: Path, data: Prepared, regions: tuple[Region, ...]) -> None:
    """Write the list of points by which 3D Slicer jumps from region to region."""
    points = [
        {
            "id": str(number),
            "label": f"{region.case} region {region.number}",
            "position": centre(region, grid_of(data, region.case)[1]),
            "selected": True,
            "locked": True,
            "visibility": True,
            "positionStatus": "defined",
        }
        for number, region in enumerate(regions, 1)
    ]
    marks = {
        "@schema": "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
        "markups-schema-v1.0.3.json#",
        "markups": [
            {
                "type": "Fiducial",
                "coordinateSystem": "RAS",
                "coordinateUnits": "mm",
                "locked": True,
                "controlPoints": points,
            }
        ],
    }
    write_json(folder / "regions.mrk.json", marks)


def _manifest(data: Prepared, rounds: Rounds, asked: Asked, regions: tuple[Region, ...], mode: Mode) -> dict[str, Any]:
    """Return what the bundle is about: the run, the round, its images and regions."""
    cases = []
    for case in dict.fromkeys(region.case for region in regions):
        shape, affine = grid_of(data, case)
        cases.append(
            {
                "case": case,
                "image_sha256": data.store.content(case),
                "shape": list(shape),
                "affine": affine.tolist(),
                "spacing": [round(float(n), 6) for n in np.linalg.norm(affine[:3, :3], axis=0)],
                "axcodes": "".join(nib.aff2axcodes(affine)),
            }
        )
    rows = []
    for region in regions:
        seen = rounds.prediction(asked.number, region.case)
        counts: list[int] = np.bincount(seen[region.box].ravel()).tolist() if seen is not None else []
        names = data.task.classes
        rows.append(
            {
                "number": region.number,
                "case": region.case,
                "origin": list(region.origin),
                "size": list(region.size),
                "centre_ras": centre(region, grid_of(data, region.case)[1]),
                "score": region.score,
                "predicted": {names[k]: n for k, n in enumerate(counts) if n},
                "status": "open",
            }
        )
    return {
        "schema": SCHEMA,
        "run": data.recipe.name,
        "split": data.split.hash,
        "round": asked.number,
        "stage": asked.stage,
        "step": asked.step,
        "annotator": json.loads(json.dumps(asked.annotator)),
        "weights_sha256": asked.weights,
        "mode": mode,
        "labels": label_table(data),
        "ignore": len(data.task.classes),
        "planned": dict(asked.noted),
        "cases": cases,
        "regions": rows,
        "done": [],
    }
