"""Which labels look wrong: measured, not changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Progress
from labeleff.edits import Edit, Reviewed
from labeleff.functional.confident import LabelIssues, label_quality
from labeleff.functional.robust import image_dice
from labeleff.registry import register


@register("annotator", "label_quality")
class LabelQuality(Annotator):
    """Measure how far predictions contradict the labels of each case, and change nothing.

    Belongs into a stage with ``folds``, so that no network has seen the labels it judges. The log gets one list per measure,
    cases in the order of their names: ``loss`` (mean cross-entropy), ``flagged`` (share of voxels flagged by confident
    learning over all cases), ``quality`` (soft minimum of the probabilities of the labels), ``dice`` (mean over the
    foreground classes of the label), and ``dice_1`` … for each class: 0 where only the label or only the prediction has it,
    null where neither does.
    """

    role: ClassVar[str] = "labelled"

    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit]:  # noqa: ARG002
        """Look at all cases; yields nothing."""
        issues: LabelIssues | None = None
        rows: dict[str, dict[str, float]] = {}
        known: list[int] = []
        for case in cases:
            probs = case.probs.mean(0)
            issues = issues or LabelIssues(len(probs))
            issues.add(probs, case.label)
            label = torch.from_numpy(case.label.astype("int64"))
            own = probs.gather(0, label.clamp_max(len(probs) - 1)[None])[0][label != IGNORE]
            known.append(len(own))
            rows[case.case] = {
                "loss": float(-own.clamp_min(1e-6).log().mean()) if len(own) else float("nan"),
                "quality": label_quality(own),
                "dice": float(image_dice(probs.argmax(0)[None], label[None], len(probs))[0]),
                **_dice_by_class(probs.argmax(0)[label != IGNORE], label[label != IGNORE], len(probs)),
            }
        for row, count, (place, _, _) in zip(rows.values(), known, issues.find() if issues else (), strict=True):
            row["flagged"] = len(place) / max(count, 1)
        self._rows = rows
        yield from ()

    def describe(self, progress: Progress) -> Mapping[str, float | list[float | None]]:  # noqa: ARG002
        """Return the measures of the last revision."""
        rows = getattr(self, "_rows", {})
        return {
            name: [None if rows[case][name] != rows[case][name] else rows[case][name] for case in sorted(rows)]
            for name in next(iter(rows.values()), {})
        }


def _dice_by_class(predicted: Tensor, label: Tensor, classes: int) -> dict[str, float]:
    """Return the Dice of each foreground class over known voxels [n]; NaN where neither has it."""
    scores = {}
    for c in range(1, classes):
        is_, said = predicted == c, label == c
        size = int(is_.sum() + said.sum())
        scores[f"dice_{c}"] = 2 * int((is_ & said).sum()) / size if size else float("nan")
    return scores
