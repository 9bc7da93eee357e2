"""Compact ``.npz`` sets: one file per case with ``image`` and ``label``, and lists that say what is for what."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats.base import DataSet, checked_label, data_folder, lines_of, read_npz, required_label
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
    """

    def __init__(self, *, path: str) -> None:
        self.path = path

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
        names = ("background", "right ventricle", "myocardium", "left ventricle")
        return Manifest(folder.name, cases, names, 3, slice_axis=0, official=official)

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
        return checked_label(read_npz(required_label(case), "label", case.id), case, classes)


def _case(
    folder: Path, name: str, patient: str, role: Role, *, domain: str = "", spacing: tuple[float, ...] | None = None
) -> Case:
    path = folder / f"{name}.npz"
    return Case(name, patient, (Source(path, "image"),), Source(path, "label"), domain, role, spacing)
