"""Predictions that empty or flood the image: shares of classes followed over the steps of a stage, and when to speak."""

from __future__ import annotations

import torch
from torch import Tensor

SMOOTHING = 0.05
"""Share of the newest batch in running means."""
LOOK_EVERY = 20
"""Steps between looks."""
SMALLEST_SHARE, SMALLEST_RATIO = 1e-3, 0.1
"""Classes of a smaller share are not judged; those below this ratio of what is usual are all but gone."""


def predicted_shares(probs: Tensor, valid: Tensor) -> Tensor:
    """Return the mean probability of every class over the valid voxels: [V, K]; 0 where no voxel is valid.

    Args:
        probs: [V, B, K, *S] of V predictions.
        valid: [B, 1, *S] bool.
    """
    inside = valid.flatten(2).transpose(1, 2).to(probs.dtype)  # [B, N, 1]: a product makes no copy of the maps
    return (probs.flatten(3) @ inside).sum((1, 3)) / inside.sum().clamp_min(1)


def follow_(mean: Tensor, new: Tensor, step: int) -> None:
    """Move a running mean in place: the plain mean at first, then with a memory of ``1 / SMOOTHING`` steps."""
    mean.lerp_(new.to(mean), max(SMOOTHING, 1 / (step + 1)))


def is_gone(predicted: float, usual: float) -> bool:
    """Return whether a class is predicted in less than a tenth of the voxels that are usual."""
    return usual > SMALLEST_SHARE and predicted < SMALLEST_RATIO * usual


def is_flooding(predicted: float, usual: float) -> bool:
    """Return whether a class is predicted in more than ten times the voxels that are usual."""
    return predicted * SMALLEST_RATIO > max(usual, SMALLEST_SHARE)


@torch.no_grad()
def with_mean(shares: Tensor) -> Tensor:
    """Return [V + 1, K]: the shares [V, K] of all, those of their mean prediction first."""
    return torch.cat([shares.mean(0, keepdim=True), shares])
