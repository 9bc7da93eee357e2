"""Generated patients of two sites as a data set; see :mod:`labeleff.data.sites`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import derive_seed
from labeleff.data import phantom, sites
from labeleff.data.formats.base import DataSet
from labeleff.data.manifest import Case, Manifest, Role, Source
from labeleff.registry import register

DOMAINS = ("source", "target")


@register("dataset", "phantom_sites")
class PhantomSites(DataSet):
    """Generated patients of the domains ``source`` and ``target``, other people at each; needs no files.

    The source is the data set ``phantom`` with one site. The target differs in grey values, noise, resolution and the size
    of the organs; each difference is an option, and off at the value given with it. As set, a network trained on the source
    finds organs in the target but misses much of them; with inverted contrast it finds next to nothing.

    Args:
        patients: Training patients per domain.
        test: Test patients per domain.
        ndim: 2: a few slices of every patient; 3: one volume of every patient.
        size: Shape of an image, voxels; default 96 × 96, or 40 × 56 × 56 (z, y, x).
        slices: 2-D images per patient, evenly spread over the middle of the body.
        seed: Seed of the populations.
        inverted: Organs whose contrast is inverted in the target: ``large``, ``paired``, ``small``. Off: none.
        contrast: Factor of all contrasts within the target's bodies; negative: everything is inverted. Off: 1.
        gamma: Exponent of the target's grey values on their scale of 0 … 1. Off: 1.
        noise: Standard deviation of the target's noise; organs stand out by about 0.9. Off: 0.35, the source's.
        blur: Standard deviation of the target's blur, voxels. Off: 0.
        organs: Factor of the radii of the target's organs. Off: 1.
    """

    def __init__(
        self,
        *,
        patients: int = 40,
        test: int = 20,
        ndim: int = 2,
        size: tuple[int, ...] | None = None,
        slices: int = 4,
        seed: int = 2024,
        inverted: tuple[str, ...] = (),
        contrast: float = 0.8,
        gamma: float = 2.5,
        noise: float = 0.5,
        blur: float = 0.7,
        organs: float = 1.15,
    ) -> None:
        if ndim not in (2, 3) or min(patients, test, slices) < 1:
            raise ValueError("ndim is 2 or 3; patients, test and slices at least 1")
        self.size = tuple(size) if size is not None else ((96, 96) if ndim == 2 else (40, 56, 56))
        if len(self.size) != ndim or min(self.size) < 8:
            raise ValueError(f"size is {list(self.size)}; give {ndim} lengths of at least 8 voxels")
        unknown = [name for name in inverted if name not in phantom.CLASSES[1:]]
        if unknown:
            raise ValueError(f"inverted names {unknown[0]!r}; organs are {', '.join(phantom.CLASSES[1:])}")
        if contrast == 0 or gamma <= 0 or min(noise, blur) < 0 or not 0.2 <= organs <= 2:
            raise ValueError("contrast is not 0, gamma above 0, noise and blur not negative, organs in [0.2, 2]")
        self.shifts = {
            "source": sites.Shift(),
            "target": sites.Shift(tuple(inverted), contrast, gamma, noise, blur, organs),
        }
        self.patients, self.test, self.ndim, self.slices, self.seed = patients, test, ndim, slices, seed

    def manifest(self) -> Manifest:
        """Return both populations, training patients first. Spacing is that of a field of view of 160 mm."""
        spacing = tuple(160.0 / n for n in self.size)
        cases = []
        for domain in DOMAINS:
            for number in range(self.patients + self.test):
                role: Role = "train" if number < self.patients else "test"
                patient = f"{domain}_{number:04d}"
                for index in range(self.slices if self.ndim == 2 else 1):
                    name = f"{patient}_s{index}" if self.ndim == 2 else patient
                    source = Source(Path("phantom_sites") / name)
                    cases.append(Case(name, patient, (source,), source, domain, role, spacing))
        return Manifest("phantom_sites", tuple(cases), phantom.CLASSES, self.ndim)

    def _generate(self, case: Case) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        height = None
        if self.ndim == 2:
            height = 0.45 * (2 * (int(case.id.rsplit("_s", 1)[1]) + 0.5) / self.slices - 1)
        number = int(case.patient.rsplit("_", 1)[1])
        shift = self.shifts[case.domain]
        return sites.generate(self._population(case.domain), number, shape=self.size, shift=shift, height=height)

    def _population(self, domain: str) -> int:
        """Return the seed of a domain's patients: nobody is at both sites."""
        return self.seed if domain == "source" else derive_seed("phantom_sites", domain, self.seed)

    def read_image(self, case: Case) -> NDArray[Any]:
        """Return [1, *S] uint8."""
        return self._generate(case)[0][None]

    def read_label(self, case: Case) -> NDArray[np.uint8]:
        """Return [*S]."""
        return self._generate(case)[1]

    def fingerprint(self, case: Case) -> str:
        """Return everything the case is a function of."""
        versions = (phantom.GENERATOR_VERSION, sites.GENERATOR_VERSION)
        return f"phantom_sites|{versions}|{(self.size, self.slices, self.seed, self.shifts[case.domain])}|{case.id}"
