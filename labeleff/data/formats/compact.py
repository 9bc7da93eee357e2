"""Compact ``.npz`` sets: one file per case with ``image`` and ``label``, and lists that say what is for what."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats.acdc import CLASSES, SCRIBBLE_VALUES
from labeleff.data.formats.base import (
    DataSet,
    as_classes,
    checked_label,
    data_folder,
    lines_of,
    read_npz,
    required_label,
)
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "compact")
class Compact(DataSet):
    """A folder of ``<case>.npz`` with ``image`` and ``label``; the kind of set is told from its lists.

    Known layouts: left atrium (``train.list``, ``test.list``; volumes x, y, z at 1.25 mm), ACDC (further ``val.list`` and
    cases ``patientNNN_frameNN``; slices first, spacing unknown), nuclei (``index.csv`` with id, domain, split, group; 2-D).

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        scribbles: ACDC: learn from ``scribble`` of the training files, where 4 is not labelled, in place of ``label``.
    """

    verbatim = frozenset({"image", "label"})

    def __init__(self, *, path: str, scribbles: bool = False) -> None:
        self.path, self.scribbles = path, scribbles

    def manifest(self) -> Manifest:
        """Return the rows of the set.

        Raises:
            DataError: The folder is missing, or has none of the known lists.
        """
        folder = data_folder(self.path)
        if (folder / "index.csv").exists():
            found = self._nuclei(folder)
        elif (folder / "val.list").exists():
            found = self._acdc(folder)
        elif (folder / "train.list").exists() and (folder / "test.list").exists():
            found = self._left_atrium(folder)
        else:
            raise DataError(
                f"{folder}: neither index.csv nor train.list and test.list are here; is this a compact set?"
            )
        if self.scribbles:
            if found.axes != 3 or len(found.classes) != len(CLASSES):
                raise DataError(f"{folder}: scribbles is for ACDC; other compact sets have none")
            found = replace(found, cases=tuple(_scribbled(case) for case in found.cases))
        return found

    def _left_atrium(self, folder: Path) -> Manifest:
        train = lines_of(folder / "train.list")
        roles: list[tuple[str, Role]] = [(name, "train") for name in train]
        roles += [(name, "test") for name in lines_of(folder / "test.list")]
        cases = tuple(_case(folder, name, name, role, spacing=(1.25,) * 3) for name, role in roles)
        return Manifest(folder.name, cases, ("background", "left atrium"), 3, slice_axis=2, official=tuple(train))

    def _acdc(self, folder: Path) -> Manifest:
        listed: tuple[tuple[str, Role], ...] = (
            ("train.list", "train"),
            ("val.list", "validation"),
            ("test.list", "test"),
        )
        cases = tuple(
            _case(folder, name, name.split("_")[0], role) for file, role in listed for name in lines_of(folder / file)
        )
        order = folder / "train_patients_ssl4mis_order.list"
        official = tuple(lines_of(order)) if order.exists() else ()
        return Manifest(folder.name, cases, CLASSES, 3, slice_axis=0, official=official)

    def _nuclei(self, folder: Path) -> Manifest:
        roles: dict[str, Role] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
        with (folder / "index.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            cases = tuple(
                _case(folder, row["id"], row["group"], roles[row["split"]], domain=row["domain"]) for row in rows
            )
        except KeyError as error:
            raise DataError(f"{folder / 'index.csv'}: column or split {error} is missing or unknown") from error
        return Manifest(folder.name, cases, ("background", "nucleus"), 2)

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, *S] uint8. The label beside it in the file is not decoded."""
        return read_npz(case.image[0].path, "image", case.id)[None]

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S]."""
        classes = 4 if case.id.startswith("patient") else 2
        source = case.label or Source(required_label(case))
        stored = read_npz(source.path, source.key or "label", case.id)
        return checked_label(as_classes(stored, case, source), case, classes)


def _case(
    folder: Path, name: str, patient: str, role: Role, *, domain: str = "", spacing: tuple[float, ...] | None = None
) -> Case:
    path = folder / f"{name}.npz"
    return Case(name, patient, (Source(path, "image"),), Source(path, "label"), domain, role, spacing)


def _scribbled(case: Case) -> Case:
    if case.role != "train" or case.label is None:
        return case
    return replace(case, label=Source(case.label.path, "scribble", SCRIBBLE_VALUES))
