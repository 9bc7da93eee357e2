"""Whole hearts in CT and MR: the Multi-Modality Whole Heart Segmentation challenge of 2017."""

from __future__ import annotations

from typing import Literal

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet
from labeleff.data.formats.nifti_files import stem
from labeleff.data.formats.volumes import last_are_tested, volume
from labeleff.data.manifest import Manifest
from labeleff.errors import DataError
from labeleff.registry import register

STRUCTURES = {
    205: "myocardium",
    420: "left atrium",
    500: "left ventricle",
    820: "ascending aorta",
    550: "right atrium",
    600: "right ventricle",
    850: "pulmonary artery",
}
"""Values of the challenge's label files; the first four are those of the papers on adaptation, in their order."""


@register("dataset", "mmwhs")
class WholeHeart(FileSet):
    """Volumes ``{ct,mr}_train_NNNN_image.nii.gz`` with ``…_label.nii.gz``, anywhere below the folder; domains ``ct``, ``mr``.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        structures: ``four``: myocardium, left atrium, left ventricle, ascending aorta, the rest being background; or all
            ``seven``.
        test: Patients per domain that are for the test, the last by name. The challenge's own test labels are not public;
            papers on adaptation split preprocessed slices of these volumes, which this is not.
    """

    def __init__(self, *, path: str, structures: Literal["four", "seven"] = "four", test: int = 4) -> None:
        if test < 0:
            raise ValueError("test is a number of patients, 0 or more")
        super().__init__()
        self.path, self.test = path, test
        kept = list(STRUCTURES)[: 4 if structures == "four" else 7]
        self.names = ("background", *(STRUCTURES[value] for value in kept))
        # 421 is found where 420 is meant
        self.values = {0: 0, 421: kept.index(420) + 1} | {v: kept.index(v) + 1 if v in kept else 0 for v in STRUCTURES}

    def rows(self) -> Manifest:
        """Return one row per volume; headers are read, voxels are not.

        Raises:
            DataError: There are no volumes, or an image has no label.
        """
        folder = data_folder(self.path)
        cases = []
        for domain in ("ct", "mr"):
            for image in sorted(folder.rglob(f"{domain}_train_*_image.nii*")):
                name = stem(image).removesuffix("_image")
                labels = sorted(folder.rglob(f"{name}_label.nii*"))
                if not labels:
                    raise DataError(f"{image}: there is no {name}_label.nii.gz below {folder}")
                cases.append(volume(name, name, image, labels[0], domain, self.values))
        if not cases:
            raise DataError(f"{folder}: no volumes; expected ct_train_NNNN_image.nii.gz, mr_train_NNNN_image.nii.gz")
        return Manifest("mmwhs", last_are_tested(cases, self.test, str(folder)), self.names, 3, slice_axis=2)
