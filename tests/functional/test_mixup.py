"""Mixtures: who is mixed with whom, how much of each, and what is known of them."""

import numpy as np
import pytest
import torch

from labeleff.functional.mixup import draw_mixture, mixed, mixed_shares


def drawn(count, alpha, seed=0, pairs="each"):
    return draw_mixture(count, alpha, generator=torch.Generator().manual_seed(seed), pairs=pairs)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha):
    share = drawn(20_000, alpha)[2].double().numpy()
    assert share.min() >= 0
    assert share.max() <= 1
    assert share.mean() == pytest.approx(0.5, abs=0.015)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_every_image_is_mixed_with_another_one_or_two_are_drawn():
    first, second, _ = drawn(7, 0.5)
    assert first.tolist() == list(range(7))
    assert sorted(second.tolist()) == list(range(7))
    assert not (first == second).any()
    assert drawn(1, 0.5)[1].tolist() == [0]
    first, second, _ = drawn(4000, 0.5, pairs="drawn")
    assert len(set(first.tolist())) == pytest.approx(4000 * (1 - np.exp(-1)), rel=0.05)  # with replacement
    assert not torch.equal(first, second)


def test_draws_are_a_function_of_the_generator():
    for pairs in ("each", "drawn"):
        one, again, other = (drawn(6, 0.1, seed, pairs) for seed in (3, 3, 4))
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        assert not torch.equal(one[2], other[2])


def test_values_by_hand():
    first, second, share = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([0.25, 0.9])
    image = torch.tensor([[[4.0, 8.0, 0.0]], [[0.0, 4.0, 2.0]]])  # two images of three voxels
    assert mixed(image, first, second, share).tolist() == [[[1.0, 5.0, 1.5]], [[0.0, 4.0, 2.0]]]
    # of two classes: known and known, known and unknown, unknown and unknown
    shares = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    assert mixed_shares(shares, first, second, share).tolist() == [
        [[0.25, 0.0, 0.0], [0.75, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
    ]
