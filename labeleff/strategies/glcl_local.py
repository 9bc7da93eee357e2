"""GLCL, second stage: decoder levels that tell the regions of an image apart, on a frozen encoder.

Chaitanya et al., "Contrastive learning of global and local features for medical image segmentation with limited annotations",
NeurIPS 2020, arXiv:2006.10511.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.backbones.taps import Tap, Taps, encode, find_taps
from labeleff.batch import Batch, Progress, StepOutput, Stream, Task
from labeleff.errors import RecipeError
from labeleff.functional.glcl import COUNTS, LocalScheme, local_loss
from labeleff.functional.image_views import random_intensity
from labeleff.registry import register
from labeleff.strategies.base import train_only
from labeleff.strategies.base_contrast import Contrast

CLIP = (0.0, 1.5)


class LocalHead(nn.Module):
    """Two 1 x 1 convolutions without bias, batch norm and ReLU between, and a linear layer for regions.

    What comes after the norm is computed for the voxels of regions alone, a few in a hundred; the norm looks at all.

    Args:
        channels: Channels of the map, and of what becomes of it.
        ndim: Its axes, 2 or 3.
        size: Side of a region, voxels.
        projection: Length of an embedded region; 0, and for regions of one voxel: as it is.
    """

    def __init__(self, channels: int, ndim: int, *, size: int, projection: int) -> None:
        super().__init__()
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if ndim == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.first = convolution(channels, channels, 1, bias=False)
        self.norm = norm(channels)
        self.last = convolution(channels, channels, 1, bias=False)
        linear = projection > 0 and size > 1
        self.region = nn.Linear(size**ndim * channels, projection, bias=False) if linear else nn.Identity()

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map [N, C, *S] that regions are read from, of [N, C, *S]."""
        found: Tensor = self.norm(self.first(feature))
        return found

    def embed(self, cells: Tensor) -> Tensor:
        """Return [N, P, D] of regions [N, P, size^d · C] of that map, each flattened as (…space, channel)."""
        voxels = torch.relu(cells).view(*cells.shape[:2], -1, self.last.out_channels)
        found: Tensor = self.region((voxels @ self.last.weight.flatten(1).T).flatten(2))
        return found


