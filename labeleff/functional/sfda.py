"""Source-free domain adaptation: entropy of predictions, and the shares of classes that are expected beforehand.

Bateson et al., "Source-Relaxed Domain Adaptation for Image Segmentation" (AdaEnt), MICCAI 2020, arXiv:2005.03697, and
"Source-Free Domain Adaptation for Image Segmentation" (AdaMI), Medical Image Analysis 2022, arXiv:2108.03152. All in
float32. Voxels that are not ``valid`` (padding, labelled ones) take no part; without a mask all do, as in the authors' code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-10
Ratio = Literal["max_normalised", "mean_softmax"]
Direction = Literal["pred_prior", "prior_pred", "cross_entropy"]


def weighted_entropy(logits: Tensor, weights: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
    """Return the mean over voxels of ``-Σ_k ν_k p_k log(p_k + 1e-10)``, nats.

    Args:
        logits: [B, K, *S].
        weights: [K], ν; None: ones. The mean is not divided by them.
        valid: [B, 1, *S] bool.

    Returns:
        Scalar; 0, with a gradient, where no voxel counts.
    """
    probs = logits.float().softmax(1)
    terms = probs * (probs + EPS).log()
    if weights is not None:
        terms = terms * weights.to(terms).view(1, -1, *[1] * (terms.ndim - 2))
    if valid is not None:
        terms, probs = terms * valid, probs * valid
    return -terms.sum() / (probs.sum() + EPS)


def class_ratio(logits: Tensor, how: Ratio = "max_normalised", *, valid: Tensor | None = None) -> Tensor:
    """Return the predicted share of every class in every image.

    Args:
        logits: [B, K, *S].
        how: ``mean_softmax``: the mean probability, which is what the papers say. ``max_normalised``: the share of
            p / (max_k p + 1e-10), which is what the authors' code does; equal on one-hot predictions, larger for classes that
            do not win otherwise. The gradient goes through the maximum.
        valid: [B, 1, *S] bool.

    Returns:
        [B, K]; rows sum to 1, and are all 0 where no voxel counts.
    """
    probs = logits.float().softmax(1)
    if how == "max_normalised":
        probs = probs / (probs.amax(1, keepdim=True) + EPS)
    if valid is not None:
        probs = probs * valid
    sums = probs.flatten(2).sum(2)
    return sums / (sums.sum(1, keepdim=True) + EPS)


def class_ratio_kl(ratio: Tensor, prior: Tensor, *, direction: Direction = "pred_prior", eps: float = EPS) -> Tensor:
    """Return the mean over images of the divergence of predicted from expected shares, nats.

    ``eps`` is more than a guard: a class that is expected nowhere costs -log eps per unit of predicted share, 23 at 1e-10.

    Args:
        ratio: [B, K], predicted.
        prior: [B, K], expected; rows of NaN (nothing is known) take no part.
        direction: ``pred_prior``: Σ r (log r - log τ), AdaMI; ``prior_pred``: Σ τ (log τ - log r); ``cross_entropy``:
            -Σ τ log r, as an earlier state of the authors' code has it.
        eps: Added within every logarithm.

    Returns:
        Scalar; 0, with a gradient, where nothing is known of any image.
    """
    known = ~prior.isnan().any(1)
    tau = torch.where(known[:, None], prior, 1.0).to(ratio)
    log_ratio, log_prior = (ratio + eps).log(), (tau + eps).log()
    if direction == "pred_prior":
        terms = ratio * (log_ratio - log_prior)
    elif direction == "prior_pred":
        terms = tau * (log_prior - log_ratio)
    else:
        terms = -tau * log_ratio
    return (terms.sum(1) * known).sum() / known.sum().clamp_min(1)
