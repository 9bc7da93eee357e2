"""Losses that wrong labels disturb less. All honour IGNORE and return 0 with a gradient where nothing is known."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from labeleff.batch import IGNORE
from labeleff.functional.losses import one_hot


def voxel_cross_entropy(logits: Tensor, label: Tensor, *, ignore_index: int = IGNORE) -> Tensor:
    """Return the cross-entropy of every voxel, [B, *S] float32; 0 where the label is unknown."""
    return F.cross_entropy(logits.float(), label, ignore_index=ignore_index, reduction="none")


def generalised_cross_entropy(logits: Tensor, label: Tensor, *, q: float = 0.7, ignore_index: int = IGNORE) -> Tensor:
    """Return the mean of ``(1 - p_y^q) / q`` over known voxels: between cross-entropy (q to 0) and MAE (q = 1).

    Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018,
    arXiv:1805.07836, eq. 6, with q as there. PyMIC's default is 0.5.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64.
        q: In (0, 1].
        ignore_index: Label that is left out.
    """
    likelihood = -voxel_cross_entropy(logits, label, ignore_index=ignore_index)
    return _mean(-torch.expm1(q * likelihood) / q, label != ignore_index)


def symmetric_cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Return the mean of ``α CE + β RCE`` over known voxels; RCE swaps label and prediction, with log 0 = ``log_zero``.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019, arXiv:1908.06112. With
    one-hot labels RCE is ``-log_zero (1 - p_y)``.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64.
        alpha: Weight of the cross-entropy, which learns fast and fits noise.
        beta: Weight of the reverse cross-entropy, which does neither.
        log_zero: What stands for the logarithm of 0, below 0.
        ignore_index: Label that is left out.
    """
    cross_entropy = voxel_cross_entropy(logits, label, ignore_index=ignore_index)
    reverse = log_zero * torch.expm1(-cross_entropy)
    return _mean(alpha * cross_entropy + beta * reverse, label != ignore_index)


def noise_robust_dice(
    logits: Tensor,
    label: Tensor,
    *,
    gamma: float = 1.5,
    denominator: Literal["squared", "linear"] = "squared",
    eps: float = 1e-5,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Return ``Σ |p - y|^γ / (Σ p² + Σ y² + ε)``, pooled over the batch, averaged over all classes.

    Wang et al., "A Noise-Robust Framework for Automatic Segmentation of COVID-19 Pneumonia Lesions From CT Images", IEEE
    TMI 39(8), 2020. γ = 2 is like the Dice loss, γ = 1 like the mean absolute error. ``linear``: ``Σ p + Σ y`` below, as
    PyMIC computes it; with γ = 1 that is the plain soft Dice loss.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64.
        gamma: In [1, 2].
        denominator: ``squared`` (the paper) or ``linear`` (PyMIC).
        eps: Keeps an absent class finite.
        ignore_index: Label that is left out.
    """
    known = (label != ignore_index).unsqueeze(1)
    p, y = logits.float().softmax(1) * known, one_hot(label, logits.shape[1]) * known
    over = (0, *range(2, logits.ndim))
    distance = (p - y).abs().pow(gamma)
    size = (p * p + y * y) if denominator == "squared" else (p + y)
    return (distance.sum(over) / (size.sum(over) + eps)).mean()


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return (values * known).sum() / known.sum().clamp_min(1)


def keep_smallest(values: Tensor, known: Tensor, share: float) -> Tensor:
    """Return which known voxels have the smallest values, a share of them, at least one where any is known.

    Args:
        values: [B, *S], without gradient.
        known: [B, *S] bool.
        share: Of the known voxels of the whole batch, in (0, 1].

    Returns:
        [B, *S] bool. Voxels that tie with the last one kept are kept too.
    """
    chosen = values[known]
    if not len(chosen):
        return known
    count = max(1, round(share * len(chosen)))
    edge = torch.kthvalue(chosen, count).values
    return known & (values <= edge)
