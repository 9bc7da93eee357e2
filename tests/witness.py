"""A plug-in for tests: an annotator that rewrites every label at each revision, and a strategy that will not have old ones."""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
from torch import nn

from labeleff.annotators.base import Annotator
from labeleff.batch import IGNORE, Batch, Progress, StepOutput
from labeleff.edits import Edit, Reviewed
from labeleff.registry import register
from labeleff.strategies.base import Strategy

EVERY = 3


def due(step: int) -> int:
    """Return the class that every voxel has after the revisions before a step."""
    return 1 + (step // EVERY) % 2


@register("annotator", "rewriting")
class Rewriting(Annotator):
    """Give every voxel one class, another one at each revision."""

    role: ClassVar[str] = "labelled"

    def revise(self, cases: Iterable[Reviewed], progress: Progress) -> Iterator[Edit]:
        for case in cases:
            yield Edit(case.case, np.full_like(case.label, due(progress.step)), "corrected")


@register("strategy", "watching")
class Watching(Strategy):
    """Refuse labels of an earlier revision."""

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        share = batch["labelled"]
        if progress.step >= EVERY:
            seen = set(share.label.unique().tolist()) - {IGNORE}
            if seen != {due(progress.step)}:
                raise RuntimeError(f"step {progress.step}: stale labels {sorted(seen)} instead of {due(progress.step)}")
        return StepOutput({"loss": backbone(share.image).square().mean()})
