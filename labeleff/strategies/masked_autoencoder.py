"""Masked autoencoder: before there are labels, a network fills in what was blotted out of its input.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377, in the plain form for networks that
are convolutions. The baseline that other ways of learning before labels must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from labeleff.backbones.taps import encode, find_taps
from labeleff.batch import Batch, Progress, StepOutput, Stream, Task, beside, uniform
from labeleff.errors import ShapeError
from labeleff.functional.resizing import resized
from labeleff.registry import register
from labeleff.strategies.base import Strategy, train_only


@register("strategy", "masked_autoencoder")
class MaskedAutoencoder(Strategy):
    """L = mean of (f(x · m) - x)² over the blocks that m blots out. No label is read.

    Blocks are drawn anew for each image and step. The last features of the decoder and a convolution of one voxel fill them in;
    the next stage is given the network, decoder included, with its own head as it was.

    Differs from the paper: a convolutional network has no tokens that could be left out, so that the encoder sees zeros (the
    mean of an image that is normalised by ``zscore``) where the image is blotted out, and a step costs a full pass; the
    decoder is the network's own, and is kept; targets are not normalised by block.

    Args:
        ratio: Share of the blocks that are blotted out.
        block: Side of a block, voxels.
        layer: Module whose output fills in; empty: the last features of the decoder, found by a dry run.
    """

    reads_labels = False
    equivalent_options: ClassVar[Mapping[str, str]] = {"layer": "a name has no other to try"}

    def __init__(self, *, ratio: float = 0.75, block: int = 8, layer: str = "") -> None:
        super().__init__()
        if not 0 < ratio < 1 or block < 1:
            raise ValueError("ratio lies in (0, 1), block is at least 1")
        self.ratio, self.block, self.layer = ratio, block, layer

    def streams(self) -> dict[str, Stream]:
        """Return patches of all images."""
        return {"images": Stream("all")}

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Find the last features of the decoder, put a head on them, and freeze what comes after.

        Raises:
            ShapeError: There is no decoder that could be found.
        """
        if self.layer:
            self.tap = find_taps(backbone, task, bottleneck=self.layer, encoder=(), decoder=()).bottleneck
        else:
            found = find_taps(backbone, task).decoder
            if not found:
                raise ShapeError("masked_autoencoder: this backbone has no decoder that a dry run finds; name a layer")
            self.tap = found[-1]
        self.said = f"images are filled in from {self.tap.module} ({self.tap.channels})"
        convolution = nn.Conv2d if task.ndim == 2 else nn.Conv3d
        self.head = convolution(self.tap.channels, task.channels, 1).to(next(backbone.parameters()).device)
        train_only(backbone, self.tap.parameters)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``reconstruction``; 0, with a gradient, where all that is blotted out is padding."""
        image, valid = batch["images"].image, batch["images"].valid
        hidden = self.hidden(image, progress.generators("blocks", batch["images"].geometry.sample))
        (features,) = encode(backbone, image.masked_fill(hidden, 0), [self.tap])
        filled = self.head(features).float()
        if filled.shape != image.shape:
            filled = resized(filled, image.shape[2:], align_corners=False)
        counted = hidden & valid
        errors = torch.where(counted, (filled - image).square(), 0).sum()
        return StepOutput({"reconstruction": errors / (counted.sum() * image.shape[1]).clamp_min(1)})

    def hidden(self, image: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return what is blotted out [B, 1, *S] bool: of every image the same number of blocks, at least one and not all.

        Blocks at the far edge are cut off where the image is no multiple of them.
        """
        shape = image.shape[2:]
        blocks = [-(-n // self.block) for n in shape]
        count = prod(blocks)
        chosen = min(max(1, round(self.ratio * count)), max(1, count - 1))
        order = uniform(generators, count).argsort(1).argsort(1)
        mask = beside((order < chosen).view(len(image), 1, *blocks), image)
        for axis, length in enumerate(shape, start=2):
            mask = mask.repeat_interleave(self.block, axis).narrow(axis, 0, length)
        return mask
