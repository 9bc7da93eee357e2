"""``labeleff inspect``: what a data set holds, in numbers and pictures, before anything is trained."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.progress import track

from labeleff.batch import IGNORE
from labeleff.corruption import open_data
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import ROLES, Case, Manifest
from labeleff.data.split import evenly
from labeleff.files import write_atomically, write_csv
from labeleff.report.pictures import grey, interesting, overlay, slices_of
from labeleff.report.templates import template
from labeleff.runlog import console

TILE, COLUMNS = 160, 6
QUANTILES = {"min": 0, "p1": 1, "median": 50, "p99": 99, "max": 100}
"""Percentiles of the intensities of an image, all channels together."""


def inspect(data: str, folder: Path, *, test_labels: bool = False, shown: int = 24) -> list[dict[str, Any]]:
    """Write ``cases.csv``, ``contact.png`` and ``index.html``.

    Args:
        data: A manifest, or a recipe for its data set.
        folder: Where to.
        test_labels: Measure and draw the labels of test cases too; else they stay closed.
        shown: Cases on the contact sheet, evenly spread over the data set.

    Returns:
        One row per case: ``case``, ``patient``, ``role``, ``domain``, ``labelled``, ``shape``, ``spacing``, intensities (see
        :data:`QUANTILES`, ``mean``, ``sd``), and ``volume:CLASS`` in ml (in voxels if the spacing of a case is unknown).

    Raises:
        DataError: A file cannot be read; ``labeleff audit`` names all of them.
    """
    dataset = open_data(data)
    manifest = dataset.manifest()
    in_ml = manifest.axes == 3 and all(case.spacing is not None for case in manifest.cases)
    chosen = {manifest.cases[i].id for i in evenly(len(manifest.cases), shown)}
    rows, tiles = [], []
    for case in track(manifest.cases, description="inspecting", console=console(), transient=True):
        image = dataset.read_image(case)
        label = label_of(dataset, case) if test_labels or case.role != "test" else None
        rows.append(_row(case, image, label, manifest, in_ml=in_ml))
        if case.id in chosen:
            tiles.append(_tile(case, image, label, manifest))
    unit = "ml" if in_ml else "voxels"
    write_csv(folder / "cases.csv", list(rows[0]), rows)
    sheet = contact_sheet(tiles)
    write_atomically(folder / "contact.png", sheet)
    _write_page(folder / "index.html", manifest, rows, sheet, unit)
    console().print(f"{manifest.name}: {len(rows)} cases, see {folder / 'index.html'}")
    return rows


def label_of(dataset: DataSet, case: Case) -> NDArray[np.uint8] | None:
    """Return the label of a case, that of its first rater where there is no other."""
    if case.label is not None:
        return dataset.read_label(case)
    return dataset.read_votes(case)[0] if case.raters else None


def _row(
    case: Case, image: NDArray[Any], label: NDArray[np.uint8] | None, manifest: Manifest, *, in_ml: bool
) -> dict[str, Any]:
    found = np.percentile(image, list(QUANTILES.values()))
    voxel = float(np.prod(case.spacing)) / 1000 if in_ml and case.spacing is not None else 1.0
    row: dict[str, Any] = {
        "case": case.id,
        "patient": case.patient,
        "role": case.role,
        "domain": case.domain,
        "labelled": case.has_label,
        "shape": " × ".join(map(str, image.shape[1:])),
        "spacing": " × ".join(f"{n:g}" for n in case.spacing) if case.spacing else "",
        **{name: float(value) for name, value in zip(QUANTILES, found, strict=True)},
        "mean": float(image.mean(dtype=np.float64)),
        "sd": float(image.std(dtype=np.float64)),
    }
    for index, name in enumerate(manifest.classes[1:], start=1):
        row[f"volume:{name}"] = None if label is None else float(_where(label, index, manifest).sum()) * voxel
    row["unlabelled"] = None if label is None else float((label == IGNORE).mean())
    return row


def _where(label: NDArray[np.uint8], index: int, manifest: Manifest) -> NDArray[np.bool_]:
    """Return where a class is, or a region that may overlap others."""
    if manifest.overlapping:
        return np.asarray(((label >> (index - 1) & 1) == 1) & (label != IGNORE))
    return np.asarray(label == index)


def per_class(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return for every class of how many labelled cases it is in, and its volume where it is: median, smallest, largest."""
    found = []
    for name in classes[1:]:
        known = [row[f"volume:{name}"] for row in rows if row[f"volume:{name}"] is not None]
        there = sorted(volume for volume in known if volume > 0)
        numbers = (float(np.median(there)), there[0], there[-1]) if there else (None, None, None)
        found.append(
            {
                "class": name,
                "cases": len(there),
                "of": len(known),
                **dict(zip(("median", "min", "max"), numbers, strict=True)),
            }
        )
    return found


def _tile(case: Case, image: NDArray[Any], label: NDArray[np.uint8] | None, manifest: Manifest) -> Image.Image:
    """Return a picture of a case: its largest section, or its middle, with the label over it."""
    known = label if label is not None else np.zeros(image.shape[1:], np.uint8)
    places = interesting(known, manifest.slice_axis)
    place = [places[len(places) // 2]]
    view = slices_of(grey(image.mean(axis=0)), manifest.slice_axis, place)[0]
    drawn = overlay(view, slices_of(known, manifest.slice_axis, place)[0], exclusive=not manifest.overlapping)
    picture = Image.fromarray(np.round(drawn * 255).astype(np.uint8))
    scale = TILE / max(picture.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)
    tile = Image.new("RGB", (TILE, TILE + 14), "white")
    tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    mark = {"validation": "v ", "test": "t "}.get(case.role, "")
    text = f"{mark}{case.id}"[:26].encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(tile).text((2, TILE + 1), text, fill="black")
    return tile


def contact_sheet(tiles: Sequence[Image.Image]) -> bytes:
    """Return the PNG of tiles of one size in rows of :data:`COLUMNS`."""
    width, height = tiles[0].size
    across = min(COLUMNS, len(tiles))
    sheet = Image.new("RGB", (across * width, -(-len(tiles) // across) * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % across * width, number // across * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _write_page(path: Path, manifest: Manifest, rows: Sequence[Mapping[str, Any]], sheet: bytes, unit: str) -> None:
    counts = [
        {
            "role": role,
            "patients": len(manifest.patients(role)),
            "cases": len(cases),
            "labelled": sum(case.has_label for case in cases),
        }
        for role in ROLES
        if (cases := manifest.of_role(role))
    ]
    spread = {
        "shape": Counter(row["shape"] for row in rows).most_common(6),
        "spacing, mm": Counter(row["spacing"] or "unknown" for row in rows).most_common(6),
        "domain": Counter(row["domain"] or "unnamed" for row in rows).most_common(12),
    }
    page = template("inspect.html.j2").render(
        name=manifest.name,
        manifest=manifest,
        counts=counts,
        spread=spread,
        classes=per_class(rows, manifest.classes),
        rows=rows,
        unit=unit,
        sheet=base64.b64encode(sheet).decode(),
        closed=sum(row["unlabelled"] is None and row["labelled"] for row in rows),
    )
    write_atomically(path, page)
