"""A denoising autoencoder of label maps, learnt from the given labels: the first stage of ``anatomical_uncertainty``.

Adiga et al., MICCAI 2022 and MedIA 2024; what is written here is the authors' code.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from labeleff.backbones.label_autoencoder import Encoding, LabelAutoencoder, check_autoencoder
from labeleff.batch import Batch, Progress, StepOutput, Task
from labeleff.functional.anatomical import corrupt_labels, denoising_loss
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "label_autoencoder")
class LabelAutoencoding(Strategy):
    """L = (MSE + Dice) / 2 of a label map and what the autoencoder makes of a spoilt copy of it. No image is looked at.

    The backbone is left as it is, and passes on to the next stage with the autoencoder beside it.

    The authors' code: ``channels=[16, 32, 64, 128, 256], embedding=512, encoding=index``, a grid as large as the deepest maps
    of their one patch size, SGD at 0.1 with a cosine, 50,000 steps of 4; their V-Net has more convolutions per level.

    Differs from the code by default: one channel per class, so that classes have no order; a smaller network; the one class
    that changes its outline is drawn, where theirs filters the map of class numbers.

    Args:
        channels: Of the autoencoder, per level; every level halves the resolution.
        embedding: Length of the vector that all of a map goes through.
        grid: Cells along each axis that the vector is made of.
        encoding: What the autoencoder is given: ``one_hot``, or the ``index`` of the class.
        swap: Probability that voxels at the boundary of a slice are swapped with others.
        morph: Probability that a class of a slice is eroded, dilated, opened or closed.
        noise: Standard deviation of the noise on the values of the map, clipped to twice that.
    """

    trains_backbone: ClassVar[bool] = False

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (16, 32, 64),
        embedding: int = 128,
        grid: int = 8,
        encoding: Encoding = "one_hot",
        swap: float = 0.2,
        morph: float = 0.2,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        check_autoencoder(channels, embedding, grid)
        if not 0 <= swap <= 1 or not 0 <= morph <= 1 or noise < 0:
            raise ValueError("swap and morph must lie in [0, 1], noise be >= 0")
        self.channels, self.embedding, self.grid = channels, embedding, grid
        self.encoding: Encoding = encoding
        self.swap, self.morph, self.noise = swap, morph, noise

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the autoencoder; the backbone is not trained."""
        backbone.requires_grad_(False)
        self.classes = task.num_classes
        self.autoencoder = LabelAutoencoder(
            task, channels=self.channels, embedding=self.embedding, grid=self.grid, encoding=self.encoding
        )

    def parameter_groups(self, backbone: nn.Module) -> list[dict[str, Any]]:  # noqa: ARG002
        """Return the autoencoder's parameters."""
        return [{"params": list(self.autoencoder.parameters()), "factor": 1.0}]

    def set_modes(self, backbone: nn.Module) -> None:
        """Train the autoencoder."""
        backbone.eval()
        self.train()

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:  # noqa: ARG002
        """Return ``denoising``."""
        label = batch["labelled"].label
        spoilt = corrupt_labels(
            label, self.classes, swap=self.swap, morph=self.morph, generator=progress.generator("corruption")
        )
        logits = self.autoencoder(self.autoencoder.read(spoilt, noise=self.noise))
        return StepOutput({"denoising": denoising_loss(logits, label)})
