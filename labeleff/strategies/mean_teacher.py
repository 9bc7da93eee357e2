"""Mean teacher: the average of past students teaches consistency on unlabelled images.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780; the segmentation form is
that of UA-MT and SSL4MIS without uncertainty.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from labeleff.batch import Batch, Progress, StepOutput, Task
from labeleff.functional.ema import BufferRule
from labeleff.functional.losses import DiceForm, probabilities, probability_mse, segmentation_loss
from labeleff.functional.schedules import ramped
from labeleff.functional.uncertainty import noised
from labeleff.registry import register
from labeleff.strategies.base import Taught


@register("strategy", "mean_teacher")
class MeanTeacher(Taught):
    """L = (CE + Dice) / 2 (labelled) + λ(t) · MSE(softmax student, softmax teacher) (unlabelled).

    Regions that overlap have sigmoids in place of softmax.

    The default is the one we would defend: no early-life ramp of the decay is needed once the weight itself is ramped,
    a full weight of 1 and a teacher in eval mode. SSL4MIS: ``weight=0.1, ramp_decay=True, teacher_mode=train,
    buffers=keep``.

    Args:
        weight: Consistency weight λ after the ramp.
        rampup: Share of the stage over which λ rises, as ``exp(-5 (1 - t)²)``; 0: no ramp.
        decay: Decay of the teacher's moving average.
        ramp_decay: Use ``min(1 - 1 / (step + 1), decay)``, as UA-MT and SSL4MIS do.
        noise: Standard deviation of the noise on the teacher's input, clipped to twice that; units of the image.
        teacher_mode: ``eval``, or ``train`` (dropout and batch statistics at work, as in the authors' code).
        buffers: What happens to the teacher's norm statistics, see ``ema_update_``.
        dice: Form of the Dice loss.
    """

    supports_regions: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        rampup: float = 0.4,
        decay: float = 0.99,
        ramp_decay: bool = False,
        noise: float = 0.1,
        teacher_mode: Literal["eval", "train"] = "eval",
        buffers: BufferRule = "average",
        dice: DiceForm = "squared",
    ) -> None:
        super().__init__()
        if weight < 0 or noise < 0 or not 0 <= rampup <= 1 or not 0 <= decay <= 1:
            raise ValueError("weight and noise must be >= 0, rampup and decay in [0, 1]")
        self.weight, self.rampup, self.decay, self.ramp_decay = weight, rampup, decay, ramp_decay
        self.noise, self.teacher_mode = noise, teacher_mode
        self.buffer_rule = buffers
        self.dice = dice

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the teacher: a copy of the student as it starts."""
        super().build(backbone, task)
        self.exclusive = task.exclusive

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised`` and ``consistency``. The student sees both streams in one pass."""
        labelled, unlabelled = batch["labelled"], batch.get("unlabelled")
        if unlabelled is None:
            return self.labels_alone(backbone, labelled)
        count = len(labelled.image)
        logits = backbone(torch.cat([labelled.image, unlabelled.image]))
        with torch.no_grad():
            target = probabilities(self.teacher(noised(unlabelled.image, self.noise)), exclusive=self.exclusive)
        weight = ramped(self.weight, progress.fraction, self.rampup)
        losses = {
            "supervised": segmentation_loss(logits[:count], labelled.label, dice=self.dice),
            "consistency": weight * probability_mse(logits[count:], target, unlabelled.valid, exclusive=self.exclusive),
        }
        seen = {"labelled": logits[:count].detach(), "unlabelled": logits[count:].detach()}
        return StepOutput(losses, seen, {"consistency_weight": torch.tensor(weight)})
