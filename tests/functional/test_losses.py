"""Shared losses against hand-computed values."""

import math

import pytest
import torch

from labeleff.batch import IGNORE
from labeleff.functional import losses
from labeleff.functional.losses import (
    one_hot,
    probability_mse,
    region_losses,
    segmentation_loss,
    soft_segmentation_loss,
)


def test_two_voxels_by_hand():
    # probabilities of class 1: 0.8 and 0.4; labels 1 and 0
    logits = torch.tensor([[[0.0, 0.0], [math.log(4), math.log(2 / 3)]]])
    label = torch.tensor([[1, 0]])
    ce = -(math.log(0.8) + math.log(0.6)) / 2
    dice_1 = 1 - 2 * 0.8 / (0.8**2 + 0.4**2 + 1)
    dice_0 = 1 - 2 * 0.6 / (0.2**2 + 0.6**2 + 1)
    assert float(segmentation_loss(logits, label)) == pytest.approx((ce + (dice_0 + dice_1) / 2) / 2, rel=1e-6)
    dice_1, dice_0 = 1 - 2 * 0.8 / (1.2 + 1), 1 - 2 * 0.6 / (0.8 + 1)
    expected = (ce + (dice_0 + dice_1) / 2) / 2
    assert float(segmentation_loss(logits, label, dice="linear")) == pytest.approx(expected, rel=1e-5)


def test_unknown_voxels_do_not_count():
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 8), torch.randint(3, (2, 8))
    hidden = torch.cat([label, torch.full((2, 5), IGNORE)], 1)
    longer = torch.cat([logits, torch.randn(2, 3, 5)], 2)
    for dice in ("squared", "linear"):
        assert float(segmentation_loss(longer, hidden, dice=dice)) == pytest.approx(
            float(segmentation_loss(logits, label, dice=dice)), rel=1e-6
        )


@pytest.mark.parametrize("shape", [(40, 30), (20, 12, 10)])
def test_few_known_voxels_cost_what_all_cost_where_the_rest_is_cut_off(shape):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, *shape, requires_grad=True)
    few = torch.randint(3, (2, *[4] * len(shape)))
    label = torch.full((2, *shape), IGNORE)
    box = (slice(None), *[slice(3, 7)] * len(shape))
    label[box] = few
    loss = segmentation_loss(logits, label)
    (grad,) = torch.autograd.grad(loss, logits)
    cut = logits.detach()[(slice(None), *box)].clone().requires_grad_()
    p, y = cut.softmax(1), one_hot(few, 3)
    axes = [0, *range(2, cut.ndim)]
    dice = 2 * (p * y).sum(axes) / ((p**2).sum(axes) + y.sum(axes))
    expected = (torch.nn.functional.cross_entropy(cut, few) + 1 - dice.mean()) / 2
    (of_cut,) = torch.autograd.grad(expected, cut)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(grad[(slice(None), *box)], of_cut, atol=1e-7, rtol=1e-5)
    grad[(slice(None), *box)] = 0
    assert not grad.any()


def test_nothing_known_is_zero_with_a_gradient():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4), IGNORE))
    loss.backward()
    assert float(loss) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_linear_dice_is_a_mean_over_samples_and_squared_pools_them():
    torch.manual_seed(1)
    logits, label = torch.randn(4, 2, 9), torch.randint(2, (4, 9))
    region = torch.ones(4, 1, 9)
    alone = [region_losses(logits[i : i + 1], label[i : i + 1], region[:1], dice="linear")[1] for i in range(4)]
    assert torch.allclose(region_losses(logits, label, region, dice="linear")[1], torch.stack(alone).mean(0))
    pooled = region_losses(logits.movedim(0, 1).reshape(1, 2, -1), label.reshape(1, -1), torch.ones(1, 1, 36))[1]
    assert torch.allclose(region_losses(logits, label, region)[1], pooled)


def test_one_hot_leaves_unknown_voxels_empty():
    assert one_hot(torch.tensor([[0, 2, IGNORE]]), 3).tolist() == [[[1, 0, 0], [0, 0, 0], [0, 1, 0]]]


def test_probability_mse_by_hand_and_in_padding():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 9.0]]])
    target = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    valid = torch.tensor([[[True, False]]])
    assert float(probability_mse(logits, target, valid)) == pytest.approx(0.25)
    assert float(probability_mse(logits, target, torch.zeros_like(valid))) == 0


