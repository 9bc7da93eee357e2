"""Volumes of several sites or scanners as their publishers released them: what these layouts share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats.base import DataSet, checked_label, required_label
from labeleff.data.formats.nifti_files import affine_of, label_voxels, spacing_of, voxels
from labeleff.data.manifest import Case, Source
from labeleff.errors import DataError


class Volumes(DataSet):
    """NIfTI images with NIfTI labels whose stored values stand for classes."""

    verbatim = frozenset({"image"})
    values: dict[int, int]
    """Class of every value that a label file may hold."""

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, x, y, z] float32, axes in the closest canonical orientation."""
        return voxels(case.image[0].path, case.id).astype(np.float32)[None]

    def affine(self, case: Case) -> NDArray[np.float64] | None:
        """Return that of the image, in the closest canonical orientation."""
        return affine_of(case.image[0].path, case.id)

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [x, y, z].

        Raises:
            DataError: A value stands for no class, or the label is not on the image's grid.
        """
        stored, shape = label_voxels(case)
        label = np.full(stored.shape, -1, np.int16)
        for value, index in self.values.items():
            label[stored == value] = index
        if (label < 0).any():
            wrong = stored[label < 0].flat[0]
            raise DataError(
                f"case {case.id!r}: {required_label(case)}: label value {wrong:g} is unknown; values of this data set are "
                f"{', '.join(str(v) for v in sorted(self.values))}"
            )
        return checked_label(label, case, max(self.values.values()) + 1, shape)


def volume(name: str, patient: str, image: Path, label: Path, domain: str) -> Case:
    """Return the row of a volume, its spacing read from the header."""
    return Case(name, patient, (Source(image),), Source(label), domain, "train", spacing_of(image, name))


def last_are_tested(cases: Iterable[Case], test: int, where: str) -> tuple[Case, ...]:
    """Return cases of which the last patients of every domain, by name, are for the test.

    Raises:
        DataError: Nothing would be left to learn from.
    """
    found = sorted(cases, key=lambda case: (case.domain, case.patient, case.id))
    tested = set()
    for domain in dict.fromkeys(case.domain for case in found):
        patients = list(dict.fromkeys(case.patient for case in found if case.domain == domain))
        if test >= len(patients):
            raise DataError(
                f"{where}: {domain} has {len(patients)} patients, of which test: {test} leaves none to learn from; lower it"
            )
        tested |= set(patients[len(patients) - test :])
    return tuple(replace(case, role="test" if case.patient in tested else "train") for case in found)
