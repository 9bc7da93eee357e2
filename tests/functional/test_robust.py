"""Losses against loops over voxels."""

import math

import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE
from labeleff.functional.losses import segmentation_loss
from labeleff.functional.robust import (
    generalised_cross_entropy,
    image_dice,
    keep_smallest,
    keep_smallest_per_class,
    noise_robust_dice,
    noise_weighted_dice,
    symmetric_cross_entropy,
    voxel_cross_entropy,
    voxel_trust,
)

LOSSES = (generalised_cross_entropy, symmetric_cross_entropy, noise_robust_dice)


def sample(shape=(5, 6), classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, classes, *shape, generator=generator)
    label = torch.randint(0, classes, (2, *shape), generator=generator)
    label[0, 0] = IGNORE
    return logits, label


def voxels(logits, label):
    """Yield probabilities and class of every known voxel, in float64."""
    for b in range(len(logits)):
        for place in np.ndindex(*label.shape[1:]):
            if int(label[(b, *place)]) != IGNORE:
                z = logits[(b, slice(None), *place)].double().numpy()
                p = np.exp(z - z.max())
                yield p / p.sum(), int(label[(b, *place)])


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 2)])
@pytest.mark.parametrize("q", [0.5, 0.7, 1.0])
def test_generalised_cross_entropy(shape, q):
    logits, label = sample(shape)
    expected = np.mean([(1 - p[y] ** q) / q for p, y in voxels(logits, label)])
    assert float(generalised_cross_entropy(logits, label, q=q)) == pytest.approx(expected, rel=1e-5)


def test_generalised_cross_entropy_tends_to_cross_entropy():
    logits, label = sample()
    plain = np.mean([-math.log(p[y]) for p, y in voxels(logits, label)])
    assert float(generalised_cross_entropy(logits, label, q=1e-4)) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 2)])
def test_symmetric_cross_entropy(shape):
    logits, label = sample(shape)
    total = []
    for p, y in voxels(logits, label):
        logs = np.where(np.arange(3) == y, 0.0, -4.0)
        total.append(0.1 * -math.log(p[y]) + 1.0 * -(p * logs).sum())
    assert float(symmetric_cross_entropy(logits, label)) == pytest.approx(np.mean(total), rel=1e-5)


@pytest.mark.parametrize("denominator", ["squared", "linear"])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_noise_robust_dice(denominator, gamma):
    logits, label = sample()
    top, bottom = np.zeros(3), np.zeros(3)
    for p, y in voxels(logits, label):
        one = np.eye(3)[y]
        top += np.abs(p - one) ** gamma
        bottom += p**2 + one**2 if denominator == "squared" else p + one
    found = noise_robust_dice(logits, label, gamma=gamma, denominator=denominator)
    assert float(found) == pytest.approx((top / (bottom + 1e-5)).mean(), rel=1e-4)


def test_with_gamma_one_and_a_linear_denominator_it_is_soft_dice():
    logits, label = sample()
    p, known = logits.softmax(1), (label != IGNORE).unsqueeze(1)
    y = torch.stack([label == k for k in range(3)], 1) * known
    overlap = 2 * (p * y).sum((0, 2, 3)) / ((p * known).sum((0, 2, 3)) + y.sum((0, 2, 3)))
    found = noise_robust_dice(logits, label, gamma=1.0, denominator="linear")
    assert float(found) == pytest.approx(float((1 - overlap).mean()), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_voxels_count_for_nothing_and_nothing_known_is_zero_with_a_gradient(loss):
    logits, label = sample()
    other = logits.clone()
    other[0, :, 0] += 3.0
    assert torch.equal(loss(logits, label), loss(other, label))
    logits.requires_grad_()
    nothing = loss(logits, torch.full_like(label, IGNORE))
    nothing.backward()
    assert float(nothing.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_at_certainty(loss):
    logits = torch.full((1, 2, 4), -200.0)
    logits[:, 0] = 200.0
    logits.requires_grad_()
    loss(logits, torch.tensor([[0, 0, 1, 1]])).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_one_wrong_voxel_pulls_less_than_in_cross_entropy(loss):
    logits = torch.zeros(1, 2, 8)
    logits[:, 0] = 4.0
    label = torch.zeros(1, 8, dtype=torch.long)
    label[0, 0] = 1

    def pull(function):
        z = logits.clone().requires_grad_()
        function(z, label).backward()
        gradient = z.grad.abs().sum((0, 1))
        return float(gradient[0] / gradient[1:].sum())

    assert pull(loss) < pull(segmentation_loss)


def test_the_smallest_are_kept():
    values = torch.tensor([[3.0, 1.0, 2.0, 9.0, 4.0]])
    known = torch.tensor([[True, True, True, False, True]])
    assert keep_smallest(values, known, 0.5).tolist() == [[False, True, True, False, False]]
    assert keep_smallest(values, known, 1.0).equal(known)
    assert keep_smallest(values, known, 0.01).tolist() == [[False, True, False, False, False]]
    assert not keep_smallest(values, torch.zeros_like(known), 0.5).any()


def test_of_each_class_the_smallest_are_kept_and_background_loses_no_more():
    label = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, IGNORE]])
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.0]])
    kept = [[True, True, True, False, False, False, False, False, True, True, False, True, False]]
    assert keep_smallest_per_class(values, label, 0.5, 3).tolist() == kept  # 2 of 4, 1 of 2, so background without 3
    assert keep_smallest_per_class(values, label, 1.0, 3).equal(label != IGNORE)
    nothing = torch.where(label == 0, 0, IGNORE)
    assert keep_smallest_per_class(values, nothing, 0.5, 3).equal(label == 0)  # no organ, nothing that is drawn wrongly


