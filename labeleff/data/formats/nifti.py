"""A folder of NIfTI images and labels: ``images/NAME.nii.gz`` and ``labels/NAME.nii.gz``."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from labeleff.data.formats.base import DataSet, checked_label, data_folder, lines_of, required_label
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "nifti")
class Nifti(DataSet):
    """Volumes in ``images/``, labels of the same name in ``labels/``; an image without a label is unlabelled.

    Labels by several people lie in a folder for each of them, such as ``labels_anna/`` and ``labels_ben/``, named in
    ``raters``; a case may have any number of them. ``labels/`` is then optional: it holds a consensus to measure against, or
    the labels of cases that only one person has seen.

    Axes are brought to the closest canonical orientation (right, anterior, superior) on reading; spacing comes from the
    header. The patient of a case is found in ``patients.csv`` (columns case, patient) where there is one, else in the
    name.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        classes: Names, background first.
        test_list: File with the names of the test cases, relative to the folder; one per line.
        patient_pattern: Regular expression whose first group is the patient in a case's name; default: the whole name.
        slice_axis: Axis along which a 2-D network sees slices.
        raters: Folders with one person's labels each, relative to the folder, in the order of the raters.
    """

    def __init__(
        self,
        *,
        path: str,
        classes: tuple[str, ...] = ("background", "foreground"),
        test_list: str = "test.list",
        patient_pattern: str = "(.*)",
        slice_axis: int = 2,
        raters: tuple[str, ...] = (),
    ) -> None:
        if len(classes) < 2:
            raise ValueError("classes needs at least background and one more name")
        try:
            self.pattern = re.compile(patient_pattern)
        except re.error as error:
            raise ValueError(f"patient_pattern is no regular expression: {error}") from error
        if self.pattern.groups < 1:
            raise ValueError("patient_pattern needs a group in parentheses that is the patient")
        if len(set(raters)) < len(raters) or {"images", "labels"} & set(raters):
            raise ValueError(
                f"raters is {list(raters)}; name every rater's own folder once, images and labels not among them"
            )
        self.path, self.classes, self.test_list, self.slice_axis = path, tuple(classes), test_list, slice_axis
        self.raters = tuple(raters)

    def manifest(self) -> Manifest:
        """Return one row per file in ``images/``; headers are read, voxels are not.

        Raises:
            DataError: There are no images, a listed case is missing, a label has no image, or a rater no labels.
        """
        folder = data_folder(self.path)
        files, labels = _files(folder / "images"), _files(folder / "labels")
        raters = [_files(folder / name) for name in self.raters]
        if not files:
            raise DataError(
                f"{folder / 'images'}: no .nii or .nii.gz files; expected images/NAME.nii.gz and labels/NAME.nii.gz"
            )
        for rater, own in zip(self.raters, raters, strict=True):
            if not own:
                raise DataError(
                    f"{folder / rater}: no .nii or .nii.gz files; data.dataset.raters names folders of labels"
                )
        for own in (labels, *raters):
            for name in own.keys() - files.keys():
                raise DataError(f"{own[name]}: a label without an image of the same name in {folder / 'images'}")
        test = set(lines_of(folder / self.test_list)) if (folder / self.test_list).exists() else set()
        for name in test - files.keys():
            raise DataError(f"{folder / self.test_list}: test case {name!r} has no image")
        patients = self._patients(folder)
        cases = []
        for name, path in files.items():
            role: Role = "test" if name in test else "train"
            label = Source(labels[name]) if name in labels else None
            votes = tuple(Source(own[name]) for own in raters if name in own)
            cases.append(Case(name, patients(name), (Source(path),), label, "", role, spacing_of(path, name), votes))
        return Manifest(folder.name, tuple(cases), self.classes, 3, slice_axis=self.slice_axis)

    def _patients(self, folder: Path) -> Any:
        table = folder / "patients.csv"
        if table.exists():
            with table.open(newline="") as file:
                known = {row["case"]: row["patient"] for row in csv.DictReader(file)}
            return lambda name: known.get(name) or _missing(table, name)
        return lambda name: found[1] if (found := self.pattern.match(name)) and found[1] else name

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, x, y, z] float32."""
        return voxels(case.image[0].path, case.id).astype(np.float32)[None]

    def affine(self, case: Case) -> NDArray[np.float64] | None:
        """Return that of the image, in the closest canonical orientation."""
        return affine_of(case.image[0].path, case.id)

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [x, y, z]."""
        label, shape = label_voxels(case)
        return checked_label(label, case, len(self.classes), shape)


def _files(folder: Path) -> dict[str, Path]:
    return {_stem(path): path for path in sorted(folder.glob("*.nii*"))}


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _missing(table: Path, name: str) -> str:
    raise DataError(f"{table}: case {name!r} has no row; add it")


def _load(path: Path, name: str) -> Any:
    try:
        image = nib.load(path)
    except (OSError, ImageFileError, EOFError, ValueError) as error:
        raise DataError(f"case {name!r}: {path}: not a readable NIfTI file ({error})") from error
    if len(image.shape) != 3:
        raise DataError(f"case {name!r}: {path}: has {len(image.shape)} axes; volumes of 3 axes are read")
    return image


def voxels(path: Path, name: str) -> NDArray[Any]:
    """Return the voxels of a NIfTI file in the closest canonical orientation.

    Raises:
        DataError: They cannot be read.
    """
    try:
        return np.asarray(nib.as_closest_canonical(_load(path, name)).dataobj)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"case {name!r}: {path}: the voxels cannot be read ({error})") from error


def spacing_of(path: Path, name: str) -> tuple[float, ...]:
    """Return the voxel size in the closest canonical orientation, mm, from the header alone.

    Raises:
        DataError: It cannot be read.
    """
    zooms = nib.as_closest_canonical(_load(path, name)).header.get_zooms()[:3]
    return tuple(round(float(z), 6) for z in zooms)


def affine_of(path: Path, name: str) -> NDArray[np.float64]:
    """Return the affine of a NIfTI file in the closest canonical orientation, from the header alone."""
    return np.asarray(nib.as_closest_canonical(_load(path, name)).affine, np.float64)


def label_voxels(case: Case) -> tuple[NDArray[Any], tuple[int, ...]]:
    """Return the label of a case as stored, in the closest canonical orientation, and the shape that it must have.

    Raises:
        DataError: There is none, it cannot be read, or it lies elsewhere than the image.
    """
    path = required_label(case)
    header = nib.as_closest_canonical(_load(case.image[0].path, case.id))
    label = _load(path, case.id)
    if not np.allclose(nib.as_closest_canonical(label).affine, header.affine, atol=1e-3):
        raise DataError(
            f"case {case.id!r}: {path}: the label's geometry (affine) is not the image's; resample it to the image"
        )
    return voxels(path, case.id), tuple(header.shape[:3])
