"""GLCL, first stage: an encoder that tells images apart by the part of the body they show.

Chaitanya et al., "Contrastive learning of global and local features for medical image segmentation with limited annotations",
NeurIPS 2020, arXiv:2006.10511.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from labeleff.backbones.taps import Tap, encode, find_taps
from labeleff.batch import Batch, Progress, StepOutput, Stream, Task
from labeleff.errors import ShapeError
from labeleff.functional.glcl import GlobalScheme, global_loss
from labeleff.functional.image_views import random_crop, random_intensity
from labeleff.functional.resizing import pooled
from labeleff.registry import register
from labeleff.strategies.base import train_only
from labeleff.strategies.base_contrast import Contrast

VERSIONS: dict[GlobalScheme, tuple[int, ...]] = {"gr": (1, 2), "gd-": (0, 1, 2), "gd": (0, 1)}
"""What is made of an image: 0 is the image itself, the others are views of it."""
CLIP = (0.0, 1.5)


class GlobalHead(nn.Module):
    """Embeds a feature map: pooled to a grid, flattened, two linear layers without bias, ReLU between.

    Args:
        channels: Channels of the map.
        ndim: Its axes, 2 or 3.
        grid: Cells per axis.
        hidden: Width between the layers.
        projection: Length of the embedding.
    """

    def __init__(self, channels: int, ndim: int, *, grid: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.grid = grid
        self.first = nn.Linear(channels * grid**ndim, hidden, bias=False)
        self.last = nn.Linear(hidden, projection, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """Return [N, projection] of [N, C, *S]."""
        found: Tensor = self.last(torch.relu(self.first(pooled(feature.float(), self.grid).flatten(1))))
        return found


@register("strategy", "glcl_global")
class GlclGlobal(Contrast):
    """L = mean of -log(E(a, b) / (E(a, b) + Σ_n E(a, n))), E = exp(cos / τ): images of the same part of the body are alike.

    Without labels, whatever cases have them. Only the encoder is trained, and no more than the encoder is run. What follows,
    ``glcl_local`` or any other strategy, is given the backbone; the head is dropped. Who is like whom: see
    ``functional.glcl.global_loss``.

    With ``gd`` and ``gd-`` a batch is so many volumes times ``partitions``; the number of rows that are embedded is two or three
    times that. As the authors run it: ``scheme=gd``, images of [0, 1] with ``clip``, ``grid`` the size of their bottleneck (6),
    which is then flattened as it is. Differs from the authors: intensity is drawn per image, not per batch; corners of crops
    are uniform over the image, not over the middle of it; no image of the batch is blank.

    Args:
        scheme: ``gd``: images of the same partition are alike, in two volumes and in two versions; ``gd-``: versions of an image
            are, and other partitions are negatives; ``gr``: views are, and other images are negatives (SimCLR), the one scheme
            for single images.
        partitions: Equal parts of a volume along the axis of slices, S.
        temperature: τ.
        crop: Side of crops, share of the image; authors: 100 of 192 voxels.
        brightness: Largest shift of intensity, units of the image.
        contrast: Largest relative change of contrast.
        clip: Clip views to [0, 1.5], as the authors do with ``data.normalise: minmax``.
        grid: Cells per axis that the bottleneck is pooled to.
        hidden: Width of the head.
        projection: Length of an embedding.
        bottleneck: Name of the module that returns the bottleneck; empty: it is found.
    """

    reads_labels = False
    batch_joint = True
    supports_regions = True
    advice: ClassVar[str] = (
        "give it more steps, norms of the batch, more images per step or another rate, and make sure that volumes are oriented "
        "alike"
    )
    equivalent_options: ClassVar[dict[str, str]] = {"bottleneck": "a name of a module of the backbone"}

    def __init__(
        self,
        *,
        scheme: GlobalScheme = "gd",
        partitions: int = 4,
        temperature: float = 0.1,
        crop: float = 0.52,
        brightness: float = 0.3,
        contrast: float = 0.3,
        clip: bool = False,
        grid: int = 2,
        hidden: int = 1024,
        projection: int = 128,
        bottleneck: str = "",
    ) -> None:
        super().__init__()
        if partitions < 2 or min(grid, hidden, projection) < 1:
            raise ValueError(
                "partitions are 2 or more (one has nothing to be told from), grid, hidden, projection 1 or more"
            )
        if temperature <= 0 or not 0 < crop <= 1 or min(brightness, contrast) < 0:
            raise ValueError("temperature is above 0, crop lies in (0, 1], brightness and contrast are at least 0")
        self.scheme: GlobalScheme = scheme
        self.partitions, self.temperature, self.crop = partitions, temperature, crop
        self.brightness, self.contrast, self.clip = brightness, contrast, CLIP if clip else None
        self.sizes = {"grid": grid, "hidden": hidden, "projection": projection}
        self.bottleneck = bottleneck

    def streams(self) -> dict[str, Stream]:
        """Return images of all training cases: of partitions of volumes, or (``gr``) any."""
        if self.scheme == "gr":
            return {"images": Stream("all", kind="slice", least=2)}
        volumes = 2 if self.scheme == "gd" else 1
        return {"images": Stream("all", kind="partitions", partitions=self.partitions, volumes=volumes)}

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Find the bottleneck, freeze what does not lead to it, and make the head."""
        taps = find_taps(backbone, task, bottleneck=self.bottleneck or None)
        self.tap: Tap = taps.bottleneck
        train_only(backbone, taps.encoder_parameters)
        self.head = GlobalHead(self.tap.channels, task.ndim, **self.sizes)
        self.said = f"glcl_global: trains the encoder up to {self.tap.module}, {self.tap.channels} channels"

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``contrast``; noted is what a network scores that tells nothing apart."""
        images = batch["images"]
        rows = torch.cat([self._view(images, version, progress) for version in VERSIONS[self.scheme]])
        ids = self._ids(len(images.image))
        (feature,) = encode(backbone, rows, [self.tap])
        loss = self._loss(self.head(feature), ids)
        return self.contrasted(loss, len(rows), lambda: self._loss(torch.zeros(len(rows), 1), ids), progress)

    def _loss(self, z: Tensor, ids: dict[str, Tensor]) -> Tensor:
        return global_loss(z, scheme=self.scheme, **ids, temperature=self.temperature)

    def _view(self, images: Batch, version: int, progress: Progress) -> Tensor:
        """Return a view of every image, or (version 0) the images themselves."""
        if not version:
            return images.image
        generators = progress.generators(f"view {version}", images.geometry.sample)
        cropped = random_crop(images.image, self.crop, generators=generators)
        return random_intensity(cropped, self.brightness, self.contrast, clip=self.clip, generators=generators)

    def _ids(self, count: int) -> dict[str, Tensor]:
        """Return the ids of the rows, on the CPU: versions one after the other, volume-major and partition-minor within each.

        Raises:
            ShapeError: The images are not whole volumes of partitions.
        """
        if self.scheme != "gr" and count % self.partitions:
            raise ShapeError(f"glcl_global: {count} images are not volumes of {self.partitions} partitions each")
        versions = VERSIONS[self.scheme]
        image = torch.arange(count).repeat(len(versions))
        return {
            "image": image,
            "partition": image % self.partitions,
            "volume": image // self.partitions,
            "version": torch.tensor(versions).repeat_interleave(count),
        }