@pytest.mark.parametrize("dice", ["squared", "linear"])
@pytest.mark.parametrize("block", [None, 64])
def test_values_and_gradient_are_those_of_plain_sums_in_float64(monkeypatch, dice, block):
    if block:
        monkeypatch.setattr(losses, "CPU_BLOCK", block)
        monkeypatch.setattr(losses, "SMALLEST_BLOCK", 7)
    torch.manual_seed(2)
    logits, label = torch.randn(3, 4, 5, 6, 7) * 3, torch.randint(4, (3, 5, 6, 7))
    label[0, :2] = IGNORE
    regions = torch.rand(3, 2, 5, 6, 7) * (label != IGNORE).unsqueeze(1)
    regions[:, 1, 3:] = 0

    mine = logits.clone().requires_grad_()
    found = torch.cat(region_losses(mine, label, regions, dice=dice))
    weights = torch.tensor([0.3, 1.1, 0.7, -0.4])
    (found * weights).sum().backward()

    exact = logits.double().requires_grad_()
    p = exact.softmax(1)
    expected = []
    y = torch.stack([(label == k).double() for k in range(4)], 1)
    for m in regions.double().unbind(1):
        expected.append(-(p.log() * y).sum(1).mul(m).sum() / m.sum())
    for m in regions.double().unbind(1):
        m, space = m.unsqueeze(1), (2, 3, 4)
        if dice == "linear":
            score = (2 * (p * y * m).sum(space) + 1e-5) / (((p + y) * m).sum(space) + 1e-5)
        else:
            score = (2 * (p * y * m).sum((0, *space)) + 1e-10) / (((p * p + y) * m).sum((0, *space)) + 1e-10)
        expected.append(1 - score.mean())
    expected = torch.stack(expected)
    (expected * weights).sum().backward()
    assert torch.allclose(found, expected.float(), rtol=1e-5)
    assert torch.allclose(mine.grad, exact.grad.float(), rtol=1e-4, atol=1e-8)


def test_half_precision_sums_many_voxels():
    logits, label = torch.zeros(1, 2, 400, 400), torch.zeros(1, 400, 400).long()
    with torch.autocast("cpu", dtype=torch.float16):
        value = segmentation_loss(logits.requires_grad_(), label)
        value.backward()
    dice = 1 - (2 * 0.5 / (0.25 + 1) + 0) / 2
    assert float(value) == pytest.approx((math.log(2) + dice) / 2, rel=5e-5)
    assert bool(logits.grad.isfinite().all())


def test_soft_labels_by_hand():
    # probabilities of class 1: 0.8 and 0.4; two of three raters, and one of four, say 1; nobody says anything of the third
    logits = torch.tensor([[[0.0, 0.0, 0.0], [math.log(4), math.log(2 / 3), 5.0]]])
    target = torch.tensor([[[1 / 3, 3 / 4, 0.0], [2 / 3, 1 / 4, 0.0]]])
    ce = -(1 / 3 * math.log(0.2) + 2 / 3 * math.log(0.8) + 3 / 4 * math.log(0.6) + 1 / 4 * math.log(0.4)) / 2
    overlap_0, overlap_1 = 0.2 / 3 + 0.6 * 3 / 4, 0.8 * 2 / 3 + 0.4 / 4
    dice_0 = 1 - 2 * overlap_0 / (0.2**2 + 0.6**2 + 1 / 9 + 9 / 16)
    dice_1 = 1 - 2 * overlap_1 / (0.8**2 + 0.4**2 + 4 / 9 + 1 / 16)
    expected = (ce + (dice_0 + dice_1) / 2) / 2
    assert soft_segmentation_loss(logits, target).item() == pytest.approx(expected, rel=1e-6)
    dice_0, dice_1 = 1 - 2 * overlap_0 / (0.8 + 13 / 12), 1 - 2 * overlap_1 / (1.2 + 11 / 12)
    expected = (ce + (dice_0 + dice_1) / 2) / 2
    assert soft_segmentation_loss(logits, target, dice="linear").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dice", ["squared", "linear"])
def test_soft_labels_of_one_opinion_are_hard_ones(dice):
    torch.manual_seed(2)
    logits = torch.randn(3, 4, 5, 6, requires_grad=True)
    label = torch.randint(4, (3, 5, 6))
    label[:, :2] = IGNORE
    label[2] = IGNORE
    hard, soft = (
        segmentation_loss(logits, label, dice=dice),
        soft_segmentation_loss(logits, one_hot(label, 4), dice=dice),
    )
    assert soft.item() == pytest.approx(hard.item(), rel=1e-6)
    (one,), (two,) = torch.autograd.grad(hard, logits), torch.autograd.grad(soft, logits)
    assert torch.allclose(one, two, atol=1e-7)


def test_the_squared_soft_loss_is_smallest_at_the_shares():
    shares = torch.tensor([[0.3, 0.6], [0.7, 0.4]]).unsqueeze(0)
    best = shares.log().requires_grad_()
    soft_segmentation_loss(best, shares).backward()
    assert best.grad.abs().max() < 1e-7


def test_no_soft_label_is_zero_with_a_gradient():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = soft_segmentation_loss(logits, torch.zeros(1, 2, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
