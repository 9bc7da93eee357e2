"""Generated chest radiographs as a data set; see :mod:`labeleff.data.chest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.data import chest
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.registry import register


@register("dataset", "phantom_chest")
class PhantomChest(DataSet):
    """Generated chest radiographs: lungs, heart and collarbones, which overlap; needs no files.

    Args:
        patients: Training patients, one image each.
        test: Test patients.
        size: Shape of an image, (y, x), voxels.
        seed: Seed of the population.
    """

    def __init__(
        self, *, patients: int = 60, test: int = 30, size: tuple[int, ...] = (96, 96), seed: int = 2024
    ) -> None:
        if min(patients, test) < 1 or len(size) != 2 or min(size) < 16:
            raise ValueError("patients and test are at least 1, size two lengths of at least 16 voxels")
        self.patients, self.test, self.size, self.seed = patients, test, tuple(size), seed

    def manifest(self) -> Manifest:
        """Return the population: training patients first. Spacing is that of a field of view of 400 mm."""
        spacing = tuple(400.0 / n for n in self.size)
        cases = []
        for number in range(self.patients + self.test):
            role: Role = "train" if number < self.patients else "test"
            name = f"p{number:04d}"
            source = Source(Path("phantom_chest") / name)
            cases.append(Case(name, name, (source,), source, "", role, spacing))
        return Manifest("phantom_chest", tuple(cases), chest.CLASSES, 2, overlapping=True)

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, y, x] uint8."""
        return chest.generate(self.seed, int(case.patient[1:]), shape=self.size)[0][None]

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [y, x], one bit for each region."""
        return chest.generate(self.seed, int(case.patient[1:]), shape=self.size)[1]

    def fingerprint(self, case: Case) -> str:
        """Return everything the case is a function of."""
        return f"phantom_chest|{chest.CHEST_VERSION}|{self.size}|{self.seed}|{case.id}"
