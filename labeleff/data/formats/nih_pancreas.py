"""The pancreas in abdominal CT: Pancreas-CT of the National Institutes of Health, on The Cancer Imaging Archive (TCIA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.data.formats import dicom_files
from labeleff.data.formats.base import data_folder
from labeleff.data.formats.dicom_files import Slice
from labeleff.data.formats.files import FileSet, with_headers
from labeleff.data.formats.nifti_files import NEAR, affine_of, channel_voxels
from labeleff.data.formats.volumes import numbered
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError
from labeleff.registry import register

WITHDRAWN = (25, 70)
"""Cases that TCIA has taken back: the scan of case 2 again, cropped otherwise."""
LAST = 63
"""Number of the last training case in the lists of BCP's authors, who have 62 to train and 18 to test."""


@register("dataset", "nih_pancreas")
class NihPancreas(FileSet):
    """NIH Pancreas-CT: TCIA's ``PANCREAS_NNNN/…/*.dcm`` and ``labelNNNN.nii.gz``, anywhere below the folder.

    Images may have been converted to ``PANCREAS_NNNN.nii.gz``; DICOM needs SimpleITK (``pip install 'labeleff[dicom]'``).

    The split is that of CoraNet's and BCP's authors: of the 80 cases, 62 to train (up to 0063) and 18 to test, in the order of
    their numbers, so that the first 6 and 12 are the labelled sets. UMCT has 62 and 20, drawn at random from the 82 that there
    once were, and does not say which; its test cannot be made, since cases 25 and 70 are copies of case 2 that TCIA has taken
    back. They are left out. An image without a label is unlabelled.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        labels: ``header``: a label must lie where its header and that of the image say. ``series``: labels lie voxel by voxel on
            the DICOM series, whatever their headers say: columns to the left, rows to the back, slices upwards. So others read
            them; not verified here on the data itself, so look at ``labeleff inspect`` first.
    """

    def __init__(self, *, path: str, labels: Literal["header", "series"] = "header") -> None:
        super().__init__()
        if labels not in ("header", "series"):
            raise ValueError(f"labels is {labels!r}; give header or series")
        self.path, self.labels = path, labels
        if labels == "series":
            self.verbatim = frozenset({"image"})

    def rows(self) -> Manifest:
        """Return one row per image; headers are read, voxels are not.

        Raises:
            DataError: There are no volumes, or a series cannot be read.
        """
        folder = data_folder(self.path)
        labels = numbered(folder, r"label(\d{4})")
        images = numbered(folder, r"(?:PANCREAS_?|image_?|img_?)?(\d{4})(?:_0000)?")
        series = {} if images else _series(folder)
        images = images or {number: min(one.path for one in slices) for number, slices in series.items()}
        if not images:
            raise DataError(
                f"{folder}: no volumes; expected PANCREAS_NNNN, of DICOM files or .nii.gz, and labelNNNN.nii.gz"
            )
        if copies := [number for number in WITHDRAWN if images.pop(number, None)]:
            self.notes.append(f"left out, since TCIA has taken them back as copies: {', '.join(map(str, copies))}")
        cases, bare = [], 0
        for number, image in images.items():
            name, label = _name(number), labels.get(number)
            source = Source(label) if label is not None else None
            if number <= LAST:
                cases.append(Case(name, name, (Source(image),), source))
            elif source is not None:
                cases.append(Case(name, name, (Source(image),), source, "", "test"))
            else:
                bare += 1
        if bare:
            self.notes.append(f"{bare} images of the test have no label: left out")
        named = {_name(number): slices for number, slices in series.items()}
        rows, channels = with_headers(cases, axes=3, where=str(folder), series=named)
        official = tuple(case.patient for case in rows if case.role == "train")
        return Manifest("nih_pancreas", rows, ("background", "pancreas"), 3, channels, 2, official)

    def _stored(self, source: Source, case: Case) -> NDArray[Any]:
        if self.labels == "series":
            found = channel_voxels(source.path, case.id, channels=False, as_stored=True)[0]
            return np.ascontiguousarray(found[::-1, ::-1])  # to the right and to the front, as the image
        if not np.allclose(affine_of(source.path, case.id), affine_of(case.image[0].path, case.id), atol=NEAR):
            raise DataError(
                f"case {case.id!r}: {source.path}: the label's geometry (affine) is not the image's; if it is TCIA's own file "
                "set data.dataset.labels=series, else resample it to the image"
            )
        return super()._stored(source, case)


def _name(number: int) -> str:
    return f"PANCREAS_{number:04d}"


def _series(folder: Path) -> dict[int, list[Slice]]:
    """Return the longest series below each folder ``PANCREAS_NNNN``, by its number."""
    found: dict[int, list[Slice]] = {}
    for place in sorted(path for path in folder.rglob("PANCREAS_[0-9][0-9][0-9][0-9]") if path.is_dir()):
        series, _ = dicom_files.series_in(place)
        longest = max(series.values(), key=len, default=[])
        if len(longest) > 1:
            found[int(place.name[-4:])] = longest
    return dict(sorted(found.items()))