@register("strategy", "glcl_local")
class GlclLocal(Contrast):
    """L = mean of -log(E(u, u') / (E(u, u') + Σ_v E(u, v) + E(u, v'))), E = exp(cos / τ): regions are told from nearby ones.

    u and u' are the same region of a map of features in two views of an image, of other intensity; v are nearby regions.
    Without labels, whatever cases have them. The levels of the decoder up to ``level`` are trained, on an encoder that is not:
    it keeps its weights and, with ``encoder_mode=eval``, the statistics of its norms. Nothing is run beyond that level. What
    follows is given the backbone; the head is dropped. See ``functional.glcl.local_loss``.

    As the authors run it: ``encoder_mode=train``, images of [0, 1] with ``clip``. Their regions in 2-D; those in 3-D are ours.
    Differs from the authors: intensity is drawn per image, not per batch.

    Args:
        scheme: ``lr``: the same region in two views is alike; ``ld``: also that of the same partition in other volumes, which
            needs images that lie alike.
        partitions: Of ``ld``: equal parts of a volume along the axis of slices, S.
        temperature: τ.
        dense: 13 regions (3-D: 35); otherwise the 9 (27) without those between.
        size: Side of a region, voxels of the map. Maps need 8 voxels per axis, or 5 for regions of one.
        brightness: Largest shift of intensity, units of the image.
        contrast: Largest relative change of contrast.
        clip: Clip views to [0, 1.5], as the authors do with ``data.normalise: minmax``.
        projection: Length of an embedded region; 0: regions are compared as they are, as those of one voxel always are.
        level: Levels of the decoder that are trained, coarsest first; all but the one in full resolution where there are fewer.
        encoder_mode: ``eval`` (nothing moves, nothing is drawn), or ``train`` (batch statistics and dropout at work, running
            statistics moving).
        bottleneck: Name of the module that returns the bottleneck; empty: it is found.
        decoder: Name of the module whose features are used, in place of ``level``; empty: it is found.
    """

    reads_labels = False
    batch_joint = True
    supports_regions = True
    advice: ClassVar[str] = "change the rate or the level, and make sure that the stage before it has learnt"
    equivalent_options: ClassVar[dict[str, str]] = {
        "level": "for networks with several levels",
        "partitions": "of ld",
        "bottleneck": "a name of a module of the backbone",
        "decoder": "a name of a module of the backbone",
    }

    def __init__(
        self,
        *,
        scheme: LocalScheme = "lr",
        partitions: int = 4,
        temperature: float = 0.1,
        dense: bool = True,
        size: Literal[3, 1] = 3,
        brightness: float = 0.3,
        contrast: float = 0.3,
        clip: bool = False,
        projection: int = 128,
        level: int = 3,
        encoder_mode: Literal["eval", "train"] = "eval",
        bottleneck: str = "",
        decoder: str = "",
    ) -> None:
        super().__init__()
        if min(partitions, level) < 1 or projection < 0:
            raise ValueError("partitions and level are 1 or more, projection is at least 0")
        if temperature <= 0 or min(brightness, contrast) < 0:
            raise ValueError("temperature is above 0, brightness and contrast are at least 0")
        self.scheme: LocalScheme = scheme
        self.partitions, self.temperature, self.dense, self.size = partitions, temperature, dense, size
        self.brightness, self.contrast, self.clip = brightness, contrast, CLIP if clip else None
        self.projection, self.level, self.encoder_mode = projection, level, encoder_mode
        self.bottleneck, self.decoder = bottleneck, decoder

    def streams(self) -> dict[str, Stream]:
        """Return images of all training cases, or (``ld``) of partitions of volumes."""
        if self.scheme == "lr":
            return {"images": Stream("all", kind="slice")}
        return {"images": Stream("all", kind="partitions", partitions=self.partitions, volumes=2)}

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Find the level of the decoder, freeze all but what leads to it from the encoder, and make the head."""
        taps = find_taps(
            backbone,
            task,
            bottleneck=self.bottleneck or None,
            decoder=[self.decoder] if self.decoder else None,
        )
        number = self._number(taps)
        self.tap: Tap = taps.decoder[number]
        train_only(backbone, taps.decoder_parameters(number))
        self.encoder = frozenset(taps.encoder_modules)
        self.regions = COUNTS[task.ndim][0 if self.dense else 1]
        self.head = LocalHead(self.tap.channels, task.ndim, size=self.size, projection=self.projection)
        stride = " x ".join(f"{n:g}" for n in self.tap.stride)
        self.said = (
            f"glcl_local: trains {number + 1} of the decoder's levels, up to {self.tap.module} at stride {stride}"
        )

    def _number(self, taps: Taps) -> int:
        """Return which level is trained last.

        Raises:
            RecipeError: There is none.
        """
        if not taps.decoder:
            raise RecipeError(
                "glcl_local: this backbone has no features between its bottleneck and its logits; name a module by decoder"
            )
        coarse = sum(max(tap.stride) > 1 for tap in taps.decoder)
        return min(self.level, max(coarse, 1)) - 1

    def set_modes(self, backbone: nn.Module) -> None:
        """Train the decoder; the encoder as asked for."""
        still = self.encoder if self.encoder_mode == "eval" else frozenset()
        for name, module in backbone.named_modules():
            module.training = name not in still
        self.train()

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``contrast``; noted is what a network scores that tells nothing apart."""
        images, ranges = batch["images"], (self.brightness, self.contrast)
        draws = [progress.generators(f"view {number}", images.geometry.sample) for number in (1, 2)]
        views = [random_intensity(images.image, *ranges, clip=self.clip, generators=own) for own in draws]
        (feature,) = encode(backbone, torch.cat(views), [self.tap])
        maps = self.head(feature)
        loss = self._loss(maps, self.head.embed)
        shape = len(maps), 1, *[8] * (maps.ndim - 2)
        return self.contrasted(loss, len(maps), lambda: self._loss(torch.zeros(shape)), progress)

    def _loss(self, maps: Tensor, project: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return local_loss(
            *maps.chunk(2),
            scheme=self.scheme,
            regions=self.regions,
            size=self.size,
            temperature=self.temperature,
            partitions=self.partitions,
            project=project,
        )
