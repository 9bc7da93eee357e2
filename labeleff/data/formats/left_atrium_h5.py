"""The left-atrium release of UA-MT's authors: ``<case>/mri_norm2.h5`` and lists of cases."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats.base import DataSet, checked_label, data_folder, lines_of, required_label
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "left_atrium_h5")
class LeftAtriumH5(DataSet):
    """Volumes x, y, z at 0.625 mm in ``<path>/<case>/mri_norm2.h5`` with data sets ``image`` and ``label``.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        train_list: File with the training cases, one per line, relative to the folder.
        test_list: File with the test cases.
    """

    verbatim = frozenset({"image", "label"})

    def __init__(self, *, path: str, train_list: str = "train.list", test_list: str = "test.list") -> None:
        self.path, self.train_list, self.test_list = path, train_list, test_list

    def manifest(self) -> Manifest:
        """Return the cases of the two lists; a case is a patient of its own, since the release names no patients."""
        folder = data_folder(self.path)
        train = lines_of(folder / self.train_list)
        roles: list[tuple[str, Role]] = [(name, "train") for name in train]
        roles += [(name, "test") for name in lines_of(folder / self.test_list)]
        cases = []
        for name, role in roles:
            path = folder / name / "mri_norm2.h5"
            cases.append(Case(name, name, (Source(path, "image"),), Source(path, "label"), "", role, (0.625,) * 3))
        return Manifest(
            "left_atrium", tuple(cases), ("background", "left atrium"), 3, slice_axis=2, official=tuple(train)
        )

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, *S] float32."""
        return self._read(case, "image").astype(np.float32)[None]

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S]."""
        required_label(case)
        return checked_label(self._read(case, "label"), case, 2)

    def _read(self, case: Case, key: str) -> NDArray[Any]:
        path = case.image[0].path
        try:
            with h5py.File(path, "r") as file:
                array: NDArray[Any] = file[key][()]
                return array
        except (OSError, KeyError) as error:
            raise DataError(f"case {case.id!r}: {path}: no readable data set {key!r} ({error})") from error
