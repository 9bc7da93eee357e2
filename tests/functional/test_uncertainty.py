"""Entropies, thresholds and weighted consistency against loops of Python floats."""

import math

import numpy as np
import pytest
import torch

from labeleff.functional.losses import probability_mse
from labeleff.functional.uncertainty import certainty_threshold, noised, sure, weighted_mse

SHAPES = [(5, 4), (3, 2, 4)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2)


@pytest.mark.parametrize(
    ("fraction", "share"), [(0, 0.75 + 0.25 * math.exp(-5)), (0.5, 0.75 + 0.25 * math.exp(-1.25)), (1, 1), (2, 1)]
)
@pytest.mark.parametrize("classes", [2, 5])
def test_threshold(fraction, share, classes):
    assert certainty_threshold(fraction, classes=classes) == pytest.approx(share * math.log(classes))


@pytest.mark.parametrize("shape", SHAPES)
def test_sure_is_where_the_entropy_of_the_mean_is_small(shape):
    samples = randn(4, 2, 3, *shape).softmax(2)
    found = sure(samples, 0.9)
    assert found.shape == (2, 1, *shape)
    values = samples.double().numpy()
    for b in range(2):
        for voxel in np.ndindex(shape):
            mean = [sum(values[(t, b, k, *voxel)] for t in range(4)) / 4 for k in range(3)]
            assert bool(found[(b, 0, *voxel)]) == (-sum(p * math.log(p) for p in mean) < 0.9)
    assert 0 < found.sum() < found.numel()


def test_extremes_of_sure():
    certain = torch.zeros(2, 1, 3, 4, 4)
    certain[:, :, 1] = 1
    assert sure(certain, 1e-6).all()
    uniform = torch.full((2, 1, 2, 4, 4), 0.5)
    assert not sure(uniform, 0.999 * math.log(2)).any()
    opposite = torch.stack([certain[0], certain[0].roll(1, 1)])  # each is sure, their mean is not
    assert not sure(opposite, 0.99 * math.log(2)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_weighted_mse(shape, channels):
    logits, target = randn(2, 3, *shape), randn(2, 3, *shape, seed=1).softmax(1)
    weight = randn(2, channels, *shape, seed=2).clamp_min(0)
    p, q, w = (t.double().numpy() for t in (logits.softmax(1), target, weight))
    top = math.fsum(
        w[(b, k % channels, *voxel)] * (p[(b, k, *voxel)] - q[(b, k, *voxel)]) ** 2
        for b in range(2)
        for k in range(3)
        for voxel in np.ndindex(shape)
    )
    assert float(weighted_mse(logits, target, weight, divisor=2)) == pytest.approx(top / (2 * w.sum()), rel=1e-5)


def test_equal_weights_are_the_plain_mean():
    logits, target = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1).softmax(1)
    valid = randn(2, 1, 4, 4, seed=2) > 0
    found = weighted_mse(logits, target, valid, divisor=3)
    assert float(found) == pytest.approx(float(probability_mse(logits, target, valid)), rel=1e-5)


def test_no_weight_costs_nothing_and_has_a_gradient():
    logits = randn(2, 3, 4, 4).requires_grad_()
    loss = weighted_mse(logits, randn(2, 3, 4, 4, seed=1).softmax(1), torch.zeros(2, 1, 4, 4), divisor=3)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_noise_is_clipped():
    torch.manual_seed(0)
    image = torch.full((100, 100), 3.0)
    noise = noised(image, 0.1) - image
    assert float(noise.abs().max()) == pytest.approx(0.2, abs=1e-5)
    assert float(noise.std()) == pytest.approx(0.0960, abs=0.003)  # of a normal one with its tails at ±2
    assert torch.equal(noised(image, 0.0), image)
