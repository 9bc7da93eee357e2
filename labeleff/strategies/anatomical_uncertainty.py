"""A mean teacher that is heard where its label map looks like one: uncertainty from an autoencoder of label maps.

Adiga et al., "Leveraging Labels Representations via Anatomically-Aware Uncertainty", MICCAI 2022 and MedIA 2024; what is
written here is the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from labeleff.backbones.label_autoencoder import Encoding, LabelAutoencoder, check_autoencoder
from labeleff.batch import Batch, Progress, Report, StepOutput, Task
from labeleff.errors import RecipeError
from labeleff.functional.anatomical import reconstruction_confidence
from labeleff.functional.ema import BufferRule
from labeleff.functional.losses import DiceForm, segmentation_loss
from labeleff.functional.schedules import ramped
from labeleff.functional.uncertainty import noised, weighted_mse
from labeleff.registry import register
from labeleff.strategies.base import Taught, set_mode

PART = "autoencoder."


@register("strategy", "anatomical_uncertainty")
class AnatomicalUncertainty(Taught):
    """L = (CE + Dice) / 2 (labelled) + λ(t) · Σ w (p - q)² / Σ w (unlabelled), w = exp(-γ (r - q)²).

    p and q are probabilities of student and teacher, r what the autoencoder of the stage before, ``label_autoencoder``, makes
    of the teacher's label map; it is frozen. A step costs one pass of the autoencoder more than ``mean_teacher``.

    The authors' code: ``weight=0.1, rampup=1, ramp_decay=true, teacher_mode=train, buffers=keep, consistent=all,
    scale=halved, encoding=index`` and its channels and embedding.

    Differs from the code by default: weight, ramp and teacher are those of ``mean_teacher``, and consistency is asked for on
    unlabelled images alone, so that a comparison of the two shows what the confidence adds (with γ = 0 they are one).

    Args:
        weight: Consistency weight λ after the ramp.
        rampup: Share of the stage over which λ rises, as ``exp(-5 (1 - t)²)``; 0: no ramp.
        gamma: γ; 0 trusts all of the teacher's map.
        consistent: Images that have the consistency term: ``unlabelled`` or ``all``.
        scale: ``mean`` over voxels and classes, or ``halved``, as in the authors' code.
        decay: Decay of the teacher's moving average.
        ramp_decay: Use ``min(1 - 1 / (step + 1), decay)``, as the authors do.
        noise: Standard deviation of the noise on the teacher's input, clipped to twice that; units of the image.
        teacher_mode: ``eval``, or ``train`` (dropout and batch statistics at work, as in the authors' code).
        buffers: What happens to the teacher's norm statistics, see ``ema_update_``.
        dice: Form of the Dice loss.
        channels: Of the autoencoder, as in the stage before.
        embedding: Of the autoencoder, as in the stage before.
        grid: Of the autoencoder, as in the stage before.
        encoding: Of the autoencoder, as in the stage before.
    """

    follows: ClassVar[tuple[str, ...]] = ("label_autoencoder", "anatomical_uncertainty")

    def __init__(
        self,
        *,
        weight: float = 1.0,
        rampup: float = 0.4,
        gamma: float = 1.0,
        consistent: Literal["unlabelled", "all"] = "unlabelled",
        scale: Literal["mean", "halved"] = "mean",
        decay: float = 0.99,
        ramp_decay: bool = False,
        noise: float = 0.1,
        teacher_mode: Literal["eval", "train"] = "eval",
        buffers: BufferRule = "average",
        dice: DiceForm = "squared",
        channels: tuple[int, ...] = (16, 32, 64),
        embedding: int = 128,
        grid: int = 8,
        encoding: Encoding = "one_hot",
    ) -> None:
        super().__init__()
        if weight < 0 or noise < 0 or gamma < 0 or not 0 <= rampup <= 1 or not 0 <= decay <= 1:
            raise ValueError("weight, noise and gamma must be >= 0, rampup and decay in [0, 1]")
        check_autoencoder(channels, embedding, grid)
        self.weight, self.rampup, self.gamma, self.consistent = weight, rampup, gamma, consistent
        self.divisor = 1 if scale == "mean" else 2
        self.decay, self.ramp_decay, self.noise, self.teacher_mode = decay, ramp_decay, noise, teacher_mode
        self.buffer_rule: BufferRule = buffers
        self.dice: DiceForm = dice
        self.channels, self.embedding, self.grid = channels, embedding, grid
        self.encoding: Encoding = encoding

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the teacher, a copy of the student as it starts, and room for the autoencoder."""
        super().build(backbone, task)
        self.autoencoder = LabelAutoencoder(
            task, channels=self.channels, embedding=self.embedding, grid=self.grid, encoding=self.encoding
        ).requires_grad_(False)

    def inherit(self, previous: Mapping[str, Tensor]) -> Report:
        """Take over the autoencoder.

        Raises:
            RecipeError: The stage before has none, or one of another shape.
        """
        found = {key.removeprefix(PART): value for key, value in previous.items() if key.startswith(PART)}
        own = self.autoencoder.state_dict()
        if found.keys() != own.keys() or any(found[key].shape != own[key].shape for key in own):
            raise RecipeError(
                "anatomical_uncertainty: the stage before has no autoencoder that fits; put a stage of label_autoencoder "
                "there, and give both the same channels, embedding, grid and encoding"
            )
        self.autoencoder.load_state_dict(found)
        return Report(("autoencoder",), (), "anatomical_uncertainty: the autoencoder of label maps is taken over")

    def set_modes(self, backbone: nn.Module) -> None:
        """Train the student; the teacher as asked for, the autoencoder not at all."""
        super().set_modes(backbone)
        set_mode(self.autoencoder, training=False)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised`` and ``consistency``. The student sees both streams in one pass."""
        labelled, unlabelled = batch["labelled"], batch.get("unlabelled")
        shares = [labelled] if unlabelled is None else [labelled, unlabelled]
        image, count = torch.cat([share.image for share in shares]), len(labelled.image)
        logits = backbone(image)
        losses = {"supervised": segmentation_loss(logits[:count], labelled.label, dice=self.dice)}
        seen = {"labelled": logits[:count].detach()}
        if unlabelled is None:
            return StepOutput(losses, seen)
        first = count if self.consistent == "unlabelled" else 0
        target, confidence = self._look(image[first:])
        heard = confidence * torch.cat([share.valid for share in shares])[first:]
        weight = ramped(self.weight, progress.fraction, self.rampup)
        losses["consistency"] = weight * weighted_mse(logits[first:], target, heard, divisor=self.divisor)
        seen["unlabelled"] = logits[count:].detach()
        return StepOutput(losses, seen, {"consistency_weight": torch.tensor(weight), "confidence": confidence.mean()})

    @torch.no_grad()
    def _look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the teacher says, q [B, K, *S], and how far it is to be trusted, w [B, K, *S]."""
        target = self.teacher(noised(image, self.noise)).float().softmax(1)
        reconstruction = self.autoencoder(self.autoencoder.read(target.argmax(1))).float().sigmoid()
        return target, reconstruction_confidence(reconstruction, target, gamma=self.gamma)
