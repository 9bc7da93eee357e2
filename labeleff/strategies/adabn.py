"""AdaBN: the statistics of batch norm are those of the target; nothing is trained (Li et al., 2016, arXiv:1603.04779)."""

from __future__ import annotations

from torch import nn

from labeleff.batch import Batch, Progress, StepOutput, Stream, Task
from labeleff.errors import RecipeError
from labeleff.functional.norms import batch_norms, cumulative_statistics
from labeleff.registry import register
from labeleff.strategies.base import Strategy


@register("strategy", "adabn")
class AdaBN(Strategy):
    """Take the running statistics of all batch norms anew from the images of the target, in one pass each and no gradient.

    They become the mean over the batches of the stage. A network without batch norm has nothing to adapt, and is refused.
    """

    trains = False

    def streams(self) -> dict[str, Stream]:
        """Return unlabelled images, whole in 2-D."""
        return {"unlabelled": Stream("unlabelled", kind="slice")}

    def build(self, backbone: nn.Module, task: Task) -> None:  # noqa: ARG002
        """Forget the statistics of the source."""
        norms = batch_norms(backbone)
        if not norms:
            raise RecipeError("adabn: this network has no batch norm, so there is nothing to adapt; set backbone.norm")
        for norm in norms:
            norm.reset_running_stats()

    def step(self, backbone: nn.Module, batch: dict[str, Batch], progress: Progress) -> StepOutput:  # noqa: ARG002
        """Look at a batch. No loss, so nothing is optimised."""
        share = batch["unlabelled"]
        with cumulative_statistics(backbone):
            logits = backbone(share.image)
        return StepOutput({}, {"unlabelled": logits})
