"""Bidirectional copy-paste: masks, mixing and the region-wise loss.

Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023, arXiv:2305.00673.
A mask is 1 outside the box and 0 inside. ``A ⊕ B = A·M + B·(1 - M)``: A outside, B inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from labeleff.batch import IGNORE, beside
from labeleff.errors import ShapeError
from labeleff.functional.losses import DiceForm, region_losses


def box_mask(
    spatial: Sequence[int],
    ratio: float = 2 / 3,
    *,
    generator: torch.Generator | None = None,
    reach_edge: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return [*S] float32: 1 outside a random box, 0 inside.

    The side of the box is ``floor(ratio · n)`` per axis, at least 1. Its corner is uniform over every legal position.

    Args:
        spatial: Lengths of the axes, voxels.
        ratio: Side of the box as a share of the axis (β), in (0, 1].
        generator: Source of randomness, on the CPU.
        reach_edge: False: the authors' exclusive upper bound, so that the box never touches the far edge.
        device: Where the mask is made.

    Raises:
        ShapeError: The ratio is not in (0, 1], or an axis has no length.
    """
    if not 0 < ratio <= 1:
        raise ShapeError(f"ratio is {ratio}; the side of the box must be a share of the axis in (0, 1]")
    if not spatial or min(spatial) < 1:
        raise ShapeError(f"spatial is {tuple(spatial)}; every axis needs at least one voxel")
    mask = torch.ones(tuple(spatial), device=device)
    box = []
    for length in spatial:
        side = max(1, math.floor(ratio * length))
        last = length - side if reach_edge else max(length - side - 1, 0)
        corner = int(torch.randint(last + 1, (1,), generator=generator))
        box.append(slice(corner, corner + side))
    mask[tuple(box)] = 0
    return mask


def paste(outer: Tensor, inner: Tensor, mask: Tensor) -> Tensor:
    """Return ``outer · mask + inner · (1 - mask)``, exactly, for any dtype and any leading axes.

    Args:
        outer: [..., *S], seen where the mask is 1.
        inner: [..., *S], seen where the mask is 0.
        mask: [*S], or anything that broadcasts.
    """
    return torch.where(mask > 0, outer, inner)


def mixed_loss(
    logits: Tensor,
    target_outer: Tensor,
    target_inner: Tensor,
    mask: Tensor,
    *,
    weight_outer: float,
    weight_inner: float,
    dice: DiceForm = "squared",
    ignore_index: int = IGNORE,
) -> Tensor:
    """Return (Dice + cross-entropy) / 2 of mixed images, each term normalised inside its own region.

    ``CE = w_o · Σ ce(z, t_o) M / Σ M + w_i · Σ ce(z, t_i) (1-M) / Σ (1-M)``, the Dice loss likewise, with sums over batch
    and space (``linear`` Dice: over space, per sample). The size of the box does not weight the regions.

    Args:
        logits: [B, K, *S] of the mixed images.
        target_outer: [B, *S] int64, true outside the box.
        target_inner: [B, *S] int64, true inside the box.
        mask: [*S] or [B, *S], 1 outside and 0 inside.
        weight_outer: 1 where the outside is labelled, α where it is pseudo-labelled.
        weight_inner: The same for the inside.
        dice: ``squared`` (authors' ACDC code) or ``linear`` (authors' LA and pancreas code).
        ignore_index: Label that neither term counts.

    Raises:
        ShapeError: Shapes do not fit one another.
    """
    if target_outer.shape != logits.shape[:1] + logits.shape[2:] or target_inner.shape != target_outer.shape:
        raise ShapeError(
            f"logits {tuple(logits.shape)} need targets of shape {(logits.shape[0], *logits.shape[2:])}, "
            f"not {tuple(target_outer.shape)} and {tuple(target_inner.shape)}"
        )
    outside = (mask > 0).expand(target_outer.shape)
    target = torch.where(outside, target_outer, target_inner)
    counted = target != ignore_index
    regions = torch.stack([outside & counted, ~outside & counted], dim=1)
    cross_entropy, overlap = region_losses(logits, target, regions, dice=dice)
    weights = beside(torch.tensor([weight_outer, weight_inner], dtype=cross_entropy.dtype), cross_entropy)
    return (weights * (cross_entropy + overlap)).sum() / 2
