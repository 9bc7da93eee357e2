"""Volumes for pretraining: the public CT sets that VoCo's authors collected as PreCT, side by side."""

from __future__ import annotations

import re

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet
from labeleff.data.formats.nifti_files import header_of, stem
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.data.pairing import volumes_in
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "prect")
class PreCt(FileSet):
    """Unlabelled NIfTI volumes of a folder per public set, such as ``BTCV/`` and ``stoic21/``, each in the layout it came in.

    So VoCo's authors have PreCT-160K. A set is the domain of its cases. Label files are passed over, as they are known by their
    names and folders (``labelsTr``, ``segmentations``, ``NAME_seg``, ``GT``, ``label0001``); nothing of them is read. Volumes
    with a fourth axis are left out.

    Args:
        path: The folder of sets, absolute or relative to ``LABELEFF_DATA``.
        sets: Folders to read; empty: all.
        exclude: Files to leave out, as patterns of their names or of the ends of their paths, such as imagesTr/img003[5-9].nii.gz:
            what a later test is measured on must not be learnt from here.
    """

    def __init__(self, *, path: str, sets: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.path, self.sets, self.exclude = path, tuple(sets), tuple(exclude)

    def rows(self) -> Manifest:
        """Return one row per volume, all to train; headers are read, voxels are not.

        Raises:
            DataError: A set is missing or has no volumes, or a pattern matches nothing.
        """
        folder = data_folder(self.path)
        found = self.sets or tuple(
            sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
        )
        cases, fourth, unused = [], 0, set(self.exclude)
        for name in found:
            images = volumes_in(folder / name) if (folder / name).is_dir() else []
            if not images and self.sets:
                raise DataError(f"{folder / name}: no volumes; data.dataset.sets names it")
            for path in images:
                inner = path.relative_to(folder)
                if matched := {pattern for pattern in self.exclude if inner.match(pattern)}:
                    unused -= matched
                elif not re.match(r"label\d", stem(path), re.IGNORECASE):
                    whole = "_".join((*inner.parts[:-1], stem(path)))
                    channels, _, spacing = header_of(path, whole)
                    fourth += channels > 1
                    if channels == 1:
                        cases.append(Case(whole, whole, (Source(path),), None, name, "train", spacing))
        if unused:
            raise DataError(f"{folder}: data.dataset.exclude names {sorted(unused)[0]}, which no volume matches")
        if not cases:
            raise DataError(f"{folder}: no volumes; expected a folder per set with .nii.gz files in it, such as BTCV/")
        if fourth:
            self.notes.append(f"{fourth} volumes have a fourth axis: left out")
        return Manifest("prect", tuple(cases), ("background", "foreground"), 3, slice_axis=2)
