"""Volumes as their publishers released them, told apart by a number or a site: what these layouts share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from labeleff.data.formats.base import data_folder
from labeleff.data.formats.files import FileSet, visible, with_headers
from labeleff.data.formats.nifti_files import is_nifti, spacing_of, stem
from labeleff.data.formats.nnunet import without_labels
from labeleff.data.manifest import Case, Manifest, Source
from labeleff.errors import DataError


def volume(
    name: str, patient: str, image: Path, label: Path, domain: str, values: Mapping[int, int] | None = None
) -> Case:
    """Return the row of a volume, its spacing read from the header.

    Args:
        name: Of the case.
        patient: Who it is of.
        image: Its file.
        label: That of its label.
        domain: Its site or modality.
        values: Class of every value that the label file may hold; None: values are the classes' own numbers.
    """
    source = Source(label, values=tuple((values or {}).items()))
    return Case(name, patient, (Source(image),), source, domain, "train", spacing_of(image, name))


def numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Return the NIfTI files anywhere below a folder whose names, without the ending, match; by the number in the first group.

    Raises:
        DataError: Two files have the same number.
    """
    found: dict[int, Path] = {}
    for path in visible(folder, "**/*.nii*"):
        if is_nifti(path) and (named := re.fullmatch(pattern, stem(path), re.IGNORECASE)):
            other = found.setdefault(int(named[1]), path)
            if other is not path:
                raise DataError(f"{path}: has the number of {other}; keep one of them below {folder}")
    return dict(sorted(found.items()))


def last_are_tested(cases: Iterable[Case], test: int, where: str) -> tuple[Case, ...]:
    """Return cases of which the last patients of every domain, by name, are for the test.

    Raises:
        DataError: Nothing would be left to learn from.
    """
    found = sorted(cases, key=lambda case: (case.domain, case.patient, case.id))
    tested = set()
    for domain in dict.fromkeys(case.domain for case in found):
        patients = list(dict.fromkeys(case.patient for case in found if case.domain == domain))
        if test >= len(patients):
            raise DataError(
                f"{where}: {domain} has {len(patients)} patients, of which test: {test} leaves none to learn from; lower it"
            )
        tested |= set(patients[len(patients) - test :])
    return tuple(replace(case, role="test" if case.patient in tested else "train") for case in found)


class Challenge(FileSet):
    """A challenge whose own test volumes have no public labels: they are left out, or learnt from."""

    def __init__(self, *, path: str, unlabelled_tests: bool = False) -> None:
        super().__init__()
        self.path, self.unlabelled_tests = path, unlabelled_tests

    def challenge(
        self, name: str, classes: tuple[str, ...], cases: Sequence[Case], bare: Sequence[Case], official: Iterable[str]
    ) -> Manifest:
        """Return the manifest, and note what became of the test volumes.

        Args:
            name: Of the data set.
            classes: Names, background first.
            cases: Volumes with a label.
            bare: The challenge's own test volumes.
            official: The training list in its order; names that are not there are passed over.
        """
        self.notes += without_labels(
            "the challenge's test", [case.id for case in bare], learnt_from=self.unlabelled_tests
        )
        known = [*cases, *bare] if self.unlabelled_tests else cases
        rows, channels = with_headers(known, axes=3, where=str(data_folder(self.path)))
        there = {case.id for case in (*cases, *bare)}
        return Manifest(name, rows, classes, 3, channels, 2, tuple(one for one in official if one in there))
