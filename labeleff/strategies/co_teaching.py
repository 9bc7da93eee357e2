"""Co-teaching: two networks, each learning from the voxels that the other finds easy.

Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", NeurIPS 2018,
arXiv:1804.06872, algorithm 1; voxel by voxel, as PyMIC does it for segmentation or class by class.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Task
from labeleff.functional.robust import keep_smallest, keep_smallest_per_class, voxel_cross_entropy
from labeleff.functional.schedules import sigmoid_rampup
from labeleff.registry import register
from labeleff.strategies.base import Strategy, peer_of


@register("strategy", "co_teaching")
class CoTeaching(Strategy):
    """L = CE of each network over the voxels with the smallest loss in the other one.

    The share that is kept falls from 1 to ``keep`` as ``1 - (1 - keep) · exp(-5 (1 - t)²)``. Voxels are ranked over the
    whole batch, so data-parallel processes do not equal one. A step costs two supervised ones.

    Args:
        ranked: ``class``: a share of each foreground class is left out, and of background as many voxels as of those together.
            ``batch``: a share of all voxels, as in PyMIC; where that is more than the foreground, it may be the foreground.
        keep: Share of voxels kept in the end. PyMIC: 0.8 to 0.85.
        start: Share of the stage before anything is dropped. PyMIC: 0.1.
        rampup: Share of the stage at which ``keep`` is reached. PyMIC: 0.8.
    """

    batch_joint = True

    def __init__(
        self, *, ranked: Literal["class", "batch"] = "class", keep: float = 0.8, start: float = 0.1, rampup: float = 0.8
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1 or not 0 <= start < rampup <= 1:
            raise ValueError("keep must be in (0, 1], and 0 <= start < rampup <= 1")
        self.ranked, self.keep, self.start, self.rampup = ranked, keep, start, rampup

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the second network: the same, with weights of its own."""
        self.peer, self.classes = peer_of(backbone), task.num_classes

    def share(self, progress: Progress) -> float:
        """Return the share of voxels that is kept at a step."""
        if progress.fraction <= self.start:
            return 1.0
        return 1 - (1 - self.keep) * sigmoid_rampup((progress.fraction - self.start) / (self.rampup - self.start))

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``student`` and ``peer``: the losses of the two networks."""
        labelled = batch["labelled"]
        logits = backbone(labelled.image)
        ours = voxel_cross_entropy(logits, labelled.label)
        theirs = voxel_cross_entropy(self.peer(labelled.image), labelled.label)
        share = self.share(progress)
        for_us, for_them = (self._easy(value.detach(), labelled.label, share) for value in (theirs, ours))
        losses = {
            "student": (ours * for_us).sum() / for_us.sum().clamp_min(1),
            "peer": (theirs * for_them).sum() / for_them.sum().clamp_min(1),
        }
        return StepOutput(losses, {"labelled": logits.detach()}, {"kept": torch.tensor(share)})

    def _easy(self, losses: Tensor, label: Tensor, share: float) -> Tensor:
        """Return which voxels [B, *S] have the smallest losses."""
        if self.ranked == "batch":
            return keep_smallest(losses, label != IGNORE, share)
        return keep_smallest_per_class(losses, label, share, self.classes)

    def predictors(self, backbone: nn.Module) -> dict[str, nn.Module]:
        """Return the two networks."""
        return {"student": backbone, "peer": self.peer}
