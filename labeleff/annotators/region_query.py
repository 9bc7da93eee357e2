"""RIPU's query: regions of many classes that the network is unsure about (Xie et al., CVPR 2022)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from labeleff.annotators.base_query import Query
from labeleff.batch import Progress
from labeleff.edits import Reviewed
from labeleff.functional.ripu import pixel_score, region_score
from labeleff.registry import register


@register("annotator", "region_query")
class RegionQuery(Query):
    """Ask about regions where impurity times uncertainty is highest: RIPU, region-based (RA) or pixel-based (PA).

    Region-based, the window of the score is the region. Pixel-based, one voxel is asked about, scored by the impurity of
    the window around it times its own entropy, and no other voxel of the window is.

    Args:
        form: ``region`` or ``pixel``.
        window: Half width of the window of the pixel-based score, voxels; the authors' 32 suits images of 640 × 1280.
    """

    def __init__(
        self,
        *,
        form: Literal["region", "pixel"] = "region",
        window: tuple[int, ...] = (32,),
        **budget: Any,
    ) -> None:
        super().__init__(**budget | ({"radius": (0,)} if form == "pixel" else {}))
        if not window or min(window) < 0:
            raise ValueError("window is at least 0")
        self.form, self.window = form, tuple(window)

    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:  # noqa: ARG002
        """Return impurity times uncertainty."""
        logits = case.probs.mean(0, keepdim=True).clamp_min(1e-30).log()
        if self.form == "region":
            return [(1.0, region_score(logits, self._radii(logits.ndim - 2))[0])]
        return [(1.0, pixel_score(logits, self._windows(logits.ndim - 2))[0])]

    def suppressed(self, radius: tuple[int, ...]) -> tuple[int, ...]:
        """Return the distance between picks: boxes do not overlap; pixels keep out of the windows of others."""
        return super().suppressed(radius) if self.form == "region" else self._windows(len(radius))

    def _windows(self, axes: int) -> tuple[int, ...]:
        if len(self.window) not in (1, axes):
            raise ValueError(f"window is {list(self.window)}, but the cases have {axes} axes")
        return self.window * axes if len(self.window) == 1 else self.window
