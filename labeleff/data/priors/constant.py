"""Sizes from anatomical knowledge, the same for every image in which the organ is present."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from labeleff.data.priors.base import (
    Known,
    Prior,
    Ratios,
    Unit,
    check_sizes,
    presence,
    share,
    tag_mark,
    with_background,
)
from labeleff.registry import register


@register("prior", "constant")
class Constant(Prior):
    """One size per class, wherever the class is present: the authors' prior of source-free adaptation (SFDA).

    The authors over-estimate sizes rather than under-estimate them, by 20 to 80 % in the tables they ship.

    Args:
        sizes: Size by class.
        unit: ``ratio`` (share of the image), ``voxels``, ``mm2`` (of images and slices) or ``ml`` (of volumes).
        tags: Which classes are present: ``none`` (all of them, in every image), ``truth`` (as the labels say: extra
            supervision, which marks the result), or a CSV file with columns ``case``, ``slice`` where volumes are seen slice
            by slice, and one for each class.
        factor: Multiplies all sizes.
    """

    def __init__(
        self, *, sizes: Mapping[str, float], unit: Unit = "ratio", tags: str = "none", factor: float = 1.0
    ) -> None:
        if not sizes or min(sizes.values()) < 0 or factor <= 0:
            raise ValueError("sizes are at least 0, one for each class, and factor is above 0")
        self.sizes, self.unit, self.tags, self.factor = sizes, unit, tags, factor

    @property
    def mark(self) -> str:
        """Tags are weak labels."""
        return tag_mark(self.tags)

    def ratios(self, known: Known) -> Mapping[str, Ratios]:
        """Return the constant where a class is present, 0 where it is not."""
        sizes, present = check_sizes(self.sizes, known.classes), presence(self.tags, known)
        found = {}
        for case in known.cases:
            where = f"data.prior: case {case!r}"
            shares = np.array([share(self.factor * s, self.unit, *known.region(case), where) for s in sizes])
            found[case] = with_background(shares * present(case), where)
        return found
