"""A folder of NIfTI images and labels: ``images/NAME.nii.gz`` and ``labels/NAME.nii.gz``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet, listed_tests, patient_expression, patient_of, visible, with_headers
from labeleff.data.formats.nifti_files import is_nifti, stem
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError, did_you_mean
from labeleff.registry import register


@register("dataset", "nifti")
class Nifti(FileSet):
    """Volumes in ``images/``, labels of the same name in ``labels/``; an image without a label is unlabelled.

    Several channels are the fourth axis of a file, or files of their own, told apart by ``channels``. A label is one file, or a
    folder ``labels/NAME/`` with one mask per structure, each named after a class; where masks overlap, the class named later
    holds, or both with ``overlapping``.

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
        channels: Endings of the files that are the channels of a case, in order, such as _t1 and _t2; default: one file.
        overlapping: Structures do not exclude one another: every mask is a region of its own, at most seven.
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
        channels: tuple[str, ...] = (),
        overlapping: bool = False,
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ValueError("classes needs at least background and one more name")
        self.pattern = patient_expression(patient_pattern)
        if len(set(raters)) < len(raters) or {"images", "labels"} & set(raters):
            raise ValueError(
                f"raters is {list(raters)}; name every rater's own folder once, images and labels not among them"
            )
        if len(set(channels)) < len(channels):
            raise ValueError(f"channels is {list(channels)}; every ending stands for one channel")
        self.path, self.classes, self.test_list, self.slice_axis = path, tuple(classes), test_list, slice_axis
        self.raters, self.channels, self.overlapping = tuple(raters), tuple(channels), overlapping

    def rows(self) -> Manifest:
        """Return one row per case in ``images/``; headers are read, voxels are not.

        Raises:
            DataError: There are no images, a listed case is missing, a label has no image, or a rater no labels.
        """
        folder = data_folder(self.path)
        files, labels = self._images(folder / "images"), self._labels(folder / "labels")
        raters = [self._labels(folder / name) for name in self.raters]
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
            for name in sorted(own.keys() - files.keys()):
                raise DataError(f"{own[name].path}: a label without an image of the same name in {folder / 'images'}")
        test = listed_tests(folder / self.test_list, files)
        patient = patient_of(folder, self.pattern)
        cases = []
        for name, images in files.items():
            role: Role = "test" if name in test else "train"
            votes = tuple(own[name] for own in raters if name in own)
            cases.append(Case(name, patient(name), images, labels.get(name), "", role, None, votes))
        with_spacing, channels = with_headers(cases, axes=3, where=str(folder))
        return Manifest(
            folder.name, with_spacing, self.classes, 3, channels, self.slice_axis, overlapping=self.overlapping
        )

    def _images(self, folder: Path) -> dict[str, tuple[Source, ...]]:
        """Return the channel files of every case."""
        found = _files(folder)
        if not self.channels:
            return {name: (Source(path),) for name, path in found.items()}
        first = self.channels[0]
        names = [name.removesuffix(first) for name in found if name.endswith(first)]
        for name in names:
            for ending in self.channels:
                if f"{name}{ending}" not in found:
                    raise DataError(
                        f"{folder}: case {name!r} has no {name}{ending}.nii.gz; data.dataset.channels names it"
                    )
        taken = {f"{name}{ending}" for name in names for ending in self.channels}
        for name in sorted(found.keys() - taken):
            raise DataError(
                f"{found[name]}: ends in none of {', '.join(self.channels)}, which data.dataset.channels names"
            )
        return {name: tuple(Source(found[f"{name}{ending}"]) for ending in self.channels) for name in names}

    def _labels(self, folder: Path) -> dict[str, Source]:
        """Return one label per case: a file, or the masks in a folder."""
        found = {name: Source(path) for name, path in _files(folder).items()}
        for inner in sorted(path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")):
            if inner.name in found:
                raise DataError(
                    f"{inner}: the case has a label file {found[inner.name].path.name} beside it; keep one of them"
                )
            if masks := _files(inner):
                found[inner.name] = joined(masks, self.classes, inner)
        return found


def joined(masks: dict[str, Path], classes: Sequence[str], where: Path) -> Source:
    """Return the label that masks of one structure each make, in the order of the classes.

    Raises:
        DataError: A mask is named after no class.
    """
    for name in masks:
        if name not in classes[1:]:
            raise DataError(
                f"{where / name}: named after no class.{did_you_mean(name, classes)} Classes: {', '.join(classes[1:])}"
            )
    first, *more = (Source(masks[name], mask_of=i) for i, name in enumerate(classes) if i and name in masks)
    return replace(first, others=tuple(more))


def _files(folder: Path) -> dict[str, Path]:
    return {stem(path): path for path in visible(folder) if is_nifti(path)}
