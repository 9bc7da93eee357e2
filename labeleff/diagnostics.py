"""What a network learns of wrong labels, seen against clean ones. Nothing here reaches training or selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from labeleff.batch import IGNORE, Task
from labeleff.data.annotations import AnnotationStore
from labeleff.data.split import evenly

Values = dict[str, float | None]


class NoiseDiagnostics:
    """Early learning and memorisation of labels that were made wrong (Liu et al., NeurIPS 2020, arXiv:2007.00151).

    Per foreground class, voxels of all cases pooled: ``early_learning``, the IoU of prediction and clean labels where
    given and clean ones differ; ``memorisation``, that of prediction and given labels there; ``label_iou``, the IoU of
    the current labels with the clean ones everywhere. Voxels that either of two labels does not know are left out.

    Args:
        clean: Labels before they were made wrong.
        given: Labels that training began with, and their revisions.
        task: What is segmented.
    """

    def __init__(self, clean: AnnotationStore, given: AnnotationStore, task: Task) -> None:
        self.clean, self.given, self.task = clean, given, task

    def measure(
        self, cases: Sequence[str], predict: Callable[[str], NDArray[np.uint8]], *, revision: int, most: int
    ) -> Values:
        """Return ``WHAT/CLASS`` for each of the three and every foreground class number; None where a union is empty.

        Predicts up to ``most`` whole cases, spread evenly over those whose labels are wrong somewhere; labels alone are
        compared in all of them.

        Args:
            cases: Cases with labels.
            predict: Returns the label map [*S] of a case on the stored grid.
            revision: The current revision of the labels.
            most: Largest number of cases that are predicted.
        """
        classes = self.task.num_classes
        early, memorised, labels = np.zeros((3, 2, classes), np.int64)
        for case in cases:
            clean, current = self.clean.read_given(case), self.given.read(case, revision=revision)
            labels += overlaps(current, clean, (clean != IGNORE) & (current != IGNORE), classes)
        wrong = [case for case in cases if self._disputed(case).any()]
        for case in (wrong[i] for i in evenly(len(wrong), most)):
            where, predicted = self._disputed(case), predict(case)
            early += overlaps(predicted, self.clean.read_given(case), where, classes)
            memorised += overlaps(predicted, self.given.read_given(case), where, classes)
        named = {"early_learning": early, "memorisation": memorised, "label_iou": labels}
        return {
            f"{what}/{c}": float(both[0, c] / both[1, c]) if both[1, c] else None
            for what, both in named.items()
            for c in range(1, classes)
        }

    def _disputed(self, case: str) -> NDArray[np.bool_]:
        clean, given = self.clean.read_given(case), self.given.read_given(case)
        found: NDArray[np.bool_] = (clean != given) & (clean != IGNORE) & (given != IGNORE)
        return found


def overlaps(
    one: NDArray[np.uint8], two: NDArray[np.uint8], where: NDArray[np.bool_], classes: int
) -> NDArray[np.int64]:
    """Return voxels of each class in both and in either of two label maps [2, K], counted in a region."""
    found = np.zeros((2, classes), np.int64)
    for c in range(classes):
        first, second = (one == c) & where, (two == c) & where
        found[:, c] = (first & second).sum(), (first | second).sum()
    return found
