"""Sizes from a file, one row for each image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from labeleff.data.priors.base import Known, Prior, Ratios, Unit, read_table, share, with_background
from labeleff.errors import DataError
from labeleff.registry import register


@register("prior", "table")
class Table(Prior):
    """A size per class and image, from a CSV file.

    Args:
        path: Columns ``case``, ``slice`` where volumes are seen slice by slice, and one for each class. With a column for
            the background, rows are divided by their sum (which must be 1 within 1 %); without one it is the rest.
        unit: ``ratio``, ``voxels``, ``mm2`` or ``ml``.
        renormalise: Divide rows with a background by their sum. False: as they are, which is what the authors do (their
            prostate prior sums to 1.005).
    """

    def __init__(self, *, path: str, unit: Unit = "ratio", renormalise: bool = True) -> None:
        self.path, self.unit, self.renormalise = path, unit, renormalise

    def ratios(self, known: Known) -> Mapping[str, Ratios]:
        """Return the rows of the file as shares."""
        table = read_table(self.path, known, "data.prior.path")
        return {
            case: np.stack([self._row(table[case][i], case, known) for i in range(known.parts(case))])
            for case in known.cases
        }

    def _row(self, row: Mapping[str, float], case: str, known: Known) -> Ratios:
        where = f"data.prior: {self.path}: case {case!r}"
        shares = {name: share(value, self.unit, *known.region(case), where) for name, value in row.items()}
        foreground = np.array([shares[name] for name in known.classes[1:]])
        background = shares.get(known.classes[0])
        if background is None:
            return with_background(foreground, where)
        whole = np.array([background, *foreground])
        if abs(whole.sum() - 1) > 0.01:
            raise DataError(f"{where}: the row sums to {whole.sum():.4f} of the image; 1 within 1 % is needed")
        return whole / whole.sum() if self.renormalise else whole
