"""DICOM series as images, labels as NIfTI files."""

from __future__ import annotations

from pathlib import Path

from labeleff.data.formats import dicom_files
from labeleff.data.formats.base import data_folder
from labeleff.data.formats.dicom_files import Slice
from labeleff.data.formats.files import FileSet, listed_tests, patient_expression, patient_of, visible, with_headers
from labeleff.data.formats.nifti_files import is_nifti, stem
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "dicom")
class Dicom(FileSet):
    """DICOM series below ``images/`` (or the folder itself), one volume each; ``labels/NAME.nii.gz`` where there are labels.

    A series is what shares a SeriesInstanceUID in one folder: even slices of one grey volume. Its case is named after its
    folder below ``images/`` (``anna/ct`` becomes ``anna_ct``), with a number where a folder holds several. No tag is copied but
    the geometry: a folder whose name is the patient's, as the tags have it, is numbered instead. Series of one slice are left
    out; multi-frame files, colours and DICOM-SEG are not read. Needs SimpleITK (``pip install 'labeleff[dicom]'``).

    A label lies on the grid of the volume, as NIfTI: what ITK-SNAP or 3D Slicer saves of the series. Axes are brought to the
    closest canonical orientation (right, anterior, superior).

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        classes: Names, background first.
        test_list: File with the names of the test cases, relative to the folder; one per line.
        patient_pattern: Regular expression whose first group is the patient in a case's name; default: the whole name.
        slice_axis: Axis along which a 2-D network sees slices.
    """

    def __init__(
        self,
        *,
        path: str,
        classes: tuple[str, ...] = ("background", "foreground"),
        test_list: str = "test.list",
        patient_pattern: str = "(.*)",
        slice_axis: int = 2,
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ValueError("classes needs at least background and one more name")
        self.pattern = patient_expression(patient_pattern)
        self.path, self.classes, self.test_list, self.slice_axis = path, tuple(classes), test_list, slice_axis

    def rows(self) -> Manifest:
        """Return one row per series; voxels are not read.

        Raises:
            DataError: There is none, a file is of a kind that is not read, or a label has no series.
        """
        folder = data_folder(self.path)
        images, patient, cases = named_series(folder, self.notes), patient_of(folder, self.pattern), []
        labels = {stem(path): path for path in visible(folder / "labels") if is_nifti(path)}
        if not images:
            raise DataError(f"{folder}: no DICOM series of two slices or more, neither here nor in images/")
        for name in sorted(labels.keys() - images.keys()):
            raise DataError(f"{labels[name]}: a label without a series of the same name; there are {', '.join(images)}")
        test = listed_tests(folder / self.test_list, images, "series")
        for name, slices in images.items():
            role: Role = "test" if name in test else "train"
            source = Source(labels[name]) if name in labels else None
            first = min(one.path for one in slices)
            cases.append(Case(name, patient(name), (Source(first),), source, "", role))
            try:
                dicom_files.stack(slices)
            except DataError as error:
                self.notes.append(f"case {name!r} cannot be read: {error}")
        with_spacing, channels = with_headers(cases, axes=3, where=str(folder), series=images)
        return Manifest(folder.resolve().name, with_spacing, self.classes, 3, channels, self.slice_axis)


def named_series(folder: Path, notes: list[str]) -> dict[str, list[Slice]]:
    """Return the series of a data set by the names of their cases; what was left out is added to the notes."""
    root = folder / "images" if (folder / "images").is_dir() else folder
    found, said = dicom_files.series_in(root)
    notes += said
    single = [slices for slices in found.values() if len(slices) < 2]
    if single:
        notes.append(f"{len(single)} DICOM series of one slice are left out, such as {single[0][0].path.name}")
    kept = {key: slices for key, slices in found.items() if len(slices) > 1}
    named: dict[str, list[Slice]] = {}
    for number, ((place, _), slices) in enumerate(kept.items(), start=1):
        together = [key for key in kept if key[0] == place]
        name = "_".join(place.relative_to(root).parts) or folder.resolve().name
        if dicom_files.tells_who(name, slices[0].path):
            name = f"case_{number:03}"
            notes.append(f"a folder bears the name or number of a patient; its case is {name}")
        elif len(together) > 1:
            name += f"_{together.index((place, slices[0].series)) + 1}"
        named[name] = slices
    return named
