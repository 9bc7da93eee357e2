"""Entropies and mutual information against sums written out, and what noise does to a ranking."""

import math

import numpy as np
import pytest
import torch

from labeleff.errors import ShapeError
from labeleff.functional.acquisition import (
    box_mean,
    expected_entropy,
    mutual_information,
    power_noise,
    predictive_entropy,
)


def samples(shape=(3, 2, 4, 3, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(2).softmax(2)


def test_entropies_written_out():
    probs = samples()
    found = predictive_entropy(probs), expected_entropy(probs), mutual_information(probs)
    for b, y, x in np.ndindex(2, 3, 5):
        own = probs[:, b, :, y, x].double().numpy()
        mean = own.mean(0)
        total = -sum(p * math.log(p) for p in mean)
        each = np.mean([-sum(p * math.log(p) for p in row) for row in own])
        assert [float(f[b, y, x]) for f in found] == pytest.approx([total, each, total - each], abs=1e-6)


def test_samples_that_agree_tell_nothing_of_the_weights():
    probs = samples()[:1].expand(4, -1, -1, -1, -1)
    assert float(mutual_information(probs).max()) < 1e-6
    sure = torch.zeros(2, 1, 2, 1, 1)
    sure[0, :, 0] = sure[1, :, 1] = 1  # sure, and of two minds
    assert float(mutual_information(sure)) == pytest.approx(math.log(2))
    assert float(expected_entropy(sure)) == 0


@pytest.mark.parametrize(("shape", "radius"), [((6, 7), 2), ((4, 5, 6), (1, 0, 9))])
def test_window_means(shape, radius):
    score = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    found = box_mean(score, radius)
    reach = (radius,) * len(shape) if isinstance(radius, int) else radius
    for place in np.ndindex(shape):
        box = tuple(slice(max(0, p - r), p + r + 1) for p, r in zip(place, reach, strict=True))
        torch.testing.assert_close(found[(slice(None), *place)], score[(slice(None), *box)].flatten(1).mean(1))


def test_noise_draws_in_proportion_to_a_power_of_the_score():
    score = torch.tensor([1.0, 2.0, 4.0, 0.0])
    for beta in (1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        first = [int(power_noise(score, beta, generator).argmax()) for _ in range(4000)]
        expected = score**beta / (score**beta).sum()
        assert np.bincount(first, minlength=4) / 4000 == pytest.approx(expected.numpy(), abs=0.03)
    large = power_noise(score, 1e6, torch.Generator().manual_seed(0))
    assert large.argsort(descending=True).tolist() == [2, 1, 0, 3]
    again = [power_noise(score, 1.0, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_what_cannot_be_scored():
    with pytest.raises(ShapeError, match="beta must be above 0"):
        power_noise(torch.ones(2), 0.0, torch.Generator())
    with pytest.raises(ShapeError, match="at least 0"):
        power_noise(torch.tensor([-1.0]), 1.0, torch.Generator())
    with pytest.raises(ShapeError, match=r"\[T, B, K"):
        predictive_entropy(torch.ones(3, 4, 4))
