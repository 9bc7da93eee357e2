"""Learning from the given labels alone: the baseline that every method must beat."""

from __future__ import annotations

from torch import nn

from labeleff.batch import Batch, Progress, StepOutput
from labeleff.functional.losses import DiceForm, segmentation_loss
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "supervised")
class Supervised(Strategy):
    """L = (CE + Dice) / 2 over the labelled voxels.

    Args:
        dice: ``squared`` pools over the batch, which suits slices where a class is often absent; ``linear`` is per
            sample, so that data-parallel processes equal one.
    """

    def __init__(self, *, dice: DiceForm = "squared") -> None:
        super().__init__()
        self.dice: DiceForm = dice

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:  # noqa: ARG002
        """Return ``supervised``: the segmentation loss of the labelled stream."""
        labelled = batch["labelled"]
        logits = backbone(labelled.image)
        loss = segmentation_loss(logits, labelled.label, dice=self.dice)
        return StepOutput({"supervised": loss}, {"labelled": logits.detach()})
