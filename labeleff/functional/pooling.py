"""Pooling that repeats: its gradient is a matrix product on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def pooled(maps: Tensor, grid: int) -> Tensor:
    """Return maps averaged over ``grid`` cells along each axis of space, as ``adaptive_avg_pool`` does.

    Where cells overlap, the gradient of torch's own is summed by a GPU in an order that differs from run to run.

    Args:
        maps: [B, C, *S] floating.
        grid: Cells along each axis.

    Returns:
        [B, C, grid, …].
    """
    for axis in range(2, maps.ndim):
        size = maps.shape[axis]
        cell = torch.arange(grid, device=maps.device).unsqueeze(1)
        voxel = torch.arange(size, device=maps.device)
        inside = (voxel >= cell * size // grid) & (voxel < -(-(cell + 1) * size // grid))
        share = inside.to(maps.dtype) / inside.sum(1, keepdim=True)
        maps = (maps.movedim(axis, -1) @ share.T).movedim(-1, axis)
    return maps
