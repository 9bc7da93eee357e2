"""Noise-weighted learning in rounds: what the network of the last round contradicts counts less in the next.

The iterative part of Wang et al., "Annotation-Efficient Learning for Medical Image Segmentation Based on Noisy Pseudo Labels
and Adversarial Learning", IEEE TMI 2021, arXiv:2012.14584; its generation of pseudo-labels is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Task
from labeleff.functional.ema import ema_update_
from labeleff.functional.robust import image_dice, noise_weighted_dice, voxel_cross_entropy, voxel_trust
from labeleff.machine import is_distributed, process_count
from labeleff.registry import register
from labeleff.strategies.base import Strategy, fresh_copy, set_mode

REMEMBERED = 1024
FEWEST = 4


@register("strategy", "noise_weighted_iterative")
class NoiseWeightedIterative(Strategy):
    """L = (weighted CE + noise-weighted Dice) / 2, the weights from a frozen network of the round before.

    ω of a voxel is the weight of its image times its own. An image's weight rises from 0 to 1 between two percentiles of
    the Dice of predictions and labels over the images seen last; a voxel's is 1 where the prediction agrees with the label,
    else exp(-κ (1 - u)) with u the entropy of the prediction over its maximum: sure contradictions count least. In the first
    round the network is the one that the stage began with: a fresh one is sure of nothing, and all images count. A step
    costs one more pass, without gradients.

    The paper's own definition of the weights could not be read; this one is ours. The Dice is that of its group's code;
    ``loss=dice`` is that alone. Training goes on through the rounds, as one stage: nothing is re-initialised.

    Args:
        rounds: Rounds of equal length in the stage.
        low: Percentile of Dice up to which an image counts nothing.
        high: Percentile of Dice from which it counts in full.
        kappa: How little a voxel counts whose label is surely contradicted.
        loss: ``dice_ce`` or ``dice``.
    """

    batch_joint = True
    equivalent_options: ClassVar[Mapping[str, str]] = {
        "low": "percentiles are taken at the end of a round, which a short run does not reach",
        "high": "as low",
    }

    def __init__(
        self,
        *,
        rounds: int = 4,
        low: float = 10.0,
        high: float = 60.0,
        kappa: float = 5.0,
        loss: Literal["dice_ce", "dice"] = "dice_ce",
    ) -> None:
        super().__init__()
        if rounds < 1 or not 0 <= low < high <= 100 or kappa < 0:
            raise ValueError("rounds is at least 1, 0 <= low < high <= 100, kappa at least 0")
        self.rounds, self.low, self.high, self.kappa, self.loss = rounds, low, high, kappa, loss
        self.scores: Tensor
        self.bounds: Tensor
        self.register_buffer("scores", torch.full((REMEMBERED,), torch.nan))
        self.register_buffer("bounds", torch.tensor([-1.0, 0.0]))  # every image counts in full

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the frozen network."""
        self.classes = task.num_classes
        self.frozen = fresh_copy(backbone)

    def set_modes(self, backbone: nn.Module) -> None:
        """Train the backbone; the frozen network predicts."""
        set_mode(backbone, training=True)
        set_mode(self.frozen, training=False)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised``: the weighted loss of the labelled stream."""
        labelled = batch["labelled"]
        round_ = progress.step * self.rounds // max(progress.total, 1)
        if round_ and not progress.micro and progress.step == -(-round_ * progress.total // self.rounds):
            self._next_round(backbone)
        weight = self._weights(labelled)
        logits = backbone(labelled.image)
        loss = noise_weighted_dice(logits, labelled.label, weight)
        if self.loss == "dice_ce":
            entropy = voxel_cross_entropy(logits, labelled.label)
            loss = (loss + (weight * entropy).sum() / weight.sum().clamp_min(1)) / 2
        self._remember(image_dice(logits.detach().argmax(1), labelled.label, self.classes))
        known = (labelled.label != IGNORE).sum().clamp_min(1)
        return StepOutput({"supervised": loss}, {"labelled": logits.detach()}, {"mean_weight": weight.sum() / known})

    def _weights(self, share: Batch) -> Tensor:
        """Return ω [B, *S]; 0 where the label is unknown."""
        with torch.no_grad():
            probs = self.frozen(share.image).float().softmax(1)
            score = image_dice(probs.argmax(1), share.label, self.classes)
            low, high = self.bounds
            image = ((score - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).nan_to_num(1.0)
            voxel = voxel_trust(probs, share.label, kappa=self.kappa) * (share.label != IGNORE)
            weight: Tensor = voxel * image.view(-1, *[1] * (voxel.ndim - 1))
            return weight

    def _next_round(self, backbone: nn.Module) -> None:
        ema_update_(self.frozen, backbone, 0.0, buffers="copy")
        seen = self.scores[~self.scores.isnan()]
        if len(seen) >= FEWEST:
            shares = torch.tensor([self.low, self.high], device=seen.device) / 100
            self.bounds.copy_(torch.quantile(seen, shares))

    def _remember(self, scores: Tensor) -> None:
        """Keep the Dice of the newest images, of all processes."""
        if is_distributed():
            parts = [torch.empty_like(scores) for _ in range(process_count())]
            torch.distributed.all_gather(parts, scores.contiguous())
            scores = torch.cat(parts)
        self.scores.copy_(torch.cat([self.scores, scores.to(self.scores.dtype)])[-REMEMBERED:])
