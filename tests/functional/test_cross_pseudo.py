"""Crossed labels, voxel by voxel in loops."""

import math

import numpy as np
import pytest
import torch

from labeleff.functional.cross_pseudo import crossed_losses

SHAPES = [(5, 4), (3, 2, 4)]


def logits(shape, seed, classes=3):
    return torch.randn(2, classes, *shape, generator=torch.Generator().manual_seed(seed)).mul(2)


def by_hand(one, two, valid):
    """The mean of -log p_one over the classes that two finds most probable, and how often both name the same class."""
    one, two, valid = one.double().numpy(), two.double().numpy(), valid.numpy()
    terms, same = [], []
    for b in range(len(one)):
        for voxel in np.ndindex(one.shape[2:]):
            if valid[(b, 0, *voxel)]:
                mine, other = (z[(b, slice(None), *voxel)] for z in (one, two))
                label = max(range(len(other)), key=lambda k: other[k])
                terms.append(math.log(sum(math.exp(z) for z in mine)) - mine[label])
                same.append(int(mine.argmax()) == label)
    return (math.fsum(terms) / len(terms), sum(same) / len(same)) if terms else (0.0, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
def test_each_is_taught_by_the_other(shape, classes):
    one, two = logits(shape, 1, classes), logits(shape, 2, classes)
    valid = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(3)) > 0.3
    of_one, of_two, agreement = crossed_losses(one, two, valid)
    assert float(of_one) == pytest.approx(by_hand(one, two, valid)[0], rel=1e-5)
    assert float(of_two) == pytest.approx(by_hand(two, one, valid)[0], rel=1e-5)
    assert float(agreement) == pytest.approx(by_hand(one, two, valid)[1], rel=1e-6)


def test_what_is_in_the_padding_counts_nothing():
    one, two = logits((4, 4), 1), logits((4, 4), 2)
    valid = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    valid[:, :, :2] = False
    changed = [z.clone() for z in (one, two)]
    for z in changed:
        z[:, :, :2] = 100 * torch.randn(2, 3, 2, 4)
    for a, b in zip(crossed_losses(one, two, valid), crossed_losses(*changed, valid), strict=True):
        assert torch.equal(a, b)


def test_nothing_valid_costs_nothing_and_has_a_gradient():
    one, two = (logits((4, 4), seed).requires_grad_() for seed in (1, 2))
    of_one, of_two, agreement = crossed_losses(one, two, torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    (of_one + of_two).backward()
    assert [float(value.detach()) for value in (of_one, of_two, agreement)] == [0, 0, 0]
    assert torch.equal(one.grad, torch.zeros_like(one))


def test_a_label_carries_no_gradient():
    one, two = (logits((4, 4), seed).requires_grad_() for seed in (1, 2))
    of_one, of_two, _ = crossed_losses(one, two, torch.ones(2, 1, 4, 4, dtype=torch.bool))
    assert torch.autograd.grad(of_one, [two], allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(of_two, [one], allow_unused=True) == (None,)


def test_sure_networks_that_agree_pay_nothing_and_that_disagree_pay_their_margin():
    one = torch.zeros(1, 2, 3, 3)
    one[:, 0] = 30
    everywhere = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert [float(v) for v in crossed_losses(one, one, everywhere)] == pytest.approx([0, 0, 1], abs=1e-6)
    assert [float(v) for v in crossed_losses(one, one.flip(1), everywhere)] == pytest.approx([30, 30, 0])
