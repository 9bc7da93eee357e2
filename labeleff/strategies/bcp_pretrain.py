"""First stage of bidirectional copy-paste: mixtures of labelled images only. Bai et al., CVPR 2023, arXiv:2305.00673."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from labeleff.batch import Batch, Progress, StepOutput
from labeleff.functional.bcp import box_mask, mixed_loss, paste
from labeleff.functional.losses import DiceForm, segmentation_loss
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "bcp_pretrain")
class BcpPretrain(Strategy):
    """L = mixed loss of L_a ⊕ L_b with both weights 1.

    Parity with the authors' code: LA ``pairing=halves, form=plain, dice=linear, reach_edge=false``;
    ACDC ``pairing=halves, form=split, dice=squared, reach_edge=false``.

    Differs from the paper by default: every labelled image is used once outside and once inside the box
    (``pairing=cyclic``), so that a step learns from as many labelled voxels as a supervised step of the same batch.

    Args:
        ratio: Side of the box as a share of the patch (β).
        pairing: ``cyclic``: image i outside, i - 1 inside, for all i; ``halves``: first half outside, second inside.
        form: ``split``: the loss normalised in each region (ACDC); ``plain``: the usual loss on the mixed label (LA).
        dice: Form of the Dice loss.
        reach_edge: Whether the box may touch the far edge; the authors' code never lets it.
    """

    batch_joint: ClassVar[bool] = True

    def __init__(
        self,
        *,
        ratio: float = 2 / 3,
        pairing: Literal["cyclic", "halves"] = "cyclic",
        form: Literal["split", "plain"] = "split",
        dice: DiceForm = "squared",
        reach_edge: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is {ratio}; it must lie in (0, 1]")
        self.ratio, self.pairing, self.form, self.reach_edge = ratio, pairing, form, reach_edge
        self.dice: DiceForm = dice

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``mixed``: the loss of the labelled-labelled mixtures."""
        image, label = batch["labelled"].image, batch["labelled"].label
        half = len(image) // 2
        if self.pairing == "cyclic" or not half:
            outer, inner = (image, label), (image.roll(1, 0), label.roll(1, 0))
        else:
            outer, inner = (image[:half], label[:half]), (image[half : 2 * half], label[half : 2 * half])
        mask = box_mask(
            image.shape[2:],
            self.ratio,
            generator=progress.generator("box"),
            reach_edge=self.reach_edge,
            device=image.device,
        )
        logits = backbone(paste(outer[0], inner[0], mask))
        if self.form == "plain":
            loss = segmentation_loss(logits, paste(outer[1], inner[1], mask), dice=self.dice)
        else:
            loss = mixed_loss(logits, outer[1], inner[1], mask, weight_outer=1, weight_inner=1, dice=self.dice)
        return StepOutput({"mixed": loss}, {"labelled": logits.detach()})