def test_rare_organs_outlive_a_share_that_exceeds_them():
    """One voxel in a hundred is of an organ, and hard: ranked together all of it is left out, class by class a fifth."""
    label = torch.zeros(1, 1000, dtype=torch.int64)
    label[:, :10] = 1
    values = torch.where(label == 1, 5.0, 0.1) + torch.linspace(0, 0.01, 1000)
    assert not keep_smallest(values, label >= 0, 0.8)[label == 1].any()
    kept = keep_smallest_per_class(values, label, 0.8, 2)
    assert [int((kept & (label == c)).sum()) for c in (0, 1)] == [988, 8]


def test_background_of_a_full_image_keeps_a_voxel():
    label = torch.tensor([[0, 1, 1, 1, 1]])
    assert keep_smallest_per_class(torch.arange(5.0)[None], label, 0.5, 2).tolist() == [
        [True, True, True, False, False]
    ]


def test_voxel_cross_entropy_is_zero_where_nobody_has_said():
    logits, label = sample()
    found = voxel_cross_entropy(logits, label)
    assert not found[label == IGNORE].any()
    assert (found[label != IGNORE] > 0).all()


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 2)])
def test_noise_weighted_dice(shape):
    logits, label = sample(shape)
    weight = torch.rand(label.shape, generator=torch.Generator().manual_seed(3))
    common, total = np.zeros(3), np.zeros(3)
    known = [float(w) for w, y in zip(weight.flatten(), label.flatten(), strict=True) if int(y) != IGNORE]
    for (p, y), w in zip(voxels(logits, label), known, strict=True):
        hot = np.eye(3)[y]
        common += 2 * w * p * hot
        total += w * p + w * hot
    expected = 1 - np.mean((common + 1e-5) / (total + 1e-5))
    assert float(noise_weighted_dice(logits, label, weight)) == pytest.approx(expected, rel=1e-5)
    ones = torch.ones(label.shape)
    assert float(noise_weighted_dice(logits, label)) == pytest.approx(float(noise_weighted_dice(logits, label, ones)))
    plain = noise_robust_dice(logits, label, gamma=1.0, denominator="linear")  # the soft Dice loss, up to its epsilon
    assert float(noise_weighted_dice(logits, label)) == pytest.approx(float(plain), abs=1e-5)


def test_an_image_of_no_weight_moves_nothing():
    logits, label = sample()
    logits.requires_grad_()
    noise_weighted_dice(logits, label, torch.tensor([1.0, 0.0]).view(2, 1, 1)).backward()
    assert float(logits.grad[0].abs().sum()) > 0
    assert float(logits.grad[1].abs().sum()) == 0


def test_trust_is_lost_by_sure_contradictions():
    probs = torch.tensor([[0.98, 0.02], [0.98, 0.02], [0.5, 0.5], [0.4, 0.6]]).T.view(1, 2, 4)
    label = torch.tensor([[0, 1, 1, 0]])
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2) for p in (0.98, 0.98, 0.5, 0.6)]
    expected = [1.0, *(math.exp(-5 * (1 - u)) for u in entropy[1:])]
    assert voxel_trust(probs, label)[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert voxel_trust(probs, label)[0, 1] < 0.1 < 0.8 < voxel_trust(probs, label)[0, 3]


def test_dice_of_images():
    label = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0], [1, 1, IGNORE, IGNORE]])
    predicted = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 0], [1, 0, 1, 1]])
    found = image_dice(predicted, label, 3)
    assert found[0] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(2 / 3)
