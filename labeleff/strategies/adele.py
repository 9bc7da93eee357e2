"""ADELE, the training step: the same image at several scales, which must agree. Liu et al., CVPR 2022, arXiv:2110.03740.

The labels are corrected by the annotator ``label_correction``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.backbones.outputs import nearest_size
from labeleff.batch import Batch, Progress, StepOutput, Task
from labeleff.functional.adele import multiscale_consistency, multiscale_cross_entropy, multiscale_losses
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.resizing import resized
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "adele")
class Adele(Strategy):
    """L = mean over n scales of (CE + Dice) / 2 + λ / n · Σ KL(p_scale ‖ mean of the p), native scale included.

    Images are resized, their logits resized back (linear, corners aligned). The divergence is counted in images of
    which at least one labelled voxel is predicted with the probability ``gate``.

    Parity with the authors' code: ``form=segthor`` is (λ · consistency + cross-entropy) / 3, ``form=voc`` their sum;
    both weigh the logits by 1/3 before the cross-entropy, which is temperature 3, and count unknown voxels in its mean.
    Differs from the authors: VOC's learnable weights of the scales are left out, all weigh the same. By default the
    loss of a scale is that of ``supervised``: with λ = 0 and only the native scale it is that method.

    Args:
        scales: Sizes relative to the patch; 1 must be among them. Where the network cannot take the size, rounded down,
            it is rounded to the nearest multiple of 2, 4, … 64 that it takes.
        axes: 3-D: scale ``all`` axes, or ``in_plane``: all but ``slice_axis`` (anisotropic voxels; cheaper).
        slice_axis: 3-D, of ``in_plane``: the axis from slice to slice.
        weight: Weight λ of the consistency.
        gate: Smallest probability of an image's surest labelled voxel; above 1: no consistency.
        form: ``default``, or the authors' ``segthor`` or ``voc``.
        temperature: Logits are divided by it before the supervised loss; 0: what the form has, 1 for ``default``.
        dice: Of the default form: ``squared``, ``linear`` (see ``supervised``), or ``none``: cross-entropy alone.
    """

    equivalent_options: ClassVar[Mapping[str, str]] = {
        "axes": "in 2-D both axes are in the plane",
        "slice_axis": "of in_plane only",
        "scales": "a list of numbers, for which no alternative can be made up",
    }

    def __init__(
        self,
        *,
        scales: tuple[float, ...] = (0.7, 1.0, 1.5),
        axes: Literal["all", "in_plane"] = "all",
        slice_axis: int = 2,
        weight: float = 1.0,
        gate: float = 0.8,
        form: Literal["default", "segthor", "voc"] = "default",
        temperature: float = 0.0,
        dice: Literal["squared", "linear", "none"] = "squared",
    ) -> None:
        super().__init__()
        if 1.0 not in scales or min(scales) <= 0 or len(set(scales)) != len(scales):
            raise ValueError(f"scales are {list(scales)}; they must be positive, differ, and 1.0 must be among them")
        if not 0 <= slice_axis <= 2:
            raise ValueError("slice_axis is one of the axes 0, 1, 2 of a volume")
        if weight < 0 or gate < 0 or temperature < 0:
            raise ValueError("weight, gate and temperature must be >= 0")
        self.scales = (1.0, *(s for s in scales if s != 1.0))  # the authors' order: the native one first
        self.axes, self.slice_axis, self.weight, self.gate, self.form = axes, slice_axis, weight, gate, form
        self.temperature, self.dice = temperature, dice
        self._sizes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def build(self, backbone: nn.Module, task: Task) -> None:  # noqa: ARG002
        """Remember the task."""
        self.task = task

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:  # noqa: ARG002
        """Return ``supervised`` and ``consistency``: one pass per scale, the native logits for the annotator."""
        labelled = batch["labelled"]
        logits = self.logits_at_scales(backbone, labelled.image)
        return StepOutput(self._losses(logits, labelled), {"labelled": logits[0].detach()})

    def _losses(self, logits: list[Tensor], labelled: Batch) -> dict[str, Tensor]:
        if len(logits) == 1 or not self.weight:
            return {"supervised": self._supervised(logits, labelled.label)}
        gate, valid = self.gate, labelled.valid
        if self.form == "default" and self.dice != "none" and self.temperature in (0.0, 1.0):
            supervised, consistency = multiscale_losses(logits, labelled.label, dice=self.dice, gate=gate, valid=valid)
        else:
            supervised = self._supervised(logits, labelled.label)
            consistency = multiscale_consistency(logits, labelled.label, gate=gate, valid=valid)
        return {"supervised": supervised, "consistency": self._share * consistency}

    @property
    def _share(self) -> float:
        return self.weight if self.form == "voc" else self.weight / len(self.scales)

    def _supervised(self, logits: list[Tensor], label: Tensor) -> Tensor:
        count = len(logits)
        if self.form != "default":
            loss = multiscale_cross_entropy(logits, label, temperature=self.temperature or None)
            return loss / count if self.form == "segthor" else loss
        temperature = self.temperature or 1.0
        if self.dice == "none":
            return multiscale_cross_entropy(logits, label, temperature=temperature, reduction="known") / count
        terms = [segmentation_loss(z if temperature == 1 else z / temperature, label, dice=self.dice) for z in logits]
        return torch.stack(terms).mean()

    def logits_at_scales(self, backbone: nn.Module, image: Tensor) -> list[Tensor]:
        """Return the logits [B, K, *S] of images [B, C, *S] at every scale, resized to S; the native scale first."""
        native = tuple(image.shape[2:])
        found = []
        for size in self._sizes_of(backbone, native):
            if size == native:
                found.append(backbone(image))
            else:
                logits = backbone(resized(image, size, align_corners=True))
                found.append(resized(logits, native, align_corners=True))
        return found

    def _sizes_of(self, backbone: nn.Module, native: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the size at each scale, found once per size of patch."""
        if native not in self._sizes:
            kept = self.slice_axis if self.axes == "in_plane" and len(native) == 3 else None
            asked = [[n if axis == kept else n * s for axis, n in enumerate(native)] for s in self.scales[1:]]
            self._sizes[native] = [native, *(nearest_size(backbone, self.task, size) for size in asked)]
        return self._sizes[native]
