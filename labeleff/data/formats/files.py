"""Data sets whose rows name their files one by one: what all layouts of NIfTI files, pictures and arrays share."""

from __future__ import annotations

import csv
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats import dicom_files, nifti_files, picture_files
from labeleff.data.formats.base import (
    DataSet,
    as_classes,
    check_memory,
    checked_label,
    lines_of,
    read_npz,
    required_label,
)
from labeleff.data.formats.dicom_files import Slice
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError

SUFFIXES = (".npz", ".h5", *nifti_files.SUFFIXES, *picture_files.SUFFIXES, *dicom_files.SUFFIXES)


class FileSet(DataSet):
    """Images and labels in files: NIfTI, PNG, TIFF, JPEG, ``.npz``, ``.h5``, and DICOM, where a slice stands for its series.

    NIfTI files and series are brought to the closest canonical orientation; a fourth axis is the channels. Several image files
    of a case are its channels, in order. Pictures are brought to the channels of the data set: grey is repeated, colour
    becomes luminance.
    """

    verbatim = frozenset({"image", "label"})
    head: Manifest
    """The manifest that cases are read by."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        """What was left out or taken for granted, in words; filled by :meth:`manifest`."""

    def manifest(self) -> Manifest:
        """Return one row per case; lists and headers are read, voxels are not.

        Raises:
            DataError: The layout is not as expected.
        """
        self.notes.clear()
        self.head = self.rows()
        return self.head

    @abstractmethod
    def rows(self) -> Manifest:
        """Return the manifest of the layout."""

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [C, *S]; uint8 where all files are, else float32."""
        parts = [self._channels(source, case) for source in case.image]
        for source, part in zip(case.image, parts, strict=True):
            if part.shape[1:] != parts[0].shape[1:]:
                raise DataError(
                    f"case {case.id!r}: {source.path}: has shape {part.shape[1:]}, {case.image[0].path.name} has "
                    f"{parts[0].shape[1:]}; channels of a case lie on one grid"
                )
        image = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return image if image.dtype == np.uint8 else image.astype(np.float32)

    def _channels(self, source: Source, case: Case) -> NDArray[Any]:
        if nifti_files.is_volume(source.path):
            first = case.image[0].path
            if source.path != first and not np.allclose(
                nifti_files.affine_of(source.path, case.id),
                nifti_files.affine_of(first, case.id),
                atol=nifti_files.NEAR,
            ):
                raise DataError(
                    f"case {case.id!r}: {source.path}: lies elsewhere than {first.name} (affine); resample the channels to one grid"
                )
            return nifti_files.channel_voxels(source.path, case.id)
        if picture_files.is_picture(source.path):
            pixels = picture_files.read_picture(source.path, case.id)
            return picture_files.brought_to(pixels, self.head.channels) if len(case.image) == 1 else pixels
        array = _array(source, case.id)
        return array if array.ndim > self.head.axes else array[None]

    def affine(self, case: Case) -> NDArray[np.float64] | None:
        """Return that of the first image where it is a NIfTI file."""
        path = case.image[0].path
        return nifti_files.affine_of(path, case.id) if nifti_files.is_volume(path) else None

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S].

        Raises:
            DataError: There is none, it cannot be read, lies elsewhere than the image, or holds what is no class.
        """
        required_label(case)
        assert case.label is not None  # noqa: S101  just checked
        label = self._part(case.label.parts[0], case)
        for source in case.label.others:
            mask = self._part(source, case)
            if mask.shape != label.shape:
                raise DataError(
                    f"case {case.id!r}: {source.path}: has shape {mask.shape}, the mask before it {label.shape}"
                )
            label = label | mask if self.head.overlapping else np.where(mask != 0, mask, label)
        return checked_label(label, case, values_of(self.head), self._shape(case))

    def _part(self, source: Source, case: Case) -> NDArray[Any]:
        """Return what one file says: classes, or bits of regions that overlap."""
        stored = self._stored(source, case)
        if self.head.overlapping and source.mask_of is not None:
            return np.where(stored != 0, 1 << (source.mask_of - 1), 0).astype(np.uint8)
        return as_classes(stored, case, source)

    def _stored(self, source: Source, case: Case) -> NDArray[Any]:
        first = case.image[0].path
        if nifti_files.is_nifti(source.path):
            if nifti_files.is_volume(first):
                return nifti_files.label_on(source.path, first, case.id)
            return nifti_files.voxels(source.path, case.id)
        if picture_files.is_picture(source.path):
            return picture_files.read_label_picture(source.path, case.id)
        return _array(source, case.id)

    def _shape(self, case: Case) -> tuple[int, ...] | None:
        """Return the shape that a label must have, where the header of the image tells it."""
        path = case.image[0].path
        if nifti_files.is_volume(path):
            return nifti_files.header_of(path, case.id)[1]
        return picture_files.picture_header(path, case.id)[1] if picture_files.is_picture(path) else None

    def fingerprint(self, case: Case) -> str:
        """Return what changes when the case's files change, or what pictures are brought to."""
        found = super().fingerprint(case)
        first = case.image[0].path
        if not nifti_files.is_nifti(first) and dicom_files.is_dicom(first):  # the other slices lie beside it
            rows = [(path.name, path.stat()) for path in sorted(first.parent.iterdir()) if path.is_file()]
            return f"{found}|" + "|".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in rows)
        return f"{found}|{self.head.channels}" if picture_files.is_picture(case.image[0].path) else found


