"""Learning from the given labels alone: the baseline that every method must beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor, nn

from labeleff.batch import Batch, Progress, StepOutput, Task
from labeleff.errors import RecipeError
from labeleff.functional.losses import DiceForm, one_hot, segmentation_loss, soft_segmentation_loss
from labeleff.functional.mixup import Pairs, draw_mixture, mixed, mixed_shares
from labeleff.functional.robust import generalised_cross_entropy, noise_robust_dice, symmetric_cross_entropy
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "supervised")
class Supervised(Strategy):
    """L = (CE + Dice) / 2 over the labelled voxels, or a loss that wrong labels disturb less.

    Regions that overlap are so many two-class problems; of the losses, ``dice_ce`` knows them.
    ``dice_ce`` takes several raters' shares of the classes for the label where ``data.raters`` is ``soft``.

    Args:
        loss: ``dice_ce``, or ``generalised_cross_entropy``, ``symmetric_cross_entropy`` or ``noise_robust_dice``, see
            ``functional.robust``.
        dice: Of ``dice_ce``: ``squared`` pools over the batch, which suits slices where a class is often absent;
            ``linear`` is per sample, so that data-parallel processes equal one.
        mixup: α of mixup (arXiv:1710.09412): images are ``λ x_i + (1 - λ) x_j``, labels the same of the classes' shares, with
            λ ~ Beta(α, α) for each; GLCL fine-tunes with 0.1. 0: none. A voxel that is unknown in either image is unknown, so
            that it is not for labels of few voxels. Annotators that watch training see nothing of mixtures.
        mixup_pairs: ``each``: every image with another one of the batch (of a process); ``drawn``: two at random, perhaps the
            same, as in GLCL's code.
        q: Of ``generalised_cross_entropy``, in (0, 1]: near 0 like cross-entropy, 1 like MAE. PyMIC: 0.5.
        alpha: Of ``symmetric_cross_entropy``: weight α of the cross-entropy.
        beta: The same: weight β of the reverse cross-entropy.
        gamma: Of ``noise_robust_dice``, in [1, 2]: exponent γ.
        denominator: The same: ``squared`` as the paper, ``linear`` as PyMIC.
    """

    supports_regions: ClassVar[bool] = True
    equivalent_options: ClassVar[Mapping[str, str]] = {
        "mixup_pairs": "without mixup there is nothing to pair",
        "q": "of generalised_cross_entropy only",
        "alpha": "of symmetric_cross_entropy only",
        "beta": "of symmetric_cross_entropy only",
        "gamma": "of noise_robust_dice only",
        "denominator": "of noise_robust_dice only",
    }

    def __init__(
        self,
        *,
        loss: Literal[
            "dice_ce", "generalised_cross_entropy", "symmetric_cross_entropy", "noise_robust_dice"
        ] = "dice_ce",
        dice: DiceForm = "squared",
        mixup: float = 0.0,
        mixup_pairs: Pairs = "each",
        q: float = 0.7,
        alpha: float = 0.1,
        beta: float = 1.0,
        gamma: float = 1.5,
        denominator: Literal["squared", "linear"] = "squared",
    ) -> None:
        super().__init__()
        if not 0 < q <= 1 or not 1 <= gamma <= 2:
            raise ValueError(f"q = {q} must lie in (0, 1], gamma = {gamma} in [1, 2]")
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha = {alpha} and beta = {beta} are weights, 0 or more")
        self.robust: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
            "generalised_cross_entropy": partial(generalised_cross_entropy, q=q),
            "symmetric_cross_entropy": partial(symmetric_cross_entropy, alpha=alpha, beta=beta),
            "noise_robust_dice": partial(noise_robust_dice, gamma=gamma, denominator=denominator),
        }
        if mixup < 0:
            raise ValueError(f"mixup is {mixup}; it is the α of a beta distribution, above 0, or 0 for none")
        if mixup and loss != "dice_ce":
            raise ValueError(f"mixup makes shares of classes, which {loss} does not take; use dice_ce")
        self.mixup, self.mixup_pairs = mixup, mixup_pairs
        self.loss = loss
        self.dice: DiceForm = dice
        self.soft_labels = loss == "dice_ce"

    def build(self, backbone: nn.Module, task: Task) -> None:  # noqa: ARG002
        """Refuse a loss that the task does not have.

        Raises:
            RecipeError: The loss, or mixup, is for classes that exclude one another.
        """
        if not task.exclusive and self.mixup:
            raise RecipeError("supervised: mixup is for classes that exclude one another; leave it out")
        if not task.exclusive and self.loss != "dice_ce":
            raise RecipeError(f"supervised: loss {self.loss} is for classes that exclude one another; use dice_ce")
        self.soft_labels = self.soft_labels and task.exclusive

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:
        """Return ``supervised``: the segmentation loss of the labelled stream."""
        labelled = batch["labelled"]
        if self.mixup:
            return StepOutput({"supervised": self._of_mixtures(backbone, labelled, progress)})
        logits = backbone(labelled.image)
        if labelled.soft is not None and self.soft_labels:
            loss = soft_segmentation_loss(logits, labelled.soft, dice=self.dice)
        elif self.loss == "dice_ce":
            loss = segmentation_loss(logits, labelled.label, dice=self.dice)
        else:
            loss = self.robust[self.loss](logits, labelled.label)
        return StepOutput({"supervised": loss}, {"labelled": logits.detach()})

    def _of_mixtures(self, backbone: nn.Module, labelled: Batch, progress: Progress) -> Tensor:
        """Return the loss of mixtures of the images with those of their labels."""
        count, first = len(labelled.image), labelled.geometry.sample[:1]
        # a share of the batch draws for itself, from its first image
        (generator,) = progress.generators("mixup", first)
        drawn = draw_mixture(count, self.mixup, generator=generator, pairs=self.mixup_pairs)
        logits = backbone(mixed(labelled.image, *drawn))
        shares = one_hot(labelled.label, logits.shape[1]) if labelled.soft is None else labelled.soft
        return soft_segmentation_loss(logits, mixed_shares(shares, *drawn), dice=self.dice)
