"""Entropies, box means and noise, against loops in double precision and known distributions."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from labeleff.errors import ShapeError
from labeleff.functional.acquisition import (
    box_count,
    box_mean,
    box_sum,
    class_entropy,
    expected_entropy,
    half_widths,
    mutual_information,
    power_noise,
    predictive_entropy,
    rising_beta,
)

WINDOWS = [
    ((9,), (2,)),
    ((7, 6), (1, 1)),
    ((7, 6), (0, 2)),
    ((4, 5), (9, 1)),
    ((4, 5), (3, 4)),
    ((4, 5), (0, 0)),
    ((3, 5, 4), (1, 2, 0)),
    ((1, 5, 4), (1, 1, 1)),
    ((3, 4, 2), (7, 7, 7)),
]


def window(at, widths, shape):
    """Return every place of the window around ``at`` that lies inside the image."""
    return itertools.product(
        *(range(max(a - w, 0), min(a + w, n - 1) + 1) for a, w, n in zip(at, widths, shape, strict=True))
    )


@pytest.mark.parametrize(("shape", "widths"), WINDOWS)
def test_box_means_are_those_of_a_loop(shape, widths):
    rng = np.random.default_rng(0)
    score = rng.normal(size=(2, *shape)).astype(np.float32)
    valid = rng.random((2, 1, *shape)) < 0.4
    every, some = np.zeros((2, 2, *shape))
    for b, at in itertools.product(range(2), np.ndindex(*shape)):
        inside = list(window(at, widths, shape))
        known = [v for v in inside if valid[(b, 0, *v)]]
        every[(b, *at)] = sum(float(score[(b, *v)]) for v in inside) / len(inside)
        some[(b, *at)] = sum(float(score[(b, *v)]) for v in known) / len(known) if known else 0
    given = torch.from_numpy(score)
    torch.testing.assert_close(box_mean(given, widths), torch.from_numpy(every).float(), rtol=0, atol=1e-6)
    masked = box_mean(
        given.masked_fill(~torch.from_numpy(valid[:, 0]), torch.nan), widths, valid=torch.from_numpy(valid)
    )
    torch.testing.assert_close(masked, torch.from_numpy(some).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "widths"), WINDOWS)
def test_counts_are_exact(shape, widths):
    rng = np.random.default_rng(1)
    mask = rng.random((2, *shape)) < 0.5
    expected = np.array(
        [[sum(bool(mask[(b, *v)]) for v in window(at, widths, shape)) for at in np.ndindex(*shape)] for b in range(2)]
    ).reshape(2, *shape)
    places = np.array([len(list(window(at, widths, shape))) for at in np.ndindex(*shape)]).reshape(1, *shape)
    found = box_sum(torch.from_numpy(mask), widths)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(box_sum(torch.from_numpy(mask) * 255, widths), expected * 255)
    np.testing.assert_array_equal(box_count(torch.from_numpy(mask), widths), places)
    np.testing.assert_array_equal(box_count(torch.from_numpy(mask), widths, torch.from_numpy(mask)), expected.clip(1))


def test_long_running_sums_keep_their_digits():
    score = torch.full((1, 4, 50_000), 100.0)
    score[..., -20:] = 1e-3
    found = box_mean(score, (0, 3))
    assert found[0, 0, -10:].tolist() == pytest.approx([1e-3] * 10, rel=1e-5)


def test_a_box_mean_refuses_what_would_spread():
    with pytest.raises(ShapeError, match="NaN or infinity"):
        box_mean(torch.tensor([[0.0, -torch.inf, 1.0]]), 1)
    with pytest.raises(ShapeError, match="valid must be boolean"):
        box_mean(torch.zeros(1, 3), 1, valid=torch.ones(1, 3, dtype=torch.bool))


def test_radii():
    assert half_widths(2, 3) == (2, 2, 2)
    assert half_widths([0, 4], 2) == (0, 4)
    for wrong in (-1, (1, 1, 1), (1, -1), (0.5, 1), ()):
        with pytest.raises(ShapeError, match="radius"):
            half_widths(wrong, 2)


def samples(shape=(3, 2), classes=3, count=4, seed=0):
    logits = np.random.default_rng(seed).normal(0, 2, (count, 2, classes, *shape))
    probs = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    probs[:, 0, :, 0] = np.eye(classes)[0].reshape(1, classes, *[1] * (len(shape) - 1))  # certain: 0 log 0 is 0
    return probs


def naive_entropy(p):
    return -sum(float(v) * math.log(v) for v in p if v > 0)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("classes", [2, 3])
def test_entropies_are_those_of_a_loop(shape, classes):
    probs = samples(shape, classes)
    given = torch.from_numpy(probs).float()
    of_mean, mean_of, of_class = np.zeros((3, 2, *shape))
    for b, at in itertools.product(range(2), np.ndindex(*shape)):
        here = probs[(slice(None), b, slice(None), *at)]
        of_mean[(b, *at)] = naive_entropy(here.mean(0))
        mean_of[(b, *at)] = np.mean([naive_entropy(p) for p in here])
        of_class[(b, *at)] = of_mean[(b, *at)] * here[:, 1].mean()
    for found, expected in [
        (predictive_entropy(given), of_mean),
        (expected_entropy(given), mean_of),
        (mutual_information(given), of_mean - mean_of),
        (class_entropy(given, 1), of_class),
    ]:
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)


def test_one_sample_carries_no_mutual_information():
    probs = torch.from_numpy(samples(count=1)).float()
    assert not mutual_information(probs).any()
    assert (mutual_information(probs.expand(3, -1, -1, -1, -1)) >= 0).all()
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2, 1)
    assert mutual_information(apart).item() == pytest.approx(math.log(2))


def test_entropies_refuse_what_is_no_prediction():
    with pytest.raises(ShapeError, match="T, B, K"):
        predictive_entropy(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match="T at least 1"):
        expected_entropy(torch.zeros(0, 1, 2, 4))
    with pytest.raises(ShapeError, match="diverged"):
        predictive_entropy(torch.full((1, 1, 2, 4), torch.nan))
    with pytest.raises(ShapeError, match="class 2 is none of the 2"):
        class_entropy(torch.full((1, 1, 2, 4), 0.5), 2)


def draws(score, beta, seed=0):
    return power_noise(score, beta, torch.Generator().manual_seed(seed))


def test_power_noise_is_seeded_and_gumbel():
    score = torch.full((200_000,), 0.25)
    noise = (draws(score, 2.0) - math.log(0.25)).double()
    assert noise.mean().item() == pytest.approx(0.5772157 / 2, abs=0.005)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6) / 2, abs=0.005)
    assert torch.equal(draws(score, 2.0), draws(score, 2.0))
    assert not torch.equal(draws(score, 2.0), draws(score, 2.0, seed=1))


def test_the_largest_is_a_draw_with_odds_of_the_power():
    score = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for beta in (1.0, 3.0):
        winners = draws(score.expand(100_000, 4), beta).argmax(1)
        odds = score.double() ** beta
        assert (winners.bincount(minlength=4) / 1e5).tolist() == pytest.approx((odds / odds.sum()).tolist(), abs=0.006)
    assert draws(score, 1e9).tolist() == pytest.approx(score.log().tolist(), abs=1e-6)


def test_a_score_of_nothing_stays_nothing():
    assert draws(torch.tensor([0.0, -1e-7, -torch.inf]), 1.0).tolist() == [-math.inf] * 3
    with pytest.raises(ShapeError, match="NaN"):
        draws(torch.tensor([torch.nan]), 1.0)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ShapeError, match="beta"):
            draws(torch.ones(2), wrong)


def test_beta_rises_by_equal_factors():
    assert [rising_beta(n, 5) for n in range(5)] == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])
    assert rising_beta(0, 1) == 1


@pytest.mark.parametrize("shape", [(1, 5, 96, 100), (2, 7, 9, 700), (1, 90, 9000)])
@pytest.mark.parametrize("reach", [0, 1, 3, 8])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_large_maps_are_summed_layer_by_layer(shape, reach, kind):
    """Against scipy's windows; small maps, whose layers are not worth a call each, take the other way."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(3).to(kind)
    found = box_sum(values, reach)
    wanted = values.double().numpy()
    for axis in range(1, len(shape)):
        wanted = ndimage.convolve1d(wanted, np.ones(2 * reach + 1), axis=axis, mode="constant")
    assert found.dtype == {torch.bool: torch.int32, torch.int64: torch.int64, torch.float32: torch.float64}[kind]
    np.testing.assert_allclose(found.double().numpy(), wanted, atol=1e-8)
