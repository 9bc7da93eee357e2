"""Generated patients as a data set; see :mod:`labeleff.data.phantom`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from labeleff.data import hands, phantom, strangers
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.registry import register


@register("dataset", "phantom")
class Phantom(DataSet):
    """Generated patients with three organs; needs no files.

    Args:
        patients: Training patients.
        test: Test patients.
        ndim: 2: a few slices of every patient; 3: one volume of every patient.
        size: Shape of an image, voxels; default 96 × 96, or 40 × 56 × 56 (z, y, x).
        slices: 2-D images per patient, evenly spread over the middle of the body.
        sites: Scanners; patients are dealt out to them in turn.
        seed: Seed of the population.
        foreign: What further unlabelled training patients are, as many as there are others, of the domain ``foreign``:
            ``site`` (an unknown scanner), ``absent`` (no organs) or ``anatomy`` (other organs in other places).
        raters: People who each draw the organs with borders of their own. Training learns from them, evaluation measures
            against the truth; 0: training has the truth too.
    """

    def __init__(
        self,
        *,
        patients: int = 60,
        test: int = 30,
        ndim: int = 2,
        size: tuple[int, ...] | None = None,
        slices: int = 4,
        sites: int = 1,
        seed: int = 2024,
        foreign: Literal["none", "site", "absent", "anatomy"] = "none",
        raters: int = 0,
    ) -> None:
        if ndim not in (2, 3) or min(patients, test, slices, sites) < 1 or sites > len(phantom.SITES) or raters < 0:
            raise ValueError(
                f"ndim is 2 or 3; patients, test, slices at least 1; sites 1 … {len(phantom.SITES)}; raters at least 0"
            )
        self.size = tuple(size) if size is not None else ((96, 96) if ndim == 2 else (40, 56, 56))
        if len(self.size) != ndim or min(self.size) < 8:
            raise ValueError(f"size is {list(self.size)}; give {ndim} lengths of at least 8 voxels")
        self.patients, self.test, self.ndim, self.slices = patients, test, ndim, slices
        self.sites, self.seed, self.foreign, self.raters = sites, seed, foreign, raters

    def manifest(self) -> Manifest:
        """Return the population: training patients first. Spacing is that of a field of view of 160 mm."""
        cases = []
        spacing = tuple(160.0 / n for n in self.size)
        for number in range(self.patients + self.test):
            role: Role = "train" if number < self.patients else "test"
            for index in range(self.slices if self.ndim == 2 else 1):
                name = f"p{number:04d}_s{index}" if self.ndim == 2 else f"p{number:04d}"
                source = Source(Path("phantom") / name)
                site = f"site{number % self.sites}"
                votes = tuple(Source(source.path, str(rater)) for rater in range(self.raters))
                cases.append(Case(name, f"p{number:04d}", (source,), source, site, role, spacing, votes))
        return Manifest("phantom", (*cases, *self._strangers(spacing)), phantom.CLASSES, self.ndim)

    def _strangers(self, spacing: tuple[float, ...]) -> Iterator[Case]:
        """Yield the foreign patients: images without labels."""
        for number in range(self.patients if self.foreign != "none" else 0):
            for index in range(self.slices if self.ndim == 2 else 1):
                name = f"f{number:04d}_s{index}" if self.ndim == 2 else f"f{number:04d}"
                yield Case(name, f"f{number:04d}", (Source(Path("phantom") / name),), None, "foreign", "train", spacing)

    def _generate(self, case: Case) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        number, height = int(case.patient[1:]), self._height(case)
        return phantom.generate(self.seed, number, shape=self.size, site=number % self.sites, height=height)

    def _height(self, case: Case) -> float | None:
        """Return where a slice lies in its patient; None for a volume."""
        if self.ndim == 3:
            return None
        index = int(case.id.rsplit("_s", 1)[1])
        return 0.45 * (2 * (index + 0.5) / self.slices - 1)

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, *S] uint8."""
        if case.domain == "foreign" and self.foreign != "none":
            number, height = int(case.patient[1:]), self._height(case)
            return strangers.generate(self.foreign, self.seed, number, shape=self.size, height=height)[None]
        return self._generate(case)[0][None]

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S]: the truth, or what the rater in the source's key drew."""
        label = self._generate(case)[1]
        rater = case.label.key if case.label is not None else ""
        return hands.drawn_by(int(rater), label, self.seed, case.id) if rater else label

    def fingerprint(self, case: Case) -> str:
        """Return everything the case is a function of."""
        options: tuple[Any, ...] = (self.ndim, self.size, self.slices, self.sites, self.seed)
        if case.domain == "foreign":
            options = (*options, self.foreign)
        return f"phantom|{phantom.GENERATOR_VERSION}|{options}|{case.id}"
