"""Label maps, spoilt and mended: what is no shape that labels have is not to be trusted.

Adiga et al., "Leveraging Labels Representations via Anatomically-Aware Uncertainty", MICCAI 2022 (left atrium) and MedIA
2024; what is written here is the authors' code. A denoising autoencoder learns from the few label maps there are. With q a
teacher's probabilities and r the autoencoder's version of the teacher's label map, per voxel and class:

    U = (r - q)²                                 uncertainty
    w = exp(-γ U)                                confidence, γ = 1
    L = Σ w (p - q)² / (n Σ w + 1e-16)           consistency of the student p, see ``uncertainty.weighted_mse``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labeleff.batch import IGNORE, beside
from labeleff.functional.losses import LINEAR_EPS, one_hot

FARTHEST, NEAREST = 8, 3
"""Distances over which voxels at a boundary are swapped, voxels."""
SWAPPED = 0.1
"""Share of a slice's boundary that is swapped."""
LARGEST_RADIUS = 4
OPERATIONS = ("erode", "dilate", "open", "close")


def reconstruction_confidence(reconstruction: Tensor, probs: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return ``w = exp(-γ (r - q)²)``, in [exp(-γ), 1], without gradient.

    Args:
        reconstruction: r, [B, K, *S] in [0, 1].
        probs: q, [B, K, *S].
        gamma: γ >= 0; 0 trusts all.
    """
    return torch.exp(-gamma * (reconstruction.detach().float() - probs.detach().float()).square())


def denoising_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Return ``(MSE + Dice loss) / 2`` of an autoencoder of label maps over the known voxels; 0 where there are none.

    MSE is that of the sigmoids and the one-hot label, over voxels and classes. The Dice loss is
    ``1 - mean_k (2 Σ s y + ε) / (Σ s² + Σ y² + ε)`` over the batch, ε = 1e-5, and over the classes but the background.

    Args:
        logits: [B, K, *S], K >= 2.
        label: [B, *S] int64, IGNORE where nobody has said.
    """
    known = (label != IGNORE).unsqueeze(1)
    shares, target = logits.float().sigmoid() * known, one_hot(label, logits.shape[1])
    error = (shares - target).square().sum() / (known.sum() * logits.shape[1]).clamp_min(1)
    axes = (0, *range(2, logits.ndim))
    s, y = shares[:, 1:], target[:, 1:]
    overlap = (2 * (s * y).sum(axes) + LINEAR_EPS) / ((s * s).sum(axes) + (y * y).sum(axes) + LINEAR_EPS)
    return (error + (1 - overlap.mean()) * known.any()) / 2


def corrupt_labels(
    label: Tensor, num_classes: int, *, swap: float = 0.2, morph: float = 0.2, generator: torch.Generator
) -> Tensor:
    """Return label maps that are wrong in the way that predictions are: frayed, thinned, swollen, with holes and crumbs.

    Per slice (2-D: per image; 3-D: across the last axis), each with its own probability: a tenth of the boundary voxels are
    swapped with voxels 3 … 8 away along an axis; and one class is eroded, dilated, opened or closed with a disk of radius
    1 … 4. What an eroded class leaves becomes background, what a dilated one takes it takes from any class: no order of the
    classes matters (the authors filter the map of class numbers). IGNORE neither moves nor is painted over.

    Args:
        label: [B, *S] integers, 2-D or 3-D.
        num_classes: K.
        swap: Probability that voxels of a slice are swapped.
        morph: Probability that a class of a slice changes its outline.
        generator: Of the CPU: what is drawn per slice. Which voxels are swapped is drawn from it too.
    """
    slices = label if label.ndim == 3 else label.movedim(-1, 1)
    flat = slices.reshape(-1, *slices.shape[-2:]).clone()
    draws = torch.rand(len(flat), 4, generator=generator)
    frayed = torch.nonzero(draws[:, 0] < swap).flatten()
    if len(frayed):  # many small steps, each of which would wait for a GPU
        place = beside(frayed, flat)
        flat[place] = torch.stack([_swapped(own, generator) for own in flat[place].cpu()]).to(flat.device)
    changed = torch.nonzero(draws[:, 1] < morph).flatten()
    kinds = (draws[:, 2] * len(OPERATIONS) * LARGEST_RADIUS).long()
    classes = 1 + (draws[:, 3] * (num_classes - 1)).long()
    for kind in sorted(set(kinds[changed].tolist())):  # all slices of one operation and radius at once
        some = changed[kinds[changed] == kind]
        operation, radius = OPERATIONS[kind // LARGEST_RADIUS], 1 + kind % LARGEST_RADIUS
        place = beside(some, flat)
        flat[place] = _reshaped(flat[place], beside(classes[some], flat), operation, radius)
    spoilt = flat.reshape(slices.shape)
    spoilt = spoilt if label.ndim == 3 else spoilt.movedim(1, -1)
    return torch.where(label == IGNORE, label, spoilt)


def _swapped(label: Tensor, generator: torch.Generator) -> Tensor:
    """Return one slice [H, W] in which voxels of the boundary have changed places with others not far away."""
    edge = _boundary(label).flatten().nonzero().flatten()
    edge = edge[torch.rand(len(edge), generator=generator).to(label.device) < SWAPPED]
    far = torch.randint(NEAREST, FARTHEST + 1, (len(edge),), generator=generator)
    way = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])[torch.randint(4, (len(edge),), generator=generator)]
    there = torch.stack([edge // label.shape[1], edge % label.shape[1]], 1) + (way * far[:, None]).to(label.device)
    inside = ((there >= 0) & (there < torch.tensor(label.shape, device=label.device))).all(1)
    edge, other = edge[inside], (there[:, 0] * label.shape[1] + there[:, 1])[inside]
    old = label.flatten()
    both = (old[edge] != IGNORE) & (old[other] != IGNORE)
    edge, other = edge[both], other[both]
    # several may meet at one voxel: it takes what the first of them brings, whatever order threads write in
    first = torch.full_like(old, len(edge)).scatter_reduce_(0, other, torch.arange(len(edge)).to(old), "amin")
    new = old.clone()
    met = first < len(edge)
    new[met] = old[edge[first[met]]]
    new[edge] = old[other]
    return new.view_as(label)


def _boundary(label: Tensor) -> Tensor:
    """Return where one of the four neighbours in a slice [H, W] has another label."""
    edge = torch.zeros_like(label, dtype=torch.bool)
    for axis in (0, 1):
        differs = label.narrow(axis, 1, label.shape[axis] - 1) != label.narrow(axis, 0, label.shape[axis] - 1)
        edge.narrow(axis, 1, label.shape[axis] - 1).logical_or_(differs)
        edge.narrow(axis, 0, label.shape[axis] - 1).logical_or_(differs)
    return edge


def _reshaped(label: Tensor, classes: Tensor, operation: str, radius: int) -> Tensor:
    """Return slices [N, H, W] in each of which one class [N] has another outline."""
    mask = label == classes.view(-1, 1, 1)
    made = {
        "erode": lambda m: _eroded(m, radius),
        "dilate": lambda m: _dilated(m, radius),
        "open": lambda m: _dilated(_eroded(m, radius), radius),
        "close": lambda m: _eroded(_dilated(m, radius), radius),
    }[operation](mask)
    label = torch.where(mask & ~made, torch.zeros_like(label), label)
    return torch.where(made, classes.view(-1, 1, 1).to(label.dtype), label)


def _dilated(mask: Tensor, radius: int) -> Tensor:
    """Return a mask [N, H, W] grown by a disk; nothing grows in from outside."""
    steps = torch.arange(-radius, radius + 1, device=mask.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    return F.conv2d(mask.unsqueeze(1).float(), disk[None, None], padding=radius).squeeze(1) > 0.5


def _eroded(mask: Tensor, radius: int) -> Tensor:
    """Return a mask [N, H, W] shrunk by a disk; the edge of the image shrinks nothing."""
    return ~_dilated(~mask, radius)
