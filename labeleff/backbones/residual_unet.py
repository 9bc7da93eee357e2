"""nnU-Net's residual encoder U-Net, 2-D and 3-D, under the names of nnU-Net, so that weights trained there are at home here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from labeleff.backbones.monai import Size
from labeleff.batch import Task
from labeleff.registry import register

SLOPE = 0.01
"""Of leaky ReLU below 0."""


class Convolution(nn.Module):
    """A convolution, instance norm and, but for the end of a block, leaky ReLU.

    The convolution has no bias, which the norm after it would take away (nnU-Net's has one, without effect).
    """

    def __init__(
        self, ndim: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, active: bool = True
    ) -> None:
        super().__init__()
        conv, norm = ((nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[ndim - 2]
        self.conv = conv(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = norm(outputs, affine=True)
        self.nonlin = nn.LeakyReLU(SLOPE, inplace=True) if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs, *S / stride] of [B, inputs, *S]."""
        out: Tensor = self.nonlin(self.norm(self.conv(x)))
        return out


class Block(nn.Module):
    """Two convolutions and what skips them: averaged where the block halves, a convolution of one voxel where it widens."""

    def __init__(self, ndim: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(ndim, inputs, outputs, stride=stride)
        self.conv2 = Convolution(ndim, outputs, outputs, active=False)
        average = (nn.AvgPool2d, nn.AvgPool3d)[ndim - 2]
        skip: list[nn.Module] = [average(stride, stride)] if stride > 1 else []
        if inputs != outputs:
            skip.append(Convolution(ndim, inputs, outputs, 1, active=False))
        self.skip = nn.Sequential(*skip)
        self.nonlin2 = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs, *S / stride] of [B, inputs, *S]."""
        out: Tensor = self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))
        return out


class Blocks(nn.Module):
    """Blocks one after the other, of which the first changes size and width."""

    def __init__(self, ndim: int, inputs: int, outputs: int, stride: int, count: int) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * count]
        self.blocks = nn.Sequential(
            *(Block(ndim, a, b, 1 if i else stride) for i, (a, b) in enumerate(pairwise(widths)))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs, *S / stride] of [B, inputs, *S]."""
        out: Tensor = self.blocks(x)
        return out


class Convolutions(nn.Module):
    """A single convolution under the name that nnU-Net has for several."""

    def __init__(self, ndim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(Convolution(ndim, inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outputs, *S] of [B, inputs, *S]."""
        out: Tensor = self.convs(x)
        return out


class Encoder(nn.Module):
    """A stem at full resolution and a level after the other, each but the first half as large as the one before."""

    def __init__(self, ndim: int, channels: int, filters: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.stem = Convolutions(ndim, channels, filters[0])
        widths = [filters[0], *filters]
        self.stages = nn.Sequential(
            *(Blocks(ndim, widths[i], widths[i + 1], 2 if i else 1, count) for i, count in enumerate(blocks))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of every level, finest first."""
        levels = [self.stem(x)]
        for stage in self.stages:
            levels.append(stage(levels[-1]))
        return levels[1:]


class Decoder(nn.Module):
    """A transposed convolution, what was skipped, and a convolution, for every level but the deepest."""

    def __init__(self, ndim: int, filters: Sequence[int], classes: int) -> None:
        super().__init__()
        up, conv = ((nn.ConvTranspose2d, nn.Conv2d), (nn.ConvTranspose3d, nn.Conv3d))[ndim - 2]
        pairs = [(filters[i], filters[i - 1]) for i in range(len(filters) - 1, 0, -1)]
        self.transpconvs = nn.ModuleList(up(deep, fine, 2, 2) for deep, fine in pairs)
        self.stages = nn.ModuleList(Convolutions(ndim, 2 * fine, fine) for _, fine in pairs)
        self.head = conv(filters[0], classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits [B, K, *S] of the features of the encoder, finest first."""
        x = levels[-1]
        for up, stage, skipped in zip(self.transpconvs, self.stages, reversed(levels[:-1]), strict=True):
            x = stage(torch.cat((up(x), skipped), 1))
        logits: Tensor = self.head(x)
        return logits


class ResidualUNet(nn.Module):
    """Encoder of residual blocks, light decoder."""

    def __init__(self, task: Task, filters: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.encoder = Encoder(task.ndim, task.channels, filters, blocks)
        self.decoder = Decoder(task.ndim, filters, task.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S]."""
        logits: Tensor = self.decoder(self.encoder(image))
        return logits


@register("backbone", "residual_unet")
def residual_unet(
    task: Task,
    *,
    size: Size = "small",
    filters: tuple[int, ...] | None = None,
    blocks: tuple[int, ...] | None = None,
) -> nn.Module:
    """Residual encoder U-Net of nnU-Net (Isensee et al., MICCAI 2024, arXiv:2404.09556), instance norm.

    Args:
        size: ``standard``: ResEncL, as OpenMind's weights have it: 32 … 320 filters in six levels of 1, 3, 4, 6, 6 and 6 blocks;
            ``small``: 16, 32, 64, 128 in levels of 1, 1, 2 and 2.
        filters: Channels per level in place of those of the size; every level halves the resolution.
        blocks: Residual blocks per level in place of those of the size.
    """
    presets: dict[Size, Any] = {
        "small": ((16, 32, 64, 128), (1, 1, 2, 2)),
        "standard": ((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)),
    }
    widths, counts = (given or preset for given, preset in zip((filters, blocks), presets[size], strict=True))
    if len(widths) < 2 or len(widths) != len(counts) or min(*widths, *counts) < 1:
        raise ValueError(
            f"filters are {list(widths)} and blocks {list(counts)}; one of each is needed for two levels or more"
        )
    return ResidualUNet(task, widths, counts)
