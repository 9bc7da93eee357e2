"""Test-time augmentation: one image seen at several sizes and mirrored, and the mean of what a network says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Literal

import torch
from torch import Tensor, nn

from labeleff.backbones.outputs import nearest_size
from labeleff.batch import Task
from labeleff.functional.losses import probabilities
from labeleff.functional.resizing import resized

Combine = Literal["probs", "logits"]
SMALLEST = torch.finfo(torch.float32).tiny


class Averaged(nn.Module):
    """A network whose logits are those of its mean answer over sizes and mirror images of what it is shown.

    One pass per size and mirror image. Images are resized, and logits resized back, linearly with corners aligned.

    Args:
        network: [B, C, *S] -> logits [B, K, *S].
        task: What it was made for.
        scales: Sizes relative to the image; where the network cannot take one it is rounded to one that it takes.
        flips: Spatial axes, each mirrored and not, in all combinations.
        kept: Spatial axes that are not resized.
        combine: Mean of the ``probs``, or of the ``logits``.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        *,
        scales: Sequence[float] = (1.0,),
        flips: Sequence[int] = (),
        kept: Sequence[int] = (),
        combine: Combine = "probs",
    ) -> None:
        super().__init__()
        self.network, self.task, self.combine = network, task, combine
        self.scales, self.flips, self.kept = tuple(scales), tuple(flips), tuple(kept)
        self._sizes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S]."""
        answers = self._answers(image)
        if self.combine == "logits":
            total, count = next(answers), 1
            for logits in answers:
                total, count = total + logits, count + 1
            return total / count
        total, count = self._probs(next(answers)), 1
        for logits in answers:
            total, count = total + self._probs(logits), count + 1
        mean = total / count
        # softmax and sigmoid of these give the mean back
        return mean.clamp_min(SMALLEST).log() if self.task.exclusive else mean.logit(1e-7)

    def _probs(self, logits: Tensor) -> Tensor:
        return probabilities(logits, exclusive=self.task.exclusive)

    def _answers(self, image: Tensor) -> Iterator[Tensor]:
        native = tuple(image.shape[2:])
        axes = [axis + 2 for axis in self.flips]
        for mirrored in chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)):
            seen = image.flip(mirrored)
            for size in self._sizes_of(native):
                if size == native:
                    logits = self.network(seen).float()
                else:
                    small = resized(seen, size, align_corners=True)
                    logits = resized(self.network(small).float(), native, align_corners=True)
                yield logits.flip(mirrored)

    def _sizes_of(self, native: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the size at each scale, found once per size of image."""
        if native not in self._sizes:
            asked = [[n if a in self.kept else n * scale for a, n in enumerate(native)] for scale in self.scales]
            self._sizes[native] = [
                native if tuple(size) == native else nearest_size(self.network, self.task, size) for size in asked
            ]
        return self._sizes[native]
