"""Prostate MRI of several sites, as released with SAML (Liu et al., MICCAI 2020)."""

from __future__ import annotations

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet
from labeleff.data.formats.nifti_files import stem
from labeleff.data.formats.volumes import last_are_tested, volume
from labeleff.data.manifest import Manifest
from labeleff.errors import DataError
from labeleff.registry import register

_SUFFIX = "_segmentation"
_ZONES = {0: 0, 1: 1, 2: 1}


@register("dataset", "prostate")
class Prostate(FileSet):
    """T2-weighted volumes ``<site>/CaseNN.nii.gz`` with ``<site>/CaseNN_segmentation.nii.gz``; a site's folder is its domain.

    Masks of some sites tell two zones apart (values 1 and 2); both are prostate here.

    Args:
        path: The folder of sites, absolute or relative to ``LABELEFF_DATA``.
        sites: Folders to read; empty: all.
        test: Patients per site that are for the test, the last by name. The papers do not name theirs.
    """

    def __init__(self, *, path: str, sites: tuple[str, ...] = (), test: int = 10) -> None:
        if test < 0:
            raise ValueError("test is a number of patients, 0 or more")
        super().__init__()
        self.path, self.sites, self.test = path, tuple(sites), test

    def rows(self) -> Manifest:
        """Return one row per volume; headers are read, voxels are not.

        Raises:
            DataError: A site is missing, or an image has no mask.
        """
        folder = data_folder(self.path)
        cases = []
        for site in self.sites or sorted(p.name for p in folder.iterdir() if p.is_dir()):
            files = {stem(path).lower(): path for path in sorted((folder / site).glob("*.nii*"))}
            if not files and self.sites:
                raise DataError(f"{folder / site}: no volumes; expected CaseNN.nii.gz and CaseNN_segmentation.nii.gz")
            for key, image in files.items():
                if key.endswith(_SUFFIX):
                    continue
                if key + _SUFFIX not in files:  # one site writes it with a capital
                    raise DataError(f"{image}: {stem(image)}{_SUFFIX}.nii.gz is missing beside it")
                name = f"{site}_{stem(image)}"
                cases.append(volume(name, name, image, files[key + _SUFFIX], site, _ZONES))
        if not cases:
            raise DataError(f"{folder}: no volumes; expected a folder per site with CaseNN.nii.gz in it")
        return Manifest(
            "prostate", last_are_tested(cases, self.test, str(folder)), ("background", "prostate"), 3, slice_axis=2
        )
