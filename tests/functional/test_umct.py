"""Uncertainty-weighted label fusion, voxel by voxel in loops of Python floats."""

import itertools
import math

import numpy as np
import pytest
import torch

from labeleff.errors import ShapeError
from labeleff.functional.umct import cotraining_loss, epistemic_variance, fuse_views, harden

SHAPES = [(3, 4), (2, 3, 2)]


def probabilities(*shape, axis, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(2).softmax(axis)


def fused_by_hand(probs, variance, eps=1e-8):
    """Loop over everything; ``math.fsum`` does not round on the way."""
    probs, variance = probs.double().numpy(), variance.double().numpy()
    views, batch, classes = probs.shape[:3]
    result = np.empty_like(probs)
    for i, b, k in itertools.product(range(views), range(batch), range(classes)):
        for voxel in np.ndindex(probs.shape[3:]):
            tops, weights = [], []
            for j in range(views):
                if j != i:
                    weight = 1 / max(variance[(j, b, 0, *voxel)], eps)
                    weights.append(weight)
                    tops.append(weight * probs[(j, b, k, *voxel)])
            result[(i, b, k, *voxel)] = math.fsum(tops) / math.fsum(weights)
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_variance_is_mean_of_squares_less_square_of_mean(shape, classes):
    samples = probabilities(7, 2, classes, *shape, axis=2)
    found = epistemic_variance(samples)
    values = samples.double().numpy()
    assert found.shape == (2, 1, *shape)
    assert found.dtype == torch.float32
    for b in range(2):
        for voxel in np.ndindex(shape):
            vectors = [values[(t, b, slice(None), *voxel)] for t in range(7)]
            mean = sum(vectors) / 7
            expected = sum(v @ v for v in vectors) / 7 - mean @ mean
            assert float(found[(b, 0, *voxel)]) == pytest.approx(expected, abs=1e-7)


def test_variance_of_regions_is_that_of_two_classes():
    region = torch.rand(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = epistemic_variance(region, exclusive=False)
    for r in range(3):
        pair = torch.stack([region[:, :, r], 1 - region[:, :, r]], 2)
        torch.testing.assert_close(found[:, r : r + 1], epistemic_variance(pair))


def test_variance_at_its_extremes():
    same = probabilities(1, 2, 3, 4, 4, axis=2).expand(10, -1, -1, -1, -1)
    assert epistemic_variance(same).max() < 1e-13
    assert epistemic_variance(same).min() >= 0
    assert epistemic_variance(same[:1]).max() == 0  # a single pass
    sure = torch.eye(2)[torch.tensor([0, 1, 0, 1])].view(4, 1, 2, 1, 1)  # two passes for each of two classes
    assert float(epistemic_variance(sure)) == 0.5
    close = 0.7 + 1e-4 * torch.randn(20, 1, 2, 9, 9, generator=torch.Generator().manual_seed(2))
    expected = close.double().numpy().var(0).sum(1)
    np.testing.assert_allclose(epistemic_variance(close)[:, 0], expected, rtol=1e-3)  # where squares would cancel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_full_precision_out(dtype):
    samples = probabilities(40, 1, 3, 4, 4, axis=2).to(dtype)
    found = epistemic_variance(samples)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[:, 0], samples.double().numpy().var(0).sum(1), rtol=1e-5)
    probs, variance = samples[:3], torch.full((3, 1, 1, 4, 4), 1e-8, dtype=torch.float32)
    variance[1] = 0.5
    fused = fuse_views(probs, variance)
    assert fused.dtype == torch.float32  # 1e8 is no number of 16 bits
    np.testing.assert_allclose(fused, fused_by_hand(probs, variance), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("views", [2, 3, 6])
def test_targets_come_from_the_other_views(views, classes, shape):
    probs = probabilities(views, 2, classes, *shape, axis=2)
    variance = torch.rand(views, 2, 1, *shape, generator=torch.Generator().manual_seed(3)) ** 8  # many below eps
    variance[0, 0, 0, 0, 0] = 0
    for eps in (1e-8, 1e-3):
        np.testing.assert_allclose(fuse_views(probs, variance, eps=eps), fused_by_hand(probs, variance, eps), atol=2e-6)


def test_two_views_get_the_other_to_the_bit():
    probs = probabilities(2, 2, 3, 5, 4, axis=2)
    variance = torch.rand(2, 2, 1, 5, 4, generator=torch.Generator().manual_seed(4))
    assert torch.equal(fuse_views(probs, variance), probs.flip(0))


def test_without_variance_all_others_count_alike():
    probs = probabilities(4, 1, 3, 5, 4, axis=2)
    fused = fuse_views(probs, torch.zeros(4, 1, 1, 5, 4))
    for i in range(4):
        torch.testing.assert_close(fused[i], torch.cat([probs[:i], probs[i + 1 :]]).mean(0))


def test_the_target_of_a_dominant_view_is_exact():
    # the weight of view 0 is 1e8 that of the rest: everything less its own share would lose the rest in float32
    probs = probabilities(3, 1, 2, 4, 4, axis=2)
    variance = torch.full((3, 1, 1, 4, 4), 1.0)
    variance[0], variance[2] = 0, 0.5
    fused = fuse_views(probs, variance)
    torch.testing.assert_close(fused[0], (probs[1] + 2 * probs[2]) / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused[1], probs[0], atol=1e-6, rtol=0)
    assert (fused.sum(2) - 1).abs().max() < 1e-6


def test_one_confidence_per_volume():
    probs = probabilities(3, 2, 3, 4, 4, axis=2)
    variance = torch.rand(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    valid = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    valid[0, :, 2:] = False
    for mask in (None, valid):
        flat = variance.clone()
        for j, b in itertools.product(range(3), range(2)):
            inside = variance[j, b, 0] if mask is None else variance[j, b, 0][mask[b, 0]]
            flat[j, b] = float(np.mean(inside.double().numpy()))
        found = fuse_views(probs, variance, confidence="volume", valid=mask)
        np.testing.assert_allclose(found, fused_by_hand(probs, flat), atol=2e-6)


def test_every_class_may_have_its_own_weight():
    probs = torch.rand(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    variance = torch.rand(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    found = fuse_views(probs, variance)
    for k in range(2):
        np.testing.assert_allclose(
            found[:, :, k : k + 1], fused_by_hand(probs[:, :, k : k + 1], variance[:, :, k : k + 1]), atol=2e-6
        )


def test_gradients_are_those_of_float64():
    shape = (3, 1, 2, 2, 2)
    probs = probabilities(*shape, axis=2).requires_grad_()
    variance = torch.rand(3, 1, 1, 2, 2, generator=torch.Generator().manual_seed(8)).add(0.1).requires_grad_()
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    (fuse_views(probs, variance) * weights).sum().backward()
    step = 1e-4
    for tensor in (probs, variance):
        for index in np.ndindex(tuple(tensor.shape)):
            sides = []
            for sign in (1, -1):
                moved = {"p": probs.detach().double().clone(), "v": variance.detach().double().clone()}
                moved["p" if tensor is probs else "v"][index] += sign * step
                sides.append((fused_by_hand(moved["p"], moved["v"]) * weights.double().numpy()).sum())
            assert float(tensor.grad[index]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-4)
    # what a view predicts has no part in its own target
    own = torch.autograd.grad(fuse_views(probs, variance)[0].sum(), probs)[0]
    assert not own[0].any()
    assert own[1].any()


def test_gradients_reach_the_samples():
    samples = probabilities(4, 1, 3, 2, 2, axis=2).requires_grad_()
    epistemic_variance(samples).sum().backward()
    values = samples.detach().double().numpy()
    np.testing.assert_allclose(samples.grad, 2 * (values - values.mean(0)) / 4, atol=1e-6)


def test_hard_targets():
    probs = torch.tensor([[[0.4, 0.1], [0.4, 0.3], [0.2, 0.6]]])
    assert harden(probs).tolist() == [[[1, 0], [0, 0], [0, 1]]]
    assert harden(probs, exclusive=False).tolist() == [[[0, 0], [0, 0], [0, 1]]]


@pytest.mark.parametrize("dice", ["squared", "linear"])
def test_loss_of_each_view(dice):
    targets = probabilities(3, 2, 3, 4, 5, axis=2, seed=1)
    logits = [torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    valid = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    valid[1, :, :2] = False
    found = cotraining_loss(logits, targets, valid=valid, dice=dice, cross_entropy=0.5)
    plain = cotraining_loss(logits, targets, valid=valid, dice=dice)
    for i in range(3):
        m = valid.double().numpy()
        p = np.exp(logits[i].double().numpy())
        p, q = p / p.sum(1, keepdims=True), targets[i].double().numpy()
        axes = (2, 3) if dice == "linear" else (0, 2, 3)
        below = p + q if dice == "linear" else p * p + q * q
        overlap = 1 - (2 * (p * q * m).sum(axes) / (below * m).sum(axes)).mean()
        entropy = -(q * np.log(p) * m).sum() / m.sum()
        assert float(plain[i]) == pytest.approx(overlap, abs=2e-5)
        assert float(found[i]) == pytest.approx(overlap + 0.5 * entropy, abs=2e-5)


def test_loss_is_smallest_where_all_agree_and_moves_no_target():
    targets = probabilities(2, 1, 3, 4, 4, axis=2).requires_grad_()
    logits = [t.detach().log().requires_grad_() for t in targets]
    loss = cotraining_loss(logits, targets)
    loss.sum().backward()
    assert targets.grad is None
    assert float(loss.detach().max()) < 1e-6
    assert max(float(scores.grad.abs().max()) for scores in logits) < 1e-6
    nothing = cotraining_loss(logits, targets, valid=torch.zeros(1, 1, 4, 4, dtype=torch.bool), cross_entropy=1.0)
    assert nothing.tolist() == [0, 0]


def test_what_cannot_be_fused_is_refused():
    probs, variance = torch.rand(3, 1, 2, 4, 4), torch.rand(3, 1, 1, 4, 4)
    for call, said in [
        (lambda: fuse_views(probs[:1], variance[:1]), "two views"),
        (lambda: fuse_views(probs, variance[:2]), "variance is"),
        (lambda: fuse_views(probs, variance, eps=0.0), "eps is 0"),
        (lambda: epistemic_variance(probs[:0]), "samples must be"),
        (lambda: epistemic_variance(torch.zeros(2, 2, 2, 2, dtype=torch.long)), "samples must be"),
        (lambda: cotraining_loss([probs[0]], probs), "1 views and 3 targets"),
    ]:
        with pytest.raises(ShapeError, match=said):
            call()
