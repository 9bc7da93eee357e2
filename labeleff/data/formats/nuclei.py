"""Nuclei under the microscope: tiles of several appearances, each of which is a domain."""

from __future__ import annotations

from dataclasses import replace

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.compact import Compact
from labeleff.data.manifest import Manifest
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "nuclei")
class Nuclei(Compact):
    """Grey tiles of nuclei in ``<id>.npz`` with ``image`` and ``label``, and ``index.csv`` with id, domain, split, group.

    Tiles of one field share a group, which plays the part of a patient. Domains are kept: fluorescence (``fluo_256``,
    ``fluo_360``, ``fluo_520x696``, ``fluo_other``), ``stain_purple_bg``, ``stain_white_bg``, ``brightfield``. A recipe names those
    it learns from as ``data.source`` and those it adapts to as ``data.target``. Spacing is not known.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
    """

    def __init__(self, *, path: str = "nuclei_128") -> None:
        super().__init__(path=path)

    def manifest(self) -> Manifest:
        """Return one row per tile; ``index.csv`` is read, tiles are not.

        Raises:
            DataError: The index is missing or damaged, or a tile is not there.
        """
        folder = data_folder(self.path)
        if not (folder / "index.csv").is_file():
            raise DataError(f"{folder}: index.csv is missing; it has the columns id, domain, split, group")
        found = self._nuclei(folder)
        gone = next((case for case in found.cases if not case.image[0].path.is_file()), None)
        if gone is not None:
            raise DataError(f"case {gone.id!r}: {gone.image[0].path}: listed in index.csv, but there is no such file")
        fields: dict[str, str] = {}
        for case in found.cases:
            if fields.setdefault(case.patient, case.domain) != case.domain:
                raise DataError(
                    f"{folder / 'index.csv'}: group {case.patient!r} is of the domains {fields[case.patient]!r} and "
                    f"{case.domain!r} (case {case.id!r}); tiles of one field look alike"
                )
        return replace(found, name="nuclei")
