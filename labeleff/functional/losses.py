"""Losses that several methods share. All honour IGNORE and return 0 with a gradient where nothing is known."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from labeleff.batch import IGNORE

DiceForm = Literal["squared", "linear"]
SQUARED_EPS, LINEAR_EPS, REGION_EPS = 1e-10, 1e-5, 1e-16


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Return [B, K, *S] float32; labels outside 0 … K-1 (IGNORE among them) are all zero."""
    classes = torch.arange(num_classes, device=label.device).view(1, -1, *([1] * (label.ndim - 1)))
    return (label.unsqueeze(1) == classes).float()


def region_losses(
    logits: Tensor, label: Tensor, regions: Tensor, *, dice: DiceForm = "squared"
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and Dice loss of each of R regions, every one normalised by itself.

    Cross-entropy is ``Σ ce · m / Σ m`` over batch and space. The Dice loss is averaged over all classes, background
    included. ``squared`` pools over the batch: ``1 - (2 Σ p y m + ε) / (Σ p² m + Σ y² m + ε)``, ε = 1e-10 (BCP's ACDC
    code). ``linear`` is per sample: ``1 - (2 Σ p y m + ε) / (Σ (p + y) m + ε)``, ε = 1e-5 (BCP's LA and pancreas code).
    An empty region costs 0.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64; where it is no class, every region must be 0.
        regions: [B, R, *S] weights m in [0, 1].
        dice: Form of the Dice loss.

    Returns:
        Two tensors [R], float32.
    """
    # b batch, k class, r region, n voxel: sums over voxels are matrix products, which cost one read of each operand
    log_probs = F.log_softmax(logits.float(), dim=1).flatten(2)
    masks = regions.flatten(2).float()
    target = one_hot(label, logits.shape[1]).flatten(2)
    probs = log_probs.exp()

    def summed(values: Tensor) -> Tensor:
        return torch.bmm(values, masks.transpose(1, 2)).transpose(1, 2)  # [b, r, k]

    count = masks.sum((0, 2))
    cross_entropy = -summed(log_probs * target).sum((0, 2)) / (count + REGION_EPS)
    overlap, present = summed(probs * target), summed(target)
    if dice == "linear":
        ratio = (2 * overlap + LINEAR_EPS) / (summed(probs) + present + LINEAR_EPS)
        return cross_entropy, 1 - ratio.mean((0, 2))
    size = (summed(probs * probs) + present).sum(0)
    return cross_entropy, 1 - ((2 * overlap.sum(0) + SQUARED_EPS) / (size + SQUARED_EPS)).mean(1)


def segmentation_loss(
    logits: Tensor, label: Tensor, *, dice: DiceForm = "squared", ignore_index: int = IGNORE
) -> Tensor:
    """Return (cross-entropy + Dice loss) / 2 over the voxels whose label is known; 0 where there are none.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64 with ``ignore_index`` where nobody has said.
        dice: Form of the Dice loss, see :func:`region_losses`.
        ignore_index: Label that is left out.
    """
    cross_entropy, overlap = region_losses(logits, label, (label != ignore_index).unsqueeze(1), dice=dice)
    return (cross_entropy + overlap).sum() / 2


def probability_mse(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return the mean squared difference of softmax probabilities over classes and valid voxels.

    Args:
        logits: [B, K, *S] of the student.
        target: [B, K, *S] probabilities of the teacher, without gradient.
        valid: [B, 1, *S] bool.
    """
    squared = (logits.float().softmax(1) - target.float()).square() * valid
    return squared.sum() / (valid.sum() * logits.shape[1]).clamp_min(1)