def values_of(manifest: Manifest) -> int:
    """Return how many values a label has beside IGNORE: classes, or sets of regions that overlap."""
    return 1 << (len(manifest.classes) - 1) if manifest.overlapping else len(manifest.classes)


def readable(source: Source) -> bool:
    """Return whether all files of a source are of a kind that is read, by their names."""
    return all(part.path.name.lower().endswith(SUFFIXES) or dicom_files.is_dicom(part.path) for part in source.parts)


def _array(source: Source, case: str) -> NDArray[Any]:
    if source.path.name.endswith(".npz"):
        return read_npz(source.path, source.key, case)
    try:
        with h5py.File(source.path, "r") as file:
            stored = file[source.key]
            check_memory(stored.size * stored.dtype.itemsize, f"case {case!r}: {source.path}")
            array: NDArray[Any] = stored[()]
            return array
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        raise DataError(f"case {case!r}: {source.path}: no readable data set {source.key!r} ({error})") from error


def described(case: Case, *, axes: int) -> tuple[int, tuple[float, ...] | None]:
    """Return the channels of a case and its spacing, mm, from the headers of its files.

    Raises:
        DataError: A header cannot be read.
    """
    channels, spacing = 0, None
    for source in case.image:
        if nifti_files.is_volume(source.path):
            own, _, found = nifti_files.header_of(source.path, case.id)
            spacing = spacing or found
        elif picture_files.is_picture(source.path):
            own = picture_files.picture_header(source.path, case.id)[0]
        else:
            own = 1
        channels += own
    return channels, spacing if axes == 3 else None


def with_headers(
    cases: Sequence[Case], *, axes: int, where: str, series: Mapping[str, list[Slice]] | None = None
) -> tuple[tuple[Case, ...], int]:
    """Return cases with the spacing of their headers, and the channels that all of them have.

    Pictures in grey and in colour side by side count as colour. A case whose header cannot be read is named when its image is:
    an audit names all of them, and a run may do without it.

    Args:
        cases: Without spacing.
        axes: Axes of a case.
        where: The folder, for messages.
        series: Slices of the cases that are DICOM, by the cases' names: headers of hundreds of files, not to be read again.

    Raises:
        DataError: No header can be read, or cases differ in their channels.
    """
    found, broken = [], []
    for case in cases:
        try:
            slices = (series or {}).get(case.id)
            found.append((1, _of_stack(slices, case)) if slices is not None else described(case, axes=axes))
        except DataError as error:
            found.append((0, None))
            broken.append(error)
    numbers = {channels for channels, _ in found if channels}
    if broken and not numbers:
        raise broken[0]
    if axes == 2 and numbers == {1, 3} and all(len(case.image) == 1 for case in cases):
        numbers = {3}
    if len(numbers) > 1:
        usual = max(sorted(numbers), key=[channels for channels, _ in found].count)
        odd = next(i for i, (channels, _) in enumerate(found) if channels not in (0, usual))
        raise DataError(
            f"{where}: case {cases[odd].id!r} has {found[odd][0]} channels, most cases have {usual}; all cases need the same ones"
        )
    return tuple(replace(c, spacing=s) for c, (_, s) in zip(cases, found, strict=True)), numbers.pop() if numbers else 1


def _of_stack(slices: list[Slice], case: Case) -> tuple[float, ...]:
    """Return the spacing of a DICOM series, mm."""
    try:
        return nifti_files.voxel_size(dicom_files.stack(slices))
    except DataError as error:
        raise DataError(f"case {case.id!r}: {error}") from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: There is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: {what} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: {what} is a {type(found).__name__}; an object is needed")
    return found


def listed_tests(path: Path, known: Collection[str], what: str = "image") -> set[str]:
    """Return the names of the test cases in a list, one per line; none where there is no such file.

    Raises:
        DataError: One of them is not known.
    """
    test = set(lines_of(path)) if path.exists() else set()
    for name in sorted(test - set(known)):
        raise DataError(f"{path}: test case {name!r} has no {what}")
    return test


def patient_of(folder: Path, pattern: re.Pattern[str]) -> Callable[[str], str]:
    """Return who a case is of: by ``patients.csv`` (columns case, patient) in the folder, else the pattern's first group.

    Raises:
        DataError: The table cannot be read.
    """
    table = folder / "patients.csv"
    if not table.exists():
        return lambda name: found[1] if (found := pattern.match(name)) and found[1] else name
    try:
        with table.open(newline="") as file:
            known = {row["case"]: row["patient"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataError(f"{table}: needs the columns case and patient ({error})") from error

    def patient(name: str) -> str:
        if not known.get(name):
            raise DataError(f"{table}: case {name!r} has no row; add it")
        return known[name]

    return patient


def patient_expression(pattern: str) -> re.Pattern[str]:
    """Return a pattern whose first group is a patient.

    Raises:
        ValueError: It is none.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"patient_pattern is no regular expression: {error}") from error
    if found.groups < 1:
        raise ValueError("patient_pattern needs a group in parentheses that is the patient")
    return found


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files of a folder, sorted, without the hidden ones that other systems leave behind.

    A link to nowhere is one of them: its reader names it, and a case does not vanish without a word.
    """
    files = [path for path in sorted(folder.glob(pattern)) if not path.name.startswith(".")]
    return [path for path in files if path.is_file() or (path.is_symlink() and not path.exists())]
