"""Masks, pasting and the mixed loss against values written voxel by voxel."""

import itertools
import math

import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional.bcp import box_mask, mixed_loss, paste


def softmax(z):
    e = [math.exp(v) for v in z]
    return [v / sum(e) for v in e]


def by_hand(logits, outer, inner, mask, w_outer, w_inner, dice):
    """The loss of the specification with loops over samples, voxels and classes."""
    logits, outer, inner, mask = (np.asarray(a, float) for a in (logits, outer, inner, mask))
    samples, classes = logits.shape[:2]
    voxels = list(itertools.product(*(range(n) for n in logits.shape[2:])))
    total = 0.0
    for weight, target, inside in ((w_outer, outer, 1), (w_inner, inner, 0)):
        ce, count = 0.0, 0
        sums = np.zeros((samples, classes, 4))  # p y, p p, p, y
        for b in range(samples):
            for v in voxels:
                t = int(target[(b, *v)])
                if mask[v] != inside or t == IGNORE:
                    continue
                p = softmax(logits[(b, slice(None), *v)])
                ce -= math.log(p[t])
                count += 1
                for k in range(classes):
                    y = float(t == k)
                    sums[b, k] += (p[k] * y, p[k] ** 2, p[k], y)
        ce = ce / count if count else 0.0
        if dice == "squared":
            s = sums.sum(0)
            loss = np.mean([1 - (2 * s[k, 0] + 1e-10) / (s[k, 1] + s[k, 3] + 1e-10) for k in range(classes)])
        else:
            loss = 1 - np.mean((2 * sums[..., 0] + 1e-5) / (sums[..., 2] + sums[..., 3] + 1e-5))
        total += weight * (ce + loss)
    return total / 2


@pytest.mark.parametrize("dice", ["squared", "linear"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_mixed_loss_equals_the_loops(dice, shape, classes, ignored):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3, classes, *shape, generator=generator)
    outer, inner = (torch.randint(classes, (3, *shape), generator=generator) for _ in range(2))
    for target in (outer, inner):
        target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE
    mask = box_mask(shape, generator=generator)
    found = mixed_loss(logits, outer, inner, mask, weight_outer=1.0, weight_inner=0.5, dice=dice)
    assert float(found) == pytest.approx(by_hand(logits, outer, inner, mask, 1.0, 0.5, dice), rel=2e-6)


@pytest.mark.parametrize("dice", ["squared", "linear"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_empty_region_costs_nothing(dice, value):
    logits = torch.randn(2, 3, 4, 4)
    outer, inner = torch.randint(3, (2, 4, 4)), torch.randint(3, (2, 4, 4))
    mask = torch.full((4, 4), value)
    found = mixed_loss(logits, outer, inner, mask, weight_outer=2.0, weight_inner=5.0, dice=dice)
    assert float(found) == pytest.approx(by_hand(logits, outer, inner, mask, 2.0, 5.0, dice), rel=1e-5)
    target, weight = (outer, 2.0) if value else (inner, 5.0)
    whole = mixed_loss(logits, target, target, mask, weight_outer=weight, weight_inner=weight, dice=dice)
    assert float(found) == pytest.approx(float(whole))


def test_perfect_logits_cost_nothing_and_absent_classes_stay_finite():
    label = torch.zeros(2, 6, 6, dtype=torch.long)
    label[:, 2:4] = 1  # class 2 is absent
    logits = 60.0 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
    mask = box_mask((6, 6), generator=torch.Generator().manual_seed(0))
    assert float(mixed_loss(logits, label, label, mask, weight_outer=1, weight_inner=1)) < 1e-4
    uniform = torch.zeros(2, 3, 6, 6, requires_grad=True)
    loss = mixed_loss(uniform, label, label, mask, weight_outer=1, weight_inner=1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(uniform.grad).all()


def test_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 3, 3, 3, generator=generator)
    outer, inner = (torch.randint(3, (1, 3, 3), generator=generator) for _ in range(2))
    mask = box_mask((3, 3), generator=generator)
    leaf = logits.clone().requires_grad_()
    mixed_loss(leaf, outer, inner, mask, weight_outer=1, weight_inner=0.5).backward()
    for place in [(0, 0, 1, 1), (0, 2, 0, 2)]:
        step = torch.zeros_like(logits)
        step[place] = 1e-4
        high, low = (by_hand(logits.double() + s * step, outer, inner, mask, 1, 0.5, "squared") for s in (1, -1))
        assert float(leaf.grad[place]) == pytest.approx((high - low) / 2e-4, rel=1e-2, abs=1e-5)


def test_losses_are_float32_for_half_precision_logits():
    logits = torch.randn(1, 2, 4, 4).bfloat16()
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    loss = mixed_loss(logits, target, target, torch.ones(4, 4), weight_outer=1, weight_inner=1)
    assert loss.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="need targets of shape"):
        mixed_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5), torch.zeros(1, 4, 5), torch.ones(4, 5),
                   weight_outer=1, weight_inner=1)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((112, 112, 80), (74, 74, 53)), ((256, 256), (170, 170)), ((96, 96, 96), (64, 64, 64)), ((7, 1), (4, 1))],
)
def test_box_has_the_authors_sides(shape, sides):
    for seed in range(5):
        mask = box_mask(shape, generator=torch.Generator().manual_seed(seed))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        extent = (mask == 0).nonzero()
        assert tuple((extent.amax(0) - extent.amin(0) + 1).tolist()) == sides
        assert int((mask == 0).sum()) == math.prod(sides)


def corners(reach_edge):
    generator = torch.Generator().manual_seed(0)
    return {int((box_mask((9,), generator=generator, reach_edge=reach_edge) == 0).nonzero()[0]) for _ in range(300)}


def test_corners_reach_the_far_edge_unless_parity_is_asked_for():
    assert corners(True) == {0, 1, 2, 3}  # side 6 of 9
    assert corners(False) == {0, 1, 2}  # the authors' exclusive bound


def test_corners_are_uniform():
    generator = torch.Generator().manual_seed(1)
    firsts = [int((box_mask((12,), 0.5, generator=generator) == 0).nonzero()[0]) for _ in range(7000)]
    counts = np.bincount(firsts, minlength=7)
    assert len(counts) == 7
    assert np.abs(counts / 1000 - 1).max() < 0.12


def test_a_ratio_of_one_covers_everything_and_a_wrong_one_is_refused():
    assert float(box_mask((5, 5), 1.0).sum()) == 0
    assert float(box_mask((5, 5), 1.0, reach_edge=False).sum()) == 0
    for ratio in (0.0, 1.1, -1):
        with pytest.raises(ShapeError, match="ratio"):
            box_mask((5, 5), ratio)


def test_paste_takes_each_side_exactly():
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    outer, inner = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])
    assert paste(outer, inner, mask).tolist() == [[1, 6], [3, 4]]
    images = paste(torch.full((2, 3, 2, 2), 0.1), torch.full((2, 3, 2, 2), float("inf")), mask)
    assert torch.isfinite(images[..., 0, 0]).all()  # no inf · 0
    assert images.shape == (2, 3, 2, 2)
