"""Confident learning: labels that networks which never saw them surely contradict are forgotten, or replaced.

Northcutt, Jiang and Chuang, JAIR 2021, arXiv:1911.00068; see ``functional.confident``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np

from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Progress
from labeleff.edits import Edit, Reviewed
from labeleff.functional.confident import LabelIssues
from labeleff.registry import register


@register("annotator", "confident_learning")
class ConfidentLearning(Annotator):
    """Flag voxels by confident learning and forget their labels, or take the prediction in their place.

    Belongs into a stage with ``folds``, so that every case is predicted by a network that was not trained on it; a network
    that has memorised a label has nothing to say against it.

    Args:
        action: ``ignore``: flagged voxels become unknown; ``relabel``: they get the most probable class.
        by_case: Choose within each case how many and which; otherwise among all voxels of all cases.
    """

    role: ClassVar[str] = "labelled"

    def __init__(self, *, action: Literal["ignore", "relabel"] = "ignore", by_case: bool = False) -> None:
        super().__init__()
        self.action, self.by_case = action, by_case
        self._said: dict[str, float | list[float | None]] = {}

    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit]:  # noqa: ARG002
        """Read all cases, then yield an edit for each that has flagged voxels."""
        issues: LabelIssues | None = None
        labels = []
        for case in cases:
            probs = case.probs.mean(0)
            issues = issues or LabelIssues(len(probs))
            issues.add(probs, case.label)
            labels.append((case.case, case.label))
        flagged = known = 0
        found = issues.find(by_case=self.by_case) if issues is not None else []
        for (name, label), (place, guess, sure) in zip(labels, found, strict=True):
            known, flagged = known + int((label != IGNORE).sum()), flagged + len(place)
            if len(place):
                mask, new = np.zeros(label.shape, bool), np.full(label.shape, IGNORE, np.uint8)
                mask.flat[place] = True
                if self.action == "relabel":
                    new.flat[place] = guess
                note = "contradicted by a network that never saw it"
                yield Edit(name, new, "corrected", None, mask, float(sure.mean()), note)
        self._said = {"flagged_share": flagged / max(known, 1)}
        if issues is not None:
            self._said["thresholds"] = [None if np.isnan(t) else float(t) for t in issues.thresholds]

    def describe(self, progress: Progress) -> Mapping[str, float | list[float | None]]:  # noqa: ARG002
        """Return the share of known voxels that was flagged, and the thresholds of the classes."""
        return self._said
