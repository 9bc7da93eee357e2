"""Uncertainty-aware mean teacher (UA-MT): the teacher is heard where it is sure.

Yu et al., "Uncertainty-Aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation", MICCAI 2019,
arXiv:1907.07034.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.backbones.mc_dropout import has_dropout, predict_and_sample, sample, with_dropout
from labeleff.batch import Batch, Progress, StepOutput, Task
from labeleff.functional.ema import BufferRule
from labeleff.functional.losses import DiceForm, segmentation_loss
from labeleff.functional.schedules import ramped
from labeleff.functional.uncertainty import certainty_threshold, noised, sure, weighted_mse
from labeleff.registry import register
from labeleff.strategies.base import Taught


@register("strategy", "uncertainty_mean_teacher")
class UncertaintyMeanTeacher(Taught):
    """L = (CE + Dice) / 2 (labelled) + λ(t) · Σ [u < h(t)] (p - q)² / (K Σ [u < h(t)]) (unlabelled).

    p and q are probabilities of student and teacher, u the entropy of the mean of T predictions of the teacher with dropout
    on and noise on its input, and the threshold h rises from 0.75 log K to log K. A step costs T passes of the teacher more
    than ``mean_teacher``; what they share, all that comes before the first dropout, is computed once.

    The authors' code: ``weight=0.1, rampup=1, ramp_decay=true, teacher_mode=train, buffers=keep, sample_noise=each``; with
    more than two classes SSL4MIS has that and ``scale=binary``.

    Differs from the paper by default: weight, ramp and teacher are those of ``mean_teacher``, so that a comparison of the two
    shows what the threshold adds; input noise is drawn once a step, so that passes share what dropout leaves alone; norm
    layers of the teacher are in eval mode. A backbone without dropout gets one, before the head of the teacher alone: the
    backbone is left as it is, and the student does not train with it (the authors' V-Net has dropout in both).

    Args:
        weight: Consistency weight λ after the ramp.
        rampup: Share of the stage over which λ rises, as ``exp(-5 (1 - t)²)``; 0: no ramp.
        threshold: Entropy above which the teacher is not heard, as a share of the largest one, when the stage starts; it rises
            to 1 over the whole stage, as the ramp does. 1: all but plain guesses count.
        samples: Passes T with dropout.
        sample_noise: Noise on the input of the T passes: drawn ``once``, that of the teacher's own pass, or for ``each``.
        dropout: Probability of the dropout put into the teacher of a backbone that has none, in (0, 1).
        scale: Largest entropy and number of terms per voxel: ``classes`` (log K and K) or ``binary`` (log 2 and 2, whatever K).
        decay: Decay of the teacher's moving average.
        ramp_decay: Use ``min(1 - 1 / (step + 1), decay)``, as the authors do.
        noise: Standard deviation of the noise on the teacher's input, clipped to twice that; units of the image.
        teacher_mode: ``eval`` (of T passes only dropout is active), or ``train``: dropout and batch statistics at work in
            all of them, which are run as passes of doubled batches, as in the authors' code.
        buffers: What happens to the teacher's norm statistics, see ``ema_update_``.
        dice: Form of the Dice loss.
    """

    equivalent_options: ClassVar[Mapping[str, str]] = {
        "dropout": "used where the backbone has no dropout of its own",
        "scale": "the two are one where there are two classes",
    }

    def __init__(
        self,
        *,
        weight: float = 1.0,
        rampup: float = 0.4,
        threshold: float = 0.75,
        samples: int = 8,
        sample_noise: Literal["once", "each"] = "once",
        dropout: float = 0.2,
        scale: Literal["classes", "binary"] = "classes",
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
        if not 0 <= threshold <= 1 or samples < 1 or not 0 < dropout < 1:
            raise ValueError("threshold must lie in [0, 1], samples be at least 1, dropout lie in (0, 1)")
        self.weight, self.rampup, self.threshold, self.samples = weight, rampup, threshold, samples
        self.sample_noise, self.dropout, self.scale = sample_noise, dropout, scale
        self.decay, self.ramp_decay, self.noise, self.teacher_mode = decay, ramp_decay, noise, teacher_mode
        self.buffer_rule = buffers
        self.dice = dice

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the teacher: a copy of the student as it starts, with dropout."""
        self.classes = task.num_classes if self.scale == "classes" else 2
        super().build(backbone, task)
        if not has_dropout(self.teacher):
            with_dropout(self.teacher, task, p=self.dropout)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised`` and ``consistency``. The student sees both streams in one pass."""
        labelled, unlabelled = batch["labelled"], batch.get("unlabelled")
        if unlabelled is None:
            return self.labels_alone(backbone, labelled)
        count = len(labelled.image)
        logits = backbone(torch.cat([labelled.image, unlabelled.image]))
        target, samples = self._look(unlabelled.image)
        heard = sure(samples, certainty_threshold(progress.fraction, start=self.threshold, classes=self.classes))
        heard = heard & unlabelled.valid
        weight = ramped(self.weight, progress.fraction, self.rampup)
        losses = {
            "supervised": segmentation_loss(logits[:count], labelled.label, dice=self.dice),
            "consistency": weight * weighted_mse(logits[count:], target, heard, divisor=self.classes),
        }
        seen = {"labelled": logits[:count].detach(), "unlabelled": logits[count:].detach()}
        share = heard.sum() / unlabelled.valid.sum().clamp_min(1)
        return StepOutput(losses, seen, {"consistency_weight": torch.tensor(weight), "sure": share})

    @torch.no_grad()
    def _look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the teacher says, q [B, K, *S], and its T predictions with dropout [T, B, K, *S]."""
        noisy = noised(image, self.noise)

        def again() -> Tensor:
            return noisy if self.sample_noise == "once" else noised(image, self.noise)

        if self.teacher_mode == "eval":
            if self.sample_noise == "once":
                return predict_and_sample(self.teacher, noisy, self.samples)
            target = self.teacher(noisy).float().softmax(1)
            return target, torch.cat([sample(self.teacher, again(), 1) for _ in range(self.samples)])
        target = self.teacher(noisy).float().softmax(1)
        passes = [min(2, self.samples - first) for first in range(0, self.samples, 2)]
        found = [self.teacher(torch.cat([again() for _ in range(copies)])).float().softmax(1) for copies in passes]
        return target, torch.cat(found).view(self.samples, *target.shape)
