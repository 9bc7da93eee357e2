"""True sizes: an upper bound of what a prior can do, never a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from labeleff.data.priors.base import Known, Prior, Ratios, with_background
from labeleff.registry import register


@register("prior", "true_size")
class TrueSize(Prior):
    """The sizes that the hidden labels of unlabelled images have: the authors' "TrueSize" upper bound.

    Args:
        upper_bound: Must be true: the result is then marked as an upper bound, for it has seen labels outside the budget.
        factor: Multiplies all sizes: a prior that is wrong by so much.
        per: ``image``: each its own; ``constant``: the mean over the images that hold the class, 0 in the others.
    """

    def __init__(
        self, *, upper_bound: bool = False, factor: float = 1.0, per: Literal["image", "constant"] = "image"
    ) -> None:
        if not upper_bound:
            raise ValueError(
                "true sizes come from labels outside the budget; write upper_bound: true, and the result is marked as an "
                "upper bound"
            )
        if factor <= 0:
            raise ValueError("factor is above 0")
        self.factor, self.per = factor, per

    @property
    def mark(self) -> str:
        """Never a result."""
        wrong = "" if self.factor == 1 else f", made wrong by {self.factor - 1:+.0%}"
        return f"UPPER BOUND: the prior is made of true sizes of unlabelled images{wrong}; not a result"

    def ratios(self, known: Known) -> Mapping[str, Ratios]:
        """Return the shares of the hidden labels."""
        true = {case: known.counted(known.truth(case))[:, 1:] for case in known.cases}
        if self.per == "constant":
            every = np.nan_to_num(np.concatenate(list(true.values())))
            mean = every.sum(0) / np.maximum((every > 0).sum(0), 1)
            true = {case: np.where(rows > 0, mean, rows) for case, rows in true.items()}
        return {case: with_background(self.factor * rows, f"data.prior: case {case!r}") for case, rows in true.items()}
