"""Regions drawn at random: anywhere, or with a share of them on the foreground. What every query has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labeleff.annotators.base_query import Query, draws
from labeleff.batch import IGNORE, Progress
from labeleff.edits import Reviewed
from labeleff.registry import register

NEVER = float("-inf")


@register("annotator", "random")
class Random(Query):
    """Ask about regions drawn evenly from all places."""

    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:
        """Return noise."""
        return [(1.0, torch.rand(case.label.shape, generator=draws(progress, case.case, "places")))]


@register("annotator", "random_foreground")
class RandomForeground(Query):
    """Ask about regions of which a share is centred on foreground, as the network sees it: usable with people.

    nnActive (Lüth et al., TMLR 2025) finds that no active method it tries reliably beats random regions of which 33 % or
    66 % are on the foreground. Theirs is drawn by the labels; this one by predictions, every class with equal odds.

    Args:
        foreground: Share of the budget on foreground.
    """

    def __init__(self, *, foreground: float = 0.66, **budget: Any) -> None:
        super().__init__(**budget)
        if not 0 <= foreground <= 1:
            raise ValueError("foreground is a share in [0, 1]")
        self.foreground = foreground

    def scores(self, case: Reviewed, progress: Progress) -> list[tuple[float, Tensor]]:
        """Return noise on each class, then other noise anywhere: places that a class was drawn at would be gone from it."""
        seen = self.seen(case)
        noise = torch.rand(seen.shape, generator=draws(progress, case.case, "places"))
        anywhere = torch.rand(seen.shape, generator=draws(progress, case.case, "anywhere"))
        classes = range(1, case.probs.shape[1])
        strata = [(self.foreground / len(classes), torch.where(seen == k, noise, NEVER)) for k in classes]
        return [*strata, (1 - self.foreground, anywhere)]

    def seen(self, case: Reviewed) -> Tensor:
        """Return the class of every voxel [*S]."""
        return case.probs.mean(0).argmax(0)


@register("annotator", "random_foreground_oracle")
class RandomForegroundOracle(RandomForeground):
    """As ``random_foreground``, but drawn by the hidden labels, as nnActive does: a marked bound, not usable with people."""

    oracle = True

    def seen(self, case: Reviewed) -> Tensor:
        """Return the true class of every voxel [*S]; unknown ones are of none."""
        if case.truth is None:
            raise ValueError("hidden labels are needed")
        truth = torch.from_numpy(case.truth).long()
        return torch.where(truth == IGNORE, -1, truth)
