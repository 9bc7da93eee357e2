"""A data set given as a manifest: one JSON file that names images, labels, patients and roles."""

from __future__ import annotations

from pathlib import Path

from labeleff.batch import IGNORE
from labeleff.data.formats.files import SUFFIXES, FileSet, readable, values_of
from labeleff.data.manifest import Manifest, read_manifest
from labeleff.errors import DataError
from labeleff.registry import register


@register("dataset", "manifest")
class ManifestFile(FileSet):
    """Images and labels named one by one in a manifest file, as ``labeleff index`` and ``labeleff corrupt`` write it.

    Files are ``.npz`` and ``.h5`` (``key`` names the array), NIfTI, PNG, TIFF or JPEG. Paths are relative to the manifest.
    Several image files of a case are its channels. NIfTI axes are brought to the closest canonical orientation.

    Args:
        path: The JSON file.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = path

    def rows(self) -> Manifest:
        """Return its rows.

        Raises:
            DataError: The file is no manifest, or names files of a kind that is not read.
        """
        found = read_manifest(Path(self.path).expanduser())
        for case in found.cases:
            for source in (*case.image, *((case.label,) if case.label is not None else ()), *case.raters):
                if not readable(source):
                    raise DataError(
                        f"{self.path}: case {case.id!r}: {source.path.name} is none of {', '.join(SUFFIXES)}"
                    )
                for part in source.parts:
                    wrong = [index for _, index in part.values if values_of(found) <= index != IGNORE]
                    wrong += [part.mask_of] if part.mask_of is not None and part.mask_of >= len(found.classes) else []
                    if wrong:
                        raise DataError(
                            f"{self.path}: case {case.id!r}: a label names class {wrong[0]}, which there is not"
                        )
        return found
