"""ACDC, the cardiac challenge of 2017: as its publishers distribute it, and as SSL4MIS's authors converted it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from labeleff.batch import IGNORE
from labeleff.data.formats.base import data_folder, lines_of
from labeleff.data.formats.files import FileSet, with_headers
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.errors import DataError
from labeleff.registry import register

CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
SCRIBBLE_VALUES = ((0, 0), (1, 1), (2, 2), (3, 3), (4, IGNORE))
"""What the scribbles of Valvano et al. hold: 4 is what nobody has drawn on."""
TRAIN = (
    99, 38, 50, 100, 58, 21, 49, 20, 72, 40, 60, 89, 4, 56, 98, 96, 31, 18, 94, 47, 48, 55, 97, 74, 43, 41, 63, 37, 95, 54, 26, 88,
    32, 69, 6, 71, 12, 73, 61, 17, 25, 10, 57, 29, 51, 5, 36, 46, 62, 34, 76, 92, 70, 77, 67, 3, 91, 16, 14, 44, 42, 90, 53, 27,
    35, 86, 23, 9, 79, 15,
)  # fmt: skip
"""Training patients of SSL4MIS in their order: the first 1, 3, 7 … are the papers' labelled sets."""
VALIDATION = (28, 85, 82, 87, 19, 30, 78, 45, 2, 39)
TEST = (11, 13, 84, 33, 93, 22, 68, 24, 83, 81, 80, 1, 7, 66, 8, 65, 75, 64, 59, 52)


@register("dataset", "acdc")
class Acdc(FileSet):
    """ACDC as distributed: ``patientNNN/Info.cfg`` with the frames ED and ES, ``patientNNN_frameMM.nii.gz``, ``…_gt.nii.gz``.

    Patients lie in the folder itself, or in ``training/`` and ``testing/`` below it, at any depth. Frames are found by
    ``Info.cfg``, not by their order. A frame without ``_gt`` is unlabelled. Labels: 1 right ventricle, 2 myocardium, 3 left
    ventricle. The volumes of all frames (``_4d``) are not read.

    Args:
        path: The folder, absolute or relative to ``LABELEFF_DATA``.
        split: ``ssl4mis``: of the 100 training patients, 70 to train, 10 to validate, 20 to test, as most semi-supervised papers
            have it; ``official``: the folder ``training`` to train, ``testing`` to test.
        phases: Frames to read.
    """

    def __init__(
        self, *, path: str, split: Literal["ssl4mis", "official"] = "ssl4mis", phases: tuple[str, ...] = ("ED", "ES")
    ) -> None:
        super().__init__()
        if split not in ("ssl4mis", "official"):
            raise ValueError(f"split is {split!r}; give ssl4mis or official")
        if not phases or set(phases) - {"ED", "ES"}:
            raise ValueError(f"phases is {list(phases)}; name ED, ES or both")
        self.path, self.split, self.phases = path, split, tuple(phases)

    def rows(self) -> Manifest:
        """Return one row per patient and phase.

        Raises:
            DataError: There are no patients, or a patient's ``Info.cfg`` or frame is missing or damaged.
        """
        folder = data_folder(self.path)
        places = sorted(folder.rglob("patient[0-9][0-9][0-9]/Info.cfg"), key=lambda path: path.parent.name)
        if not places:
            raise DataError(f"{folder}: no patients; expected patientNNN/Info.cfg, perhaps in training/ and testing/")
        cases, left_out = [], 0
        for place in places:
            role = self._role(place.parent)
            if role is None:
                left_out += 1
                continue
            frames = _frames(place)
            for number in dict.fromkeys(frames[phase] for phase in self.phases):
                cases.append(_frame(place.parent, number, role))
        if left_out:
            self.notes.append(f"{left_out} patients are outside the split {self.split}: left out")
        rows, channels = with_headers(cases, axes=3, where=str(folder))
        here = {case.patient for case in rows}
        order = tuple(name for name in map("patient{:03d}".format, TRAIN) if name in here)
        return Manifest("acdc", rows, CLASSES, 3, channels, 2, order if self.split == "ssl4mis" else ())

    def _role(self, patient: Path) -> Role | None:
        if self.split == "official":
            return "test" if "test" in patient.parent.name.lower() else "train"
        number = int(patient.name.removeprefix("patient"))
        if number in TRAIN:
            return "train"
        return "validation" if number in VALIDATION else "test" if number in TEST else None


def _frames(path: Path) -> dict[str, int]:
    """Return the numbers of the frames ED and ES in an ``Info.cfg``.

    Raises:
        DataError: It does not tell them.
    """
    found = dict(line.split(":", 1) for line in lines_of(path) if ":" in line)
    try:
        return {phase: int(found[phase]) for phase in ("ED", "ES")}
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: ED and ES are needed, the numbers of the frames: ED: 1 ({error})") from error


def _frame(patient: Path, number: int, role: Role) -> Case:
    name = f"{patient.name}_frame{number:02d}"
    for ending in (".nii.gz", ".nii"):
        image, label = patient / f"{name}{ending}", patient / f"{name}_gt{ending}"
        if image.is_file():
            return Case(name, patient.name, (Source(image),), Source(label) if label.is_file() else None, "", role)
    raise DataError(f"{patient}: {name}.nii.gz is missing; Info.cfg names the frame")


@register("dataset", "acdc_h5")
class AcdcH5(FileSet):
    """ACDC as SSL4MIS's authors released it: ``data/patientNNN_frameMM.h5`` with ``image`` and ``label``, and lists.

    The volumes are read (slices first; a 2-D network sees their slices), not the copies of single slices in ``data/slices/``.
    Lists: ``train.list``, ``val.list``, ``test.list``. Spacing is not known.

    Args:
        path: The folder that holds ``data/`` and the lists, absolute or relative to ``LABELEFF_DATA``.
        scribbles: Learn from the data set ``scribble`` of the training files, where 4 is not labelled, in place of ``label``.
    """

    def __init__(self, *, path: str, scribbles: bool = False) -> None:
        super().__init__()
        self.path, self.scribbles = path, scribbles

    def rows(self) -> Manifest:
        """Return the cases of the three lists.

        Raises:
            DataError: A list or a listed volume is missing.
        """
        folder = data_folder(self.path)
        listed: tuple[tuple[str, Role], ...] = (
            ("train.list", "train"),
            ("val.list", "validation"),
            ("test.list", "test"),
        )
        cases = []
        for file, role in listed:
            for name in lines_of(folder / file):
                path = folder / "data" / f"{name}.h5"
                if not path.is_file():
                    raise DataError(f"case {name!r}: {path}: listed in {file}, but there is no such volume")
                label = Source(path, "label")
                if self.scribbles and role == "train":
                    label = Source(path, "scribble", SCRIBBLE_VALUES)
                cases.append(Case(name, name.split("_")[0], (Source(path, "image"),), label, "", role))
        official = tuple(dict.fromkeys(case.patient for case in cases if case.role == "train"))
        return Manifest("acdc", tuple(cases), CLASSES, 3, 1, 0, official)
