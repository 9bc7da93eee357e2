"""Which loss the supervised baseline takes for several raters, and for mixtures of images."""

import numpy as np
import pytest
import torch

from labeleff.batch import Progress, Task
from labeleff.errors import RecipeError
from labeleff.functional.losses import one_hot, segmentation_loss, soft_segmentation_loss
from labeleff.functional.mixup import draw_mixture
from labeleff.strategies.supervised import Supervised
from labeleff.testing import ShortRun, Subject, check_ignore, check_resume, check_soft_labels

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


@pytest.mark.parametrize("pairs", ["each", "drawn"])
@pytest.mark.parametrize("soft", [False, True])
def test_mixtures_are_learnt_from_as_mixtures_of_labels(pairs, soft):
    """Written as loops over voxels: cross-entropy and squared Dice with λ of one label and 1 - λ of the other."""
    run = ShortRun(Subject(Supervised, {"mixup": 1.0, "mixup_pairs": pairs}, TASK))
    share = run.subject.batches(run.strategy, 0)["labelled"]
    shares = one_hot(share.label, 3).numpy()
    if soft:
        shares = (0.8 * shares + 0.1 * (shares.sum(1, keepdims=True) - shares)).astype(np.float32)
        share = share._replace(soft=torch.from_numpy(shares))
    progress = Progress(3, 10, stage=1, seed=7)
    network = run.backbone.eval()
    found = run.strategy.step(network, {"labelled": share}, progress).losses["supervised"].item()
    (generator,) = progress.generators("mixup", share.geometry.sample[:1])
    first, second, weight = (values.tolist() for values in draw_mixture(4, 1.0, generator=generator, pairs=pairs))
    entropy = known = 0.0
    sums = np.zeros((3, 2))  # Σ p q and Σ p² + q² of every class
    for b in range(4):
        mixture = weight[b] * share.image[first[b]] + (1 - weight[b]) * share.image[second[b]]
        p = network(mixture[None])[0].detach().double().softmax(0).numpy()
        for y, x in np.ndindex(*p.shape[1:]):
            one, two = shares[first[b], :, y, x], shares[second[b], :, y, x]
            if one.sum() == 0 or two.sum() == 0:
                continue
            q = weight[b] * one + (1 - weight[b]) * two
            entropy, known = entropy - (q * np.log(p[:, y, x])).sum(), known + 1
            sums += np.stack((p[:, y, x] * q, p[:, y, x] ** 2 + q**2), 1)
    dice = 1 - (2 * sums[:, 0] / sums[:, 1]).mean()
    assert found == pytest.approx((entropy / known + dice) / 2, rel=1e-5)


@pytest.mark.parametrize("check", [check_ignore, check_resume, check_soft_labels], ids=lambda c: c.__name__)
def test_mixing_keeps_the_contract(check):
    check(Subject(Supervised, {"mixup": 0.4}, TASK))


def test_a_mixture_is_a_function_of_the_step_and_can_be_refused():
    run = ShortRun(Subject(Supervised, {"mixup": 1.0}, TASK))
    batch = run.subject.batches(run.strategy, 0)
    one, again, other = (run.strategy.step(run.backbone.eval(), batch, Progress(t, 10)) for t in (2, 2, 3))
    assert one.losses["supervised"] == again.losses["supervised"] != other.losses["supervised"]
    drawn = ShortRun(Subject(Supervised, {"mixup": 1.0, "mixup_pairs": "drawn"}, TASK))
    assert drawn.strategy.step(run.backbone, batch, Progress(2, 10)).losses != one.losses
    assert one.logits == {}  # whoever watches must not take a mixture for the image
    with pytest.raises(ValueError, match=r"mixup is -1\.0; it is the α of a beta distribution"):
        Supervised(mixup=-1.0)
    with pytest.raises(ValueError, match="which noise_robust_dice does not take; use dice_ce"):
        Supervised(mixup=0.1, loss="noise_robust_dice")
    regions = Task(("background", "one", "two"), 2, exclusive=False)
    with pytest.raises(RecipeError, match="mixup is for classes that exclude one another"):
        Supervised(mixup=0.1).build(run.backbone, regions)
