"""Resizing and pooling by matrix products: their gradients repeat on a GPU, and small maps take half the time on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128
"""Voxels of the longest axis up to which a CPU resizes a volume, or enlarges an image, by products.

Their cost grows with the axis, torch's own does not; it is lower for images that shrink.
"""


def resized(maps: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Return maps resized linearly along every axis of space, as ``interpolate`` does.

    On a GPU the gradient of torch's own is summed in an order that differs from run to run (trilinear, before torch has another
    form of it), or is sorted into order voxel by voxel. There it is one matrix product per axis, in which a voxel that is not
    finite spreads along all axes.

    Args:
        maps: [B, C, *S] floating, of two or three axes.
        size: S of the result, voxels.
        align_corners: As of ``interpolate``.
    """
    given = maps.shape[2:]
    short = max(*given, *size) <= SHORT
    if maps.is_cuda or (short and (maps.ndim == 5 or all(n <= made for n, made in zip(given, size, strict=True)))):
        return by_products(maps, size, align_corners=align_corners)
    mode = "bilinear" if maps.ndim == 4 else "trilinear"
    return F.interpolate(maps, tuple(size), mode=mode, align_corners=align_corners)


def by_products(maps: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Return what :func:`resized` does on a GPU, and with small maps everywhere."""
    return _along(maps, size, partial(_neighbours, align_corners=align_corners))


def pooled(maps: Tensor, grid: int) -> Tensor:
    """Return maps averaged over ``grid`` cells along each axis of space, as ``adaptive_avg_pool`` does.

    Where cells overlap, the gradient of torch's own is summed by a GPU in an order that differs from run to run.

    Args:
        maps: [B, C, *S] floating.
        grid: Cells along each axis.

    Returns:
        [B, C, grid, …].
    """
    return _along(maps, [grid] * (maps.ndim - 2), _cells)


def _along(maps: Tensor, size: Sequence[int], weights: Callable[[int, int, Tensor], Tensor]) -> Tensor:
    """Return maps multiplied along each axis whose length changes by weights [made, given]; first where it shrinks most."""
    with torch.autocast(maps.device.type, enabled=False):  # weights need more than the 8 bits of bfloat16
        found = maps if maps.dtype == torch.float64 else maps.float()
        for axis in sorted(range(2, maps.ndim), key=lambda axis: size[axis - 2] / maps.shape[axis]):
            before, given, after = found.shape[:axis], found.shape[axis], found.shape[axis + 1 :]
            made = size[axis - 2]
            if made != given:
                product = weights(given, made, found)
                rows = found.reshape(-1, given, after.numel())
                rows = product @ rows if after else rows.squeeze(2) @ product.T
                found = rows.view(*before, made, *after)
        return found.to(maps.dtype).contiguous()


def _neighbours(given: int, made: int, like: Tensor, *, align_corners: bool) -> Tensor:
    """Return what each voxel of an axis is interpolated from: [made, given], rows sum to 1."""
    place = torch.arange(made, device=like.device, dtype=like.dtype)
    if align_corners:
        place = place * ((given - 1) / (made - 1) if made > 1 else 0.0)
    else:
        place = ((place + 0.5) * (given / made) - 0.5).clamp(0, given - 1)
    voxel = torch.arange(given, device=like.device, dtype=like.dtype)
    return (1 - (place.unsqueeze(1) - voxel).abs()).clamp_min(0)


def _cells(given: int, made: int, like: Tensor) -> Tensor:
    """Return what each cell of an axis is the mean of: [made, given], rows sum to 1."""
    cell, voxel = torch.arange(made, device=like.device).unsqueeze(1), torch.arange(given, device=like.device)
    inside = (voxel >= cell * given // made) & (voxel < -(-(cell + 1) * given // made))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
