"""Which loss the supervised baseline takes for several raters."""

import pytest
import torch

from labeleff.batch import Progress, Task
from labeleff.functional.losses import one_hot, segmentation_loss, soft_segmentation_loss
from labeleff.strategies.supervised import Supervised
from labeleff.testing import ShortRun, Subject

TASK = Task(("background", "one", "two"), 2)


def losses(options, soft):
    """Return the loss of a step with soft labels made by ``soft`` from the hard ones, its logits and its batch."""
    run = ShortRun(Subject(Supervised, options, TASK))
    batch = run.subject.batches(run.strategy, 0)
    share = batch["labelled"]._replace(soft=soft(batch["labelled"].label))
    output = run.strategy.step(run.backbone.eval(), {"labelled": share}, Progress(0, 10))
    return output.losses["supervised"].item(), output.logits["labelled"], share


@pytest.mark.parametrize("dice", ["squared", "linear"])
def test_soft_labels_are_taken_where_they_are_given(dice):
    def blurred(label):
        return 0.7 * one_hot(label, 3) + 0.3 * one_hot((label + 1) % 3 * (label < 3) + 255 * (label >= 3), 3)

    found, logits, share = losses({"dice": dice}, blurred)
    assert found == pytest.approx(soft_segmentation_loss(logits, share.soft, dice=dice).item(), rel=1e-6)
    assert found != pytest.approx(segmentation_loss(logits, share.label, dice=dice).item(), rel=1e-3)
    agreed, logits, share = losses({"dice": dice}, lambda label: one_hot(label, 3))
    assert agreed == pytest.approx(segmentation_loss(logits, share.label, dice=dice).item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["generalised_cross_entropy", "symmetric_cross_entropy", "noise_robust_dice"])
def test_robust_losses_take_the_majority(loss):
    assert Supervised().soft_labels
    assert not Supervised(loss=loss).soft_labels
    wrong, _, _ = losses({"loss": loss}, lambda label: torch.full((*label.shape[:1], 3, *label.shape[1:]), 1 / 3))
    plain, _, _ = losses({"loss": loss}, lambda label: None)
    assert wrong == plain
