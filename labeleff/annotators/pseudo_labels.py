"""Pseudo-labels: what the network is sure of becomes the label of a case that has none.

Lee, "Pseudo-Label", ICML 2013 workshop; per voxel, by rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Progress
from labeleff.edits import Edit, Reviewed
from labeleff.functional.regions import hard_labels, largest_components
from labeleff.registry import register


@register("annotator", "pseudo_labels")
class PseudoLabels(Annotator):
    """Label every voxel nobody has labelled with the most probable class, where that is probable enough.

    Args:
        threshold: Smallest probability of the class; below it nobody has said.
        largest_component: Keep the largest component of each class, over the whole case.
    """

    def __init__(self, *, threshold: float = 0.0, largest_component: bool = False) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it is a probability in [0, 1]")
        self.threshold, self.largest_component = threshold, largest_component

    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit]:  # noqa: ARG002
        """Yield one edit per case; voxels that were given are left alone."""
        for case in cases:
            probs = case.probs.mean(0, keepdim=True)
            label = hard_labels(probs)
            if self.largest_component:
                label = largest_components(label, probs.shape[1])
            best = probs.amax(1)
            label = torch.where(best >= self.threshold, label, IGNORE)
            free = case.given == IGNORE
            yield Edit(case.case, label[0].numpy().astype(np.uint8), "pseudo", mask=free, confidence=float(best.mean()))
