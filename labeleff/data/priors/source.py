"""Sizes learnt from the labelled images of the source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor

from labeleff.data.priors.base import Known, Prior, Ratios, presence, tag_mark, with_background
from labeleff.errors import DataError
from labeleff.registry import register

QUANTILES = np.linspace(0.02, 0.98, 25)
THUMBNAIL = 8
"""Lengths of the small picture of an image that the regressor sees."""


@register("prior", "source_mean")
class SourceMean(Prior):
    """The mean size of every organ in the labelled images in which it is present, in mm where the spacing is known.

    It carries the source's anatomy over to the target: wrong by as much as their organs differ.

    Args:
        tags: Which classes are present: ``none``, ``truth`` or a CSV file, as of the prior ``constant``.
        factor: Multiplies all sizes.
    """

    def __init__(self, *, tags: str = "none", factor: float = 1.0) -> None:
        if factor <= 0:
            raise ValueError("factor is above 0")
        self.tags, self.factor = tags, factor

    @property
    def mark(self) -> str:
        """Tags are weak labels."""
        return tag_mark(self.tags)

    def ratios(self, known: Known) -> Mapping[str, Ratios]:
        """Return the mean size where a class is present."""
        sums, counts = np.zeros(len(known.classes) - 1), np.zeros(len(known.classes) - 1)
        for case, label in known.budget():
            rows = np.nan_to_num(known.counted(label))[:, 1:]
            sums += (rows * _measure(known, case)).sum(0)
            counts += (rows > 0).sum(0)
        if (counts == 0).any():
            name = known.classes[1 + int(np.argmin(counts))]
            raise DataError(
                f"data.prior: no labelled image holds {name!r}; use the prior constant, or raise data.labelled"
            )
        sizes, present = self.factor * sums / counts, presence(self.tags, known)
        return {
            case: with_background(sizes / _measure(known, case) * present(case), f"data.prior: case {case!r}")
            for case in known.cases
        }


@register("prior", "regressor")
class Regressor(Prior):
    """Sizes guessed from the look of an image by a small regressor that is trained on the labelled images.

    The MICCAI 2020 form of the method learns its ratios by an auxiliary network; here extremely randomised trees see the
    quantiles of an image and a thumbnail of it. What a shift of contrast does to them is for the user to find out.

    Args:
        trees: Number of trees.
        factor: Multiplies all sizes.
    """

    def __init__(self, *, trees: int = 200, factor: float = 1.0) -> None:
        if trees < 1 or factor <= 0:
            raise ValueError("trees is at least 1, factor above 0")
        self.trees, self.factor = trees, factor

    def ratios(self, known: Known) -> Mapping[str, Ratios]:
        """Return what the regressor says of every image."""
        looks, sizes = [], []
        for case, label in known.budget():
            rows = known.counted(label)
            told = ~np.isnan(rows).any(1)
            looks.append(_look(known, case)[told])
            sizes.append(rows[told, 1:])
        if not looks:
            raise DataError("data.prior: there is no labelled image to learn sizes from; use the prior constant")
        model = ExtraTreesRegressor(self.trees, random_state=0, n_jobs=1)
        model.fit(np.concatenate(looks), np.concatenate(sizes))
        found = {}
        for case in known.cases:
            guess = model.predict(_look(known, case)).reshape(known.parts(case), -1)
            found[case] = with_background(self.factor * guess, f"data.prior: case {case!r}")
        return found


def _measure(known: Known, case: str) -> float:
    """Return the size of an image, mm² or mm³; 1 where the spacing is unknown, so that sizes are shares."""
    shape, spacing = known.region(case)
    return float(np.prod(shape) * np.prod(spacing)) if np.isfinite(spacing).all() else 1.0


def _look(known: Known, case: str) -> NDArray[np.float64]:
    """Return what the regressor sees of every row of a case."""
    image = known.image(case)
    rows = image[None] if known.slice_axis is None else np.moveaxis(image, known.slice_axis + 1, 0)  # [n, C, *S]
    axes = tuple(range(2, rows.ndim))
    quantiles = np.moveaxis(np.quantile(rows, QUANTILES, axis=axes), 0, -1).reshape(len(rows), -1)
    pool = F.adaptive_avg_pool2d if len(axes) == 2 else F.adaptive_avg_pool3d
    small = pool(torch.from_numpy(np.ascontiguousarray(rows)), THUMBNAIL).flatten(1).numpy()
    return np.concatenate([quantiles, small], 1).astype(np.float64)
