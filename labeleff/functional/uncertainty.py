"""Teachers that are heard where they are sure: entropies of noisy predictions, and weighted consistency.

Yu et al., "Uncertainty-Aware Self-ensembling Model for Semi-supervised 3D Left Atrium Segmentation", MICCAI 2019,
arXiv:1907.07034 (UA-MT). T predictions ŷ_t of a teacher, q its prediction and p the student's, K classes:

    u = -Σ_k ȳ_k log ȳ_k,  ȳ = (1/T) Σ_t ŷ_t                   predictive entropy
    h = (s + (1 - s) · exp(-5 (1 - t)²)) · log K               threshold, s = 0.75, t the share of training that is done
    L = Σ [u < h] (p - q)² / (n Σ [u < h] + 1e-16)             n = 2 in the authors' code, which has two classes
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from labeleff.functional.losses import REGION_EPS
from labeleff.functional.schedules import sigmoid_rampup


def noised(image: Tensor, noise: float) -> Tensor:
    """Return an image with normal noise, clipped to twice its standard deviation, from torch's global generator.

    Args:
        image: Any shape.
        noise: Standard deviation, units of the image.
    """
    return image + (torch.randn_like(image) * noise).clamp(-2 * noise, 2 * noise)


def certainty_threshold(fraction: float, *, start: float = 0.75, classes: int = 2) -> float:
    """Return the entropy h below which a prediction is sure, in nats; it rises to log K, which all but guesses fall below.

    Args:
        fraction: Share of training that is done, t.
        start: Share s of log K at the start.
        classes: K.
    """
    return (start + (1 - start) * sigmoid_rampup(fraction)) * math.log(classes)


@torch.no_grad()
def sure(samples: Tensor, threshold: float) -> Tensor:
    """Return where the entropy of the mean prediction is below a threshold: [B, 1, *S] bool.

    Args:
        samples: [T, B, K, *S] probabilities of T passes.
        threshold: In nats.
    """
    entropy: Tensor = torch.special.entr(samples.float().mean(0)).sum(1, keepdim=True)
    return entropy < threshold


def weighted_mse(logits: Tensor, target: Tensor, weight: Tensor, *, divisor: float) -> Tensor:
    """Return ``Σ w (softmax z - q)² / (n Σ w + 1e-16)``, a float32 scalar; 0 with a gradient where no weight is.

    With n = K and one weight per voxel, or with n = 1 and one per voxel and class, it is the weighted mean over classes and
    voxels.

    Args:
        logits: z, [B, K, *S] of the student.
        target: q, [B, K, *S] probabilities of the teacher, without gradient.
        weight: w >= 0, [B, 1, *S] or [B, K, *S]; 0 in padding.
        divisor: n.
    """
    weight = weight.float()
    squared = (logits.float().softmax(1) - target.float()).square()
    return (weight * squared).sum() / (divisor * weight.sum() + REGION_EPS)
