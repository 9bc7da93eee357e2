"""Losses that wrong labels disturb less. All honour IGNORE and return 0 with a gradient where nothing is known."""

from __future__ import annotations

import math
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


def noise_weighted_dice(
    logits: Tensor, label: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, ignore_index: int = IGNORE
) -> Tensor:
    """Return ``1 - mean_c (2 Σ ω p y + ε) / (Σ ω p + Σ ω y + ε)``, every sum over all voxels of the batch.

    The loss of Wang et al., "Annotation-Efficient Learning for Medical Image Segmentation Based on Noisy Pseudo Labels and
    Adversarial Learning", IEEE TMI 2021, arXiv:2012.14584, as their group's PyMIC computed it then. With ω = 1 it is the
    soft Dice loss over the batch, background included.

    Args:
        logits: [B, K, *S].
        label: [B, *S] int64.
        weight: ω, image weight times voxel weight, [B, *S] or anything that spreads to it; None: 1.
        eps: Keeps an absent class finite.
        ignore_index: Label whose voxels have no weight.
    """
    omega = (label != ignore_index).float() if weight is None else weight * (label != ignore_index)
    omega = omega.unsqueeze(1)
    p, y = logits.float().softmax(1) * omega, one_hot(label, logits.shape[1])
    over = (0, *range(2, logits.ndim))
    common = (p * y).sum(over)
    return 1 - ((2 * common + eps) / (p.sum(over) + (omega * y).sum(over) + eps)).mean()


@torch.no_grad()
def voxel_trust(probs: Tensor, label: Tensor, *, kappa: float = 5.0) -> Tensor:
    """Return [B, *S]: 1 where the most probable class is the label, else ``exp(-κ (1 - u))``, u the entropy over log K.

    A sure contradiction is a reason to doubt the label, an unsure one is not.

    Args:
        probs: [B, K, *S].
        label: [B, *S] int64.
        kappa: κ.
    """
    entropy = torch.special.entr(probs).sum(1) / math.log(probs.shape[1])
    return torch.where(probs.argmax(1) == label, 1.0, torch.exp(-kappa * (1 - entropy)))


@torch.no_grad()
def image_dice(predicted: Tensor, label: Tensor, classes: int, *, ignore_index: int = IGNORE) -> Tensor:
    """Return [B] the Dice of hard predictions and labels, averaged over the foreground classes an image's label has.

    NaN for an image whose label has none.

    Args:
        predicted: [B, *S] integer.
        label: [B, *S] integer.
        classes: K.
        ignore_index: Label whose voxels count for nothing.
    """
    known = (label != ignore_index).flatten(1)
    predicted, label = predicted.flatten(1), label.flatten(1)
    scores = []
    for c in range(1, classes):
        is_, said = (predicted == c) & known, label == c
        size = said.sum(1)
        found = 2 * (is_ & said).sum(1) / (is_.sum(1) + size).clamp_min(1)
        scores.append(torch.where(size > 0, found, torch.nan))
    return torch.stack(scores).nanmean(0)


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


def keep_smallest_per_class(
    values: Tensor, label: Tensor, share: float, classes: int, *, ignore_index: int = IGNORE
) -> Tensor:
    """Return which known voxels have the smallest values: of each class a share, of background all but as many as left out there.

    How many labels are wrong goes with the size of what was drawn, not with the size of the image around it.

    Args:
        values: [B, *S], without gradient.
        label: [B, *S] int64; 0 is background.
        share: Of the voxels of each foreground class in the whole batch, in (0, 1].
        classes: K.
        ignore_index: Label that is left out.

    Returns:
        [B, *S] bool; at least one voxel of every class that is there.
    """
    background = label == 0
    kept = torch.zeros_like(background)
    for c in range(1, classes):
        kept |= keep_smallest(values, label == c, share)
    foreground = ~background & (label != ignore_index)
    around, left_out = int(background.sum()), int(foreground.sum() - kept.sum())
    return kept | keep_smallest(values, background, 1 - left_out / max(around, 1))
