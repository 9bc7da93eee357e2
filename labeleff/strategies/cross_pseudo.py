"""Cross pseudo supervision (CPS): two networks, each learning from the hard labels of the other.

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021, arXiv:2106.01226.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from labeleff.backbones.views import Ensemble
from labeleff.batch import Batch, Progress, StepOutput, Stream, Task
from labeleff.functional.cross_pseudo import crossed_losses
from labeleff.functional.losses import DiceForm, segmentation_loss
from labeleff.functional.schedules import ramped
from labeleff.registry import register
from labeleff.strategies.base import Strategy, peer_of


@register("strategy", "cross_pseudo")
class CrossPseudo(Strategy):
    """L = L_sup(f1) + L_sup(f2) + w(t) [CE(f1, argmax f2) + CE(f2, argmax f1)], L_sup = (CE + Dice) / 2 (labelled).

    f1 is the backbone, f2 a network of the same kind with weights of its own, drawn anew when the stage starts. Labels of the
    other carry no gradient. A step costs two supervised ones over both streams; to predict, one network is enough.

    The authors' code for Cityscapes: ``weight=6, rampup=0, on=both``; for VOC, with CutMix, which is not here, weight 1 and
    unlabelled images only. SSL4MIS on ACDC: ``weight=0.1, rampup=1, on=unlabelled``.

    Differs from the paper by default: supervision is (CE + Dice) / 2 as everywhere here; the weight rises, since from random
    weights, where the authors have ImageNet's, the first hard labels are noise; it ends at 0.5, where a guessed voxel
    counts what the cross-entropy of a labelled one does; guesses about labelled images are left out, their labels are known.

    Args:
        weight: Weight w of the two crossed terms after the ramp.
        rampup: Share of the stage over which w rises, as ``exp(-5 (1 - t)²)``; 0: no ramp.
        on: Images of the crossed terms: ``unlabelled``, or ``both``, as in the authors' code for Cityscapes.
        dice: Form of the Dice loss.
    """

    def __init__(
        self,
        *,
        weight: float = 0.5,
        rampup: float = 0.4,
        on: Literal["unlabelled", "both"] = "unlabelled",
        dice: DiceForm = "squared",
    ) -> None:
        super().__init__()
        if weight < 0 or not 0 <= rampup <= 1:
            raise ValueError("weight must be >= 0, rampup in [0, 1]")
        self.weight, self.rampup, self.on = weight, rampup, on
        self.uses_unknown = on == "both"
        self.dice: DiceForm = dice

    def streams(self) -> dict[str, Stream]:
        """Return labelled and unlabelled patches; without unlabelled cases ``on: unlabelled`` leaves two supervised networks."""
        return {"labelled": Stream("labelled"), "unlabelled": Stream("unlabelled", optional=True)}

    def build(self, backbone: nn.Module, task: Task) -> None:  # noqa: ARG002
        """Make the second network: two that are one would teach each other nothing."""
        self.peer = peer_of(backbone)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised`` and ``crossed`` of the backbone, and both of the peer. Each sees both streams in one pass."""
        labelled, count = batch["labelled"], len(batch["labelled"].image)
        shares = [share for share in (labelled, batch.get("unlabelled")) if share is not None]
        image, valid = torch.cat([s.image for s in shares]), torch.cat([s.valid for s in shares])
        ours, theirs = backbone(image), self.peer(image)
        losses = {
            "supervised": segmentation_loss(ours[:count], labelled.label, dice=self.dice),
            "supervised_peer": segmentation_loss(theirs[:count], labelled.label, dice=self.dice),
        }
        seen = {"labelled": ours[:count].detach()}
        if len(shares) == 2:
            seen["unlabelled"] = ours[count:].detach()
        first = 0 if self.on == "both" else count
        if first == len(image):
            return StepOutput(losses, seen)
        weight = ramped(self.weight, progress.fraction, self.rampup)
        of_ours, of_theirs, agreement = crossed_losses(ours[first:], theirs[first:], valid[first:])
        losses |= {"crossed": weight * of_ours, "crossed_peer": weight * of_theirs}
        return StepOutput(losses, seen, {"agreement": agreement, "crossed_weight": torch.tensor(weight)})

    def predictors(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Return the two networks, the backbone first, and the mean of their predictions."""
        return {"student": backbone, "peer": self.peer, "ensemble": Ensemble([backbone, self.peer])}
