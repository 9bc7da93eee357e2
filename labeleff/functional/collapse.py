"""What goes wrong unseen: predictions that empty or flood the image, losses that stay where nothing is told apart."""

from __future__ import annotations

import torch
from torch import Tensor

from labeleff.batch import Progress

SMOOTHING = 0.05
"""Share of the newest batch in running means."""
LOOK_EVERY = 20
"""Steps between looks."""
SMALLEST_SHARE, SMALLEST_RATIO = 1e-3, 0.1
"""Classes of a smaller share are not judged; those below this ratio of what is usual are all but gone."""

PATIENCE, PATIENT_SHARE, STUCK = 200, 0.05, 0.95
"""Steps, and share of the stage, before a loss is judged; and how near to what can be had for nothing it has learnt nothing."""
TELLS = 0.1
"""A mean correlation of predictions with the truth above which something is learnt, whatever the loss is."""


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


def watch_(
    means: Tensor, loss: Tensor, nothing: Tensor, progress: Progress, *, told: Tensor | None = None
) -> tuple[float, float] | None:
    """Follow a loss and what can be had for nothing; where they are still near by now, return the running means of both.

    Args:
        means: [2], or [3] with ``told``; moved in place, read at looks alone (which waits for the device).
        loss: Of this step.
        nothing: What it would be if nothing were told apart.
        progress: The step.
        told: Correlation of what is predicted with the truth, for losses that a few bad misses decide: where its mean is
            above ``TELLS`` something is learnt.
    """
    new = [loss.detach(), nothing] if told is None else [loss.detach(), nothing, told]
    follow_(means, torch.stack([value.to(means) for value in new]), progress.step)
    patience = max(PATIENCE, PATIENT_SHARE * progress.total)
    if progress.step < patience or progress.step % LOOK_EVERY != LOOK_EVERY - 1:
        return None
    now, idle, *known = means.tolist()
    if not now >= STUCK * idle > 0 or any(value > TELLS for value in known):
        return None
    return now, idle


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
