"""Bidirectional copy-paste, the self-training stage. Bai et al., CVPR 2023, arXiv:2305.00673."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Task
from labeleff.functional.bcp import box_mask, mixed_loss, paste
from labeleff.functional.ema import BufferRule
from labeleff.functional.losses import DiceForm
from labeleff.functional.regions import hard_labels, largest_components
from labeleff.registry import register
from labeleff.strategies.base import Taught


class Part(NamedTuple):
    """Images and their targets, and what their loss weighs."""

    image: Tensor  # [B, C, *S]
    target: Tensor  # [B, *S]
    weight: float

    def rows(self, start: int, count: int) -> Part:
        """Return ``count`` rows from ``start`` on, wrapping round; a view where they lie in a row."""
        if start + count <= len(self.image):
            rows = slice(start, start + count)
            return Part(self.image[rows], self.target[rows], self.weight)
        index = torch.arange(start, start + count, device=self.image.device) % len(self.image)
        return Part(self.image[index], self.target[index], self.weight)


@register("strategy", "bcp")
class Bcp(Taught):
    """L = mixed loss of (labelled ⊕ unlabelled) + mixed loss of (unlabelled ⊕ labelled), teacher labels weighing α.

    The teacher starts as a copy of the backbone; put a ``bcp_pretrain`` stage before. Without unlabelled cases the loss is
    that of ``bcp_pretrain``. What is handed on and evaluated first is the student, the authors' choice.

    Parity with the authors' code: ``teacher_mode=train, student_forward=separate, reach_edge=false`` and
    LA ``pairing=la, dice=linear, pseudo_label=threshold, buffers=keep``;
    ACDC ``pairing=acdc, dice=squared, pseudo_label=argmax, buffers=average``;
    pancreas ``pairing=pancreas, dice=linear, pseudo_label=threshold, connectivity=2, buffers=keep``.

    Differs from the paper by default: every image is used in both directions (``pairing=both``), so that a step learns
    from as many labelled voxels as a supervised step with the same labelled batch (twice the passes of the paper's
    pairing); the teacher is in eval mode with averaged norm statistics; the box may touch every edge.

    Args:
        ratio: Side of the box as a share of the patch (β).
        unlabelled_weight: Weight α of the part whose labels are the teacher's.
        decay: Decay λ of the teacher's moving average; constant, without a ramp.
        pairing: Which images meet: ``both``, ``paper``, or the halves of the authors' ``la``, ``acdc``, ``pancreas``.
        dice: Form of the Dice loss.
        pseudo_label: ``argmax``, or ``threshold`` (two classes: foreground from 0.5 on; ties differ).
        largest_component: Keep the largest component of each class of a pseudo-label. Switch it off for classes that
            have several instances in a patch.
        connectivity: Of those components: 1 … number of axes, 0: full.
        student_forward: ``separate`` passes for the two mixtures, or one ``joint`` pass (the same for networks whose
            norm does not look at the batch).
        teacher_mode: ``eval`` or ``train`` (dropout and batch statistics at work).
        buffers: What happens to the teacher's norm statistics, see ``ema_update_``.
        reach_edge: Whether the box may touch the far edge; the authors' code never lets it.
    """

    batch_joint: ClassVar[bool] = True
    equivalent_options: ClassVar[Mapping[str, str]] = {"pseudo_label": "the two differ at exact ties only"}

    def __init__(
        self,
        *,
        ratio: float = 2 / 3,
        unlabelled_weight: float = 0.5,
        decay: float = 0.99,
        pairing: Literal["both", "paper", "la", "acdc", "pancreas"] = "both",
        dice: DiceForm = "squared",
        pseudo_label: Literal["argmax", "threshold"] = "argmax",
        largest_component: bool = True,
        connectivity: int = 0,
        student_forward: Literal["separate", "joint"] = "separate",
        teacher_mode: Literal["eval", "train"] = "eval",
        buffers: BufferRule = "average",
        reach_edge: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < ratio <= 1 or not 0 <= decay <= 1 or unlabelled_weight < 0 or connectivity < 0:
            raise ValueError("ratio must lie in (0, 1], decay in [0, 1]; unlabelled_weight and connectivity be >= 0")
        self.ratio, self.unlabelled_weight, self.decay, self.pairing = ratio, unlabelled_weight, decay, pairing
        self.dice: DiceForm = dice
        self.pseudo_label, self.largest_component, self.connectivity = pseudo_label, largest_component, connectivity
        self.student_forward, self.teacher_mode, self.reach_edge = student_forward, teacher_mode, reach_edge
        self.buffer_rule: BufferRule = buffers

    def build(self, backbone: nn.Module, task: Task) -> None:
        """Make the teacher: a copy of the student as it starts."""
        if self.pseudo_label == "threshold" and task.num_classes != 2:
            raise ValueError(f"pseudo_label=threshold is for two classes, the task has {task.num_classes}: use argmax")
        super().build(backbone, task)

    @torch.no_grad()
    def pseudo_labels(self, image: Tensor, valid: Tensor) -> Tensor:
        """Return the teacher's hard labels [B, *S] of [B, C, *S], cleaned by component, IGNORE in padding."""
        logits = self.teacher(image).float()
        label = (logits.softmax(1)[:, 1] >= 0.5).long() if self.pseudo_label == "threshold" else hard_labels(logits)
        if self.largest_component:
            label = largest_components(label, logits.shape[1], connectivity=self.connectivity or "full")
        return torch.where(valid.squeeze(1), label, IGNORE)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``inward`` and ``outward``: the losses of the two mixtures."""
        labelled, unlabelled = batch["labelled"], batch.get("unlabelled")
        given = Part(labelled.image, labelled.label, 1.0)
        mask = box_mask(
            given.image.shape[2:],
            self.ratio,
            generator=progress.generator("box"),
            reach_edge=self.reach_edge,
            device=given.image.device,
        )
        if unlabelled is None:
            logits, loss = self._mixture(backbone, given, given.rows(1, len(given.image)), mask)
            return StepOutput({"inward": loss}, {"labelled": logits.detach()})
        guessed = self._guess(unlabelled)
        pairs = self._pairs(given, guessed)
        if self.student_forward == "joint":
            logits = backbone(torch.cat([paste(outer.image, inner.image, mask) for outer, inner in pairs]))
            shares = logits.split([len(outer.image) for outer, _ in pairs])
            losses = [self._loss(share, *pair, mask) for share, pair in zip(shares, pairs, strict=True)]
        else:
            losses = [self._mixture(backbone, *pair, mask)[1] for pair in pairs]
        padding = unlabelled.valid.numel() - torch.count_nonzero(unlabelled.valid)
        foreground = torch.count_nonzero(guessed.target) - padding
        notes = {"pseudo_foreground": foreground / guessed.target.numel()}
        return StepOutput(dict(zip(("inward", "outward"), losses, strict=True)), {}, notes)

    def _guess(self, unlabelled: Batch) -> Part:
        """Label the unlabelled images: by halves, each with a pass of its own, as the authors do, or all at once."""
        image, valid = unlabelled.image, unlabelled.valid
        if self.pairing == "both":
            label = self.pseudo_labels(image, valid)
        else:
            halves = zip(image.tensor_split(2), valid.tensor_split(2), strict=True)
            label = torch.cat([self.pseudo_labels(i, v) for i, v in halves if len(i)])
        return Part(image, label, self.unlabelled_weight)

    def _pairs(self, given: Part, guessed: Part) -> list[tuple[Part, Part]]:
        """Return (outer, inner) of the two mixtures. A stream that is shorter is used again from its start."""
        count = max(len(given.image), len(guessed.image))
        if self.pairing == "both":
            known, asked = given.rows(0, count), guessed.rows(0, count)
            return [(known, asked), (asked, known.rows(1, count))]
        half = max(1, count // 2)
        known_a, known_b = given.rows(0, half), given.rows(half, half)
        asked_a, asked_b = guessed.rows(0, half), guessed.rows(half, half)
        if self.pairing == "acdc":
            return [(known_b, asked_b), (asked_a, known_a)]
        if self.pairing == "pancreas":
            return [(known_a, asked_b), (asked_a, known_b)]
        return [(known_a, asked_a), (asked_b, known_b)]

    def _mixture(self, backbone: nn.Module, outer: Part, inner: Part, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = backbone(paste(outer.image, inner.image, mask))
        return logits, self._loss(logits, outer, inner, mask)

    def _loss(self, logits: Tensor, outer: Part, inner: Part, mask: Tensor) -> Tensor:
        return mixed_loss(
            logits,
            outer.target,
            inner.target,
            mask,
            weight_outer=outer.weight,
            weight_inner=inner.weight,
            dice=self.dice,
        )
