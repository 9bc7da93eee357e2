"""An autoencoder of label maps: any size, 2-D and 3-D, all through one narrow vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from labeleff.batch import Task
from labeleff.functional.losses import one_hot
from labeleff.functional.resizing import pooled
from labeleff.functional.uncertainty import noised

Encoding = Literal["one_hot", "index"]


class LabelAutoencoder(nn.Module):
    """Convolutions down, one vector per map, convolutions up; nothing passes beside the vector.

    The deepest maps are pooled to a grid of fixed size, which is what the vector is made of, so that maps of any size fit.
    Where the grid is as large as the deepest maps, nothing is pooled, as in the authors' network of one fixed size.

    Args:
        task: What is segmented; K classes.
        channels: Per level; every level halves the resolution.
        embedding: Length of the vector.
        grid: Cells of the pooled grid along each axis.
        encoding: Input channels: one per class, or one with the ``index`` of the class (the authors').
    """

    def __init__(
        self,
        task: Task,
        *,
        channels: Sequence[int] = (16, 32, 64),
        embedding: int = 128,
        grid: int = 8,
        encoding: Encoding = "one_hot",
    ) -> None:
        super().__init__()
        self.classes, self.grid, self.encoding = task.num_classes, grid, encoding
        widths = [task.num_classes if encoding == "one_hot" else 1, *channels]
        self.down = nn.ModuleList(_block(task.ndim, a, b, stride=2) for a, b in pairwise(widths))
        cells = channels[-1] * grid**task.ndim
        self.squeeze, self.unsqueeze = nn.Linear(cells, embedding), nn.Linear(embedding, cells)
        back = [channels[-1], *channels[-2::-1], channels[0]]
        self.up = nn.ModuleList(_block(task.ndim, a, b) for a, b in pairwise(back))
        self.head = _convolution(task.ndim)(back[-1], task.num_classes, 1)

    def read(self, label: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return label maps [B, *S] as the input of :meth:`forward`, [B, K or 1, *S]; IGNORE is no class (``index``: 0).

        Args:
            label: Integers.
            noise: Standard deviation of noise on the values, clipped to twice that.
        """
        hot = one_hot(label, self.classes)
        if self.encoding == "index":
            numbers = hot.argmax(1, keepdim=True).float()
            return noised(numbers, noise) if noise else numbers
        return noised(hot, noise) if noise else hot

    def forward(self, maps: Tensor) -> Tensor:
        """Return logits [B, K, *S] for sigmoids, of [B, K or 1, *S]."""
        sizes = []
        for block in self.down:
            sizes.append(maps.shape[2:])
            maps = block(maps)
        deepest, shape = maps.shape[2:], (*maps.shape[:2], *([self.grid] * (maps.ndim - 2)))
        vector = self.squeeze(pooled(maps, self.grid).flatten(1))
        maps = F.interpolate(self.unsqueeze(vector).view(shape), deepest, mode="nearest")
        for block, size in zip(self.up, reversed(sizes), strict=True):
            maps = block(F.interpolate(maps, size, mode="nearest"))
        logits: Tensor = self.head(maps)
        return logits


def _convolution(ndim: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv2d if ndim == 2 else nn.Conv3d


def _block(ndim: int, given: int, made: int, *, stride: int = 1) -> nn.Module:
    groups = next(n for n in (8, 4, 2, 1) if made % n == 0)
    convolution = _convolution(ndim)(given, made, 3, stride=stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(groups, made), nn.LeakyReLU())


def check_autoencoder(channels: tuple[int, ...], embedding: int, grid: int) -> None:
    """Raise ValueError unless an autoencoder can be made."""
    if not channels or min(channels) < 1 or embedding < 1 or grid < 1:
        raise ValueError("channels needs at least one level, and channels, embedding and grid must be at least 1")
