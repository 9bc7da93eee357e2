"""Intervertebral discs in four Dixon contrasts: the IVDM3Seg challenge of 2018."""

from __future__ import annotations

import re
from pathlib import Path

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet
from labeleff.data.formats.nifti_files import stem
from labeleff.data.formats.volumes import last_are_tested, volume
from labeleff.data.manifest import Manifest
from labeleff.errors import DataError
from labeleff.registry import register

CONTRASTS = ("wat", "inn", "opp", "fat")


@register("dataset", "ivdm3seg")
class Discs(FileSet):
    """Volumes ``NN_wat.nii``, ``NN_inn.nii``, ``NN_opp.nii``, ``NN_fat.nii`` and ``NN_Labels.nii``, anywhere below the folder.

    A contrast is a domain: water (``wat``), in phase (``inn``), out of phase (``opp``), fat (``fat``). All contrasts of an
    acquisition share its label, and are one patient.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        contrasts: Domains to read.
        test: Acquisitions that are for the test, the last by name. The papers do not name theirs.
    """

    def __init__(self, *, path: str, contrasts: tuple[str, ...] = ("wat", "inn"), test: int = 3) -> None:
        unknown = [name for name in contrasts if name not in CONTRASTS]
        if unknown or not contrasts:
            raise ValueError(f"contrasts is {list(contrasts)}; name some of {', '.join(CONTRASTS)}")
        if test < 0:
            raise ValueError("test is a number of acquisitions, 0 or more")
        super().__init__()
        self.path, self.contrasts, self.test = path, tuple(contrasts), test

    def rows(self) -> Manifest:
        """Return one row per acquisition and contrast; headers are read, voxels are not.

        Raises:
            DataError: There are no volumes, or an acquisition lacks a contrast or its label.
        """
        folder = data_folder(self.path)
        found: dict[str, dict[str, Path]] = {}
        for path in sorted(folder.rglob("*.nii*")):
            # releases differ in the case of the letters
            if parts := re.fullmatch(r"(\d+)_(wat|inn|opp|fat|labels)", stem(path).lower()):
                found.setdefault(parts[1], {})[parts[2]] = path
        if not found:
            raise DataError(f"{folder}: no volumes; expected NN_wat.nii, NN_inn.nii, NN_Labels.nii and so on")
        for number, files in found.items():
            for part in (*self.contrasts, "labels"):
                if part not in files:
                    raise DataError(f"{folder}: acquisition {number} has no {number}_{part}.nii")
        cases = [
            volume(f"{number}_{contrast}", number, files[contrast], files["labels"], contrast)
            for number, files in found.items()
            for contrast in self.contrasts
        ]
        named = ("background", "disc")
        return Manifest("ivdm3seg", last_are_tested(cases, self.test, str(folder)), named, 3, slice_axis=2)
