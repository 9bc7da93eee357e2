"""A data set given as a manifest: one JSON file that names images, labels, patients and roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats.base import DataSet, checked_label, read_npz, required_label
from labeleff.data.formats.nifti import affine_of, voxels
from labeleff.data.manifest import Case, Manifest, Source, read_manifest
from labeleff.errors import DataError
from labeleff.registry import register

SUFFIXES = (".npz", ".h5", ".nii", ".nii.gz")


@register("dataset", "manifest")
class ManifestFile(DataSet):
    """Images and labels named one by one in a manifest file, as ``labeleff corrupt`` writes it.

    Files are ``.npz`` and ``.h5`` (``key`` names the array) or NIfTI, whose axes are brought to the closest canonical
    orientation. Paths are relative to the manifest. Several image files of a case are its channels.

    Args:
        path: The JSON file.
    """

    def __init__(self, *, path: str) -> None:
        self.path = path

    def manifest(self) -> Manifest:
        """Return its rows.

        Raises:
            DataError: The file is no manifest, or names files of a kind that is not read.
        """
        found = read_manifest(Path(self.path).expanduser())
        for case in found.cases:
            for source in (*case.image, *((case.label,) if case.label is not None else ()), *case.raters):
                if not readable(source):
                    raise DataError(
                        f"{self.path}: case {case.id!r}: {source.path.name} is none of {', '.join(SUFFIXES)}"
                    )
        self.classes, self.axes = len(found.classes), found.axes
        return found

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [C, *S]; arrays that have a channel axis already keep it."""
        found = [read_array(source, case.id) for source in case.image]
        parts = [a if a.ndim > self.axes else a[None] for a in found]
        image = np.concatenate(parts)
        return image if image.dtype == np.uint8 else image.astype(np.float32)

    def affine(self, case: Case) -> NDArray[np.float64] | None:
        """Return that of the first image where it is a NIfTI file."""
        path = case.image[0].path
        return affine_of(path, case.id) if path.name.endswith((".nii", ".nii.gz")) else None

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S]."""
        required_label(case)
        assert case.label is not None  # noqa: S101  just checked
        return checked_label(read_array(case.label, case.id), case, self.classes)


def readable(source: Source) -> bool:
    """Return whether a manifest's reader knows a file by its name."""
    return source.path.name.endswith(SUFFIXES)


def read_array(source: Source, case: str) -> NDArray[Any]:
    """Return the array that a source names.

    Raises:
        DataError: It cannot be read.
    """
    if source.path.name.endswith(".npz"):
        return read_npz(source.path, source.key, case)
    if source.path.name.endswith(".h5"):
        try:
            with h5py.File(source.path, "r") as file:
                array: NDArray[Any] = file[source.key][()]
                return array
        except (OSError, KeyError) as error:
            raise DataError(f"case {case!r}: {source.path}: no readable data set {source.key!r} ({error})") from error
    return voxels(source.path, case)
