"""RIPU: learning from a few labelled regions of the target, with or without the source (Xie et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from labeleff.batch import IGNORE, Batch, Progress, StepOutput, Stream
from labeleff.errors import RecipeError
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.norms import freeze_statistics
from labeleff.functional.ripu import local_consistency, negative_learning
from labeleff.functional.robust import voxel_cross_entropy
from labeleff.functional.sfda import class_ratio, class_ratio_kl, weighted_entropy
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "ripu")
class Ripu(Strategy):
    """L = L_source + L_target + 0.1 · local consistency + negative learning, on labels that know little of the target.

    The stream ``labelled`` is the source and may be left out (``streams: {labelled: {batch: 0}}``): the source-free form.
    The stream ``unlabelled`` is the target; what an annotator such as ``region_query`` has asked about is known there.
    Local consistency is of the source alone, negative learning of every voxel of the target.

    ``loss=ce`` with ``norm_stats=freeze`` is the authors'. The default adds Dice, which organs of few voxels need, and lets
    statistics of batch norm move.

    Args:
        loss: ``dice_ce``: (cross-entropy + Dice) / 2 over known voxels; ``ce``: cross-entropy, the authors'.
        consistency: Weight of local consistency.
        consistency_on: ``boundary``: voxels at borders of the label, which is what the authors' code does; ``labelled``:
            every labelled voxel, as the paper says.
        negative: Weight of negative learning.
        threshold: Probability below which a class is taken to be absent.
        entropy: Weight of the mean entropy of target voxels that nobody has labelled; with ``kl``, source-free adaptation
            goes on beside (strategy ``sfda``).
        kl: Weight of the divergence of predicted class shares from those expected; needs ``data.prior`` and whole images.
        norm_stats: ``update``, or ``freeze``: running statistics of batch norm stay, and are used.
    """

    equivalent_options: ClassVar[Mapping[str, str]] = {
        "norm_stats": "a network without batch norm has no statistics",
        "kl": "needs a prior",
    }

    def __init__(
        self,
        *,
        loss: Literal["dice_ce", "ce"] = "dice_ce",
        consistency: float = 0.1,
        consistency_on: Literal["boundary", "labelled"] = "boundary",
        negative: float = 1.0,
        threshold: float = 0.05,
        entropy: float = 0.0,
        kl: float = 0.0,
        norm_stats: Literal["update", "freeze"] = "update",
    ) -> None:
        super().__init__()
        if min(consistency, negative, entropy, kl) < 0 or not 0 < threshold < 1:
            raise ValueError("weights are at least 0, threshold in (0, 1)")
        self.loss, self.consistency, self.consistency_on = loss, consistency, consistency_on
        self.negative, self.threshold, self.entropy, self.kl, self.norm_stats = (
            negative,
            threshold,
            entropy,
            kl,
            norm_stats,
        )

    def streams(self) -> dict[str, Stream]:
        """Return the source, which a stage may go without, and the target."""
        return {
            "labelled": Stream("labelled", optional=True),
            "unlabelled": Stream("unlabelled", kind="slice" if self.kl else "patch", partial=True),
        }

    def set_modes(self, backbone: nn.Module) -> None:
        """Train; frozen statistics of batch norm are used and left."""
        super().set_modes(backbone)
        if self.norm_stats == "freeze":
            freeze_statistics(backbone)

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:  # noqa: ARG002
        """Return the terms by name; those of weight 0, or without voxels, are left out or 0."""
        losses: dict[str, Tensor] = {}
        logits: dict[str, Tensor] = {}
        if "labelled" in batch:
            source = batch["labelled"]
            logits["labelled"] = scores = backbone(source.image)
            losses["source"] = self._supervised(scores, source.label)
            if self.consistency:
                found = local_consistency(scores, source.label, where=self.consistency_on)
                losses["consistency"] = self.consistency * found
        target = batch["unlabelled"]
        logits["unlabelled"] = scores = backbone(target.image)
        told = target.label != IGNORE
        if bool(told.any()):
            losses["target"] = self._supervised(scores, target.label)
        if self.negative:
            losses["negative"] = self.negative * negative_learning(scores, self.threshold, valid=target.valid)
        losses |= self._adaptation(scores, target)
        detached = {name: value.detach() for name, value in logits.items()}
        return StepOutput(losses, detached, {"known": told.float().mean()})

    def _supervised(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.loss == "ce":
            known = (label != IGNORE).sum().clamp_min(1)
            return voxel_cross_entropy(logits, label).sum() / known
        return segmentation_loss(logits, label)

    def _adaptation(self, logits: Tensor, target: Batch) -> dict[str, Tensor]:
        """Return the terms of source-free adaptation, on what nobody has labelled."""
        terms: dict[str, Tensor] = {}
        if self.entropy:
            unknown = target.valid & (target.label == IGNORE)[:, None]
            terms["entropy"] = self.entropy * weighted_entropy(logits, valid=unknown)
        if self.kl:
            prior = target.extras.get("prior")
            if prior is None:
                raise RecipeError("ripu: kl needs expected class shares; name a data.prior, or set kl: 0")
            terms["ratio"] = self.kl * class_ratio_kl(class_ratio(logits, valid=target.valid), prior)
        return terms
