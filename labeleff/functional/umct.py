"""Uncertainty-weighted multi-view co-training (UMCT): each view of an image is taught by the others, the surer ones first.

Xia et al., "3D Semi-Supervised Learning with Uncertainty-Aware Multi-View Co-Training", WACV 2020, arXiv:1811.12506, and
"Uncertainty-aware multi-view co-training for semi-supervised medical image segmentation and domain adaptation", MedIA
2020, arXiv:2006.16806. No code of the authors is known. V views j with predictions p_j in the frame of the image, each
with T predictions ŷ_t under dropout:

    U_j = (1/T) Σ_t <ŷ_t, ŷ_t> - <ȳ, ȳ>,  ȳ = (1/T) Σ_t ŷ_t        epistemic variance
    c_j = 1 / U_j                                                  confidence
    Ŷ_i = Σ_{j≠i} c_j p_j / Σ_{j≠i} c_j                            target of view i
    L   = Σ_labelled Σ_i ℓ(p_i, Y) + λ Σ_unlabelled Σ_i ℓ(p_i, Ŷ_i)    ℓ: Dice loss, λ = 0.2

The papers speak of one confidence per sample and draw maps: both are here, per voxel by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from labeleff.errors import ShapeError
from labeleff.functional.losses import DiceForm, one_hot, soft_losses
from labeleff.functional.regions import hard_labels

Confidence = Literal["voxel", "volume"]
VARIANCE_EPS = 1e-8


def epistemic_variance(samples: Tensor, *, exclusive: bool = True) -> Tensor:
    """Return the variance over predictions under dropout, summed over the classes: [B, 1, *S] float32, never negative.

    The population variance (divisor T) in two passes, since the difference of two squares in U_j rounds to negative
    numbers. It lies in [0, 1/2] for two classes, in [0, 1) for more.

    Args:
        samples: [T, B, K, *S] probabilities of T passes, of any floating type.
        exclusive: Classes exclude one another (softmax). Otherwise every region is a two-class problem of its own, and its
            variance is twice that of its probability: [B, K, *S].

    Raises:
        ShapeError: There is no pass, or no spatial axis.
    """
    if samples.ndim < 4 or not len(samples) or not samples.is_floating_point():
        raise ShapeError(f"samples must be probabilities [T, B, K, *S], not {samples.dtype} {tuple(samples.shape)}")
    mean = samples.mean(0, dtype=torch.float32)
    total = torch.zeros_like(mean)
    for sample in samples:  # one at a time: T float32 copies of a 3-D patch are more than its network takes
        total = total + (sample.float() - mean).square()
    variance = total / len(samples)
    return variance.sum(1, keepdim=True) if exclusive else 2 * variance


def fuse_views(
    probs: Tensor,
    variance: Tensor,
    *,
    eps: float = VARIANCE_EPS,
    confidence: Confidence = "voxel",
    valid: Tensor | None = None,
) -> Tensor:
    """Return the target of every view, the mean of the others weighted by 1 / variance: [V, B, K, *S] float32.

    Views without any variance count alike; of two views each gets the other's prediction exactly. Not detached: what is to
    carry no gradient is detached by the caller.

    Args:
        probs: [V, B, K, *S] probabilities of V >= 2 views.
        variance: [V, B, 1, *S] from :func:`epistemic_variance`, or [V, B, K, *S], which weights every class by itself.
        eps: Smallest variance that is told from none. Smaller ones are raised to it (it is not added).
        confidence: One weight per ``voxel``, or per ``volume``: the mean variance over space counts.
        valid: [B, 1, *S] bool, what the mean over a volume is taken over; None: everything.

    Raises:
        ShapeError: Fewer than two views, shapes that do not belong together, or eps <= 0.
    """
    if probs.ndim < 4 or len(probs) < 2:
        raise ShapeError(f"probs must be [V, B, K, *S] of two views or more, not {tuple(probs.shape)}")
    views, batch, classes, *space = probs.shape
    if tuple(variance.shape) not in {(views, batch, k, *space) for k in (1, classes)}:
        raise ShapeError(
            f"variance is {tuple(variance.shape)}; probs of {tuple(probs.shape)} need {[views, batch, 1, *space]}"
        )
    if not eps > 0:
        raise ShapeError(f"eps is {eps}; it must be > 0")
    variance = variance.float()
    if confidence == "volume":
        variance = _mean_over_space(variance, valid)
    certainty = variance.clamp_min(eps).reciprocal()
    return torch.stack([_weighted_mean(probs, certainty, [j for j in range(views) if j != i]) for i in range(views)])


def _mean_over_space(variance: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of [V, B, k, *S] over what is valid of space, as [V, B, k, 1 …]."""
    space = tuple(range(3, variance.ndim))
    if valid is None:
        return variance.mean(space, keepdim=True)
    inside = valid.to(variance.dtype)
    counts = inside.sum(tuple(range(2, inside.ndim)), keepdim=True)
    return (variance * inside).sum(space, keepdim=True) / counts.clamp_min(1)


def _weighted_mean(probs: Tensor, certainty: Tensor, members: Sequence[int]) -> Tensor:
    """Return the weighted mean of some views: [B, K, *S].

    The members are summed, not everything less the one left out: where that one weighs 1e8, nothing of the rest would be
    left in float32. Weights are normalised first, so that one member alone comes out to the bit.
    """
    whole = certainty[members[0]]
    for j in members[1:]:
        whole = whole + certainty[j]
    mean = (certainty[members[0]] / whole) * probs[members[0]].float()
    for j in members[1:]:
        mean = mean + (certainty[j] / whole) * probs[j].float()
    return mean


def harden(probs: Tensor, *, exclusive: bool = True) -> Tensor:
    """Return the prediction as a hard target, one-hot of the most probable class (the lowest of equals): [B, K, *S] float32.

    Args:
        probs: [B, K, *S].
        exclusive: Otherwise each region by itself: 1 where its probability is at least 1/2.
    """
    return one_hot(hard_labels(probs), probs.shape[1]) if exclusive else (probs >= 0.5).float()


def cotraining_loss(
    logits: Sequence[Tensor],
    targets: Tensor,
    *,
    valid: Tensor | None = None,
    dice: DiceForm = "squared",
    cross_entropy: float = 0.0,
) -> Tensor:
    """Return the loss of every view against its target, [V]; the papers minimise λ times the sum.

    ``Dice loss + w · cross-entropy`` with shares for labels, see ``losses.soft_losses``. The papers use the Dice loss
    alone. Their form of it is not known; the default is the one that is smallest where prediction and target are equal.

    Args:
        logits: [B, K, *S] of each of V views, in the frame of the image.
        targets: [V, B, K, *S], hard or soft; no gradient reaches them.
        valid: [B, 1, *S] bool, False in padding; None: everything counts.
        dice: Form of the Dice loss.
        cross_entropy: Weight w of the cross-entropy.

    Raises:
        ShapeError: There is not one target per view.
    """
    if len(logits) != len(targets):
        raise ShapeError(f"there are {len(logits)} views and {len(targets)} targets")
    losses = []
    for scores, target in zip(logits, targets.detach(), strict=True):
        known = target if valid is None else target * valid
        entropy, overlap = soft_losses(scores, known, dice=dice)
        losses.append(overlap + cross_entropy * entropy if cross_entropy else overlap)
    return torch.stack(losses)
