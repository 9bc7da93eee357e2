"""RIPU against brute force: every window, every pick and every pixel by itself."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional.ripu import (
    box_sum,
    local_consistency,
    negative_learning,
    pixel_score,
    region_impurity,
    region_score,
    region_uncertainty,
    select_regions,
)

CASES = [
    ((7, 9), 1, 4),
    ((6, 5), (0, 2), 2),
    ((5, 4), 9, 3),
    ((4, 5, 6), 1, 3),
    ((3, 6, 5), (0, 2, 1), 5),
    ((1, 5, 5), 2, 2),
    ((8,), 2, 3),
]


def logits(shape, classes, seed=0):
    return 3 * torch.randn(2, classes, *shape, generator=torch.Generator().manual_seed(seed))


def window(place, radius, shape):
    radius = (radius,) * len(shape) if isinstance(radius, int) else radius
    return tuple(slice(max(0, p - r), p + r + 1) for p, r in zip(place, radius, strict=True))


def brute(scores, radius):
    """Return impurity, uncertainty and the entropy of voxels of [B, K, *S], one window after the other."""
    probs = torch.softmax(scores.double(), 1).numpy()
    entropy = -(probs * np.log(probs + 1e-6)).sum(1)
    label = probs.argmax(1)
    impurity, mean = np.zeros(label.shape), np.zeros(label.shape)
    for b in range(len(label)):
        for place in np.ndindex(label.shape[1:]):
            box = window(place, radius, label.shape[1:])
            shares = [(label[b][box] == k).mean() for k in range(probs.shape[1])]
            impurity[b][place] = -sum(q * math.log(q + 1e-6) for q in shares)
            mean[b][place] = entropy[b][box].mean()
    return impurity, mean, entropy


@pytest.mark.parametrize(("shape", "radius", "classes"), CASES)
def test_scores_window_by_window(shape, radius, classes):
    scores = logits(shape, classes)
    impurity, mean, entropy = brute(scores, radius)
    np.testing.assert_allclose(region_impurity(scores, radius), impurity, atol=1e-6)
    np.testing.assert_allclose(region_uncertainty(scores, radius), mean, atol=1e-5)
    np.testing.assert_allclose(region_score(scores, radius, normalise=None), impurity * mean, atol=1e-5)
    np.testing.assert_allclose(region_score(scores, radius), impurity * mean / math.log(classes) ** 2, atol=1e-5)
    np.testing.assert_allclose(
        region_score(scores, radius, normalise="log19"), impurity * mean / math.log(19) ** 2, atol=1e-5
    )
    np.testing.assert_allclose(pixel_score(scores, radius), impurity * entropy, atol=1e-5)
    by_label = region_impurity(scores.argmax(1), radius)
    np.testing.assert_allclose(by_label, impurity, atol=1e-6)


def test_the_authors_convolutions():
    """Windows by dense convolution with ones and counts inside the image, as their code has it."""
    scores, k = logits((20, 30), 19)[:1], 2
    p = scores.softmax(1)
    entropy = -(p * torch.log(p + 1e-6)).sum(1, keepdim=True) / math.log(19)
    one_hot = F.one_hot(p.argmax(1), 19).permute(0, 3, 1, 2).float()
    ones = torch.ones(1, 1, 2 * k + 1, 2 * k + 1)
    count = F.conv2d(torch.ones_like(entropy), ones, padding=k)
    share = F.conv2d(one_hot, ones.expand(19, 1, -1, -1), padding=k, groups=19) / count
    impurity = -(share * torch.log(share + 1e-6)).sum(1) / math.log(19)
    uncertainty = (F.conv2d(entropy, ones, padding=k) / count)[:, 0]
    torch.testing.assert_close(region_score(scores, k, normalise="log19"), impurity * uncertainty, atol=1e-5, rtol=0)


def test_a_pure_map_has_the_small_negative_score_of_the_authors():
    scores = torch.zeros(1, 3, 5, 5)
    scores[:, 1] = 4
    impurity = region_impurity(scores, 1)
    torch.testing.assert_close(impurity, torch.full((1, 5, 5), -math.log(1 + 1e-6)), atol=1e-9, rtol=0)
    assert (region_score(scores, 1) < 0).all()


def test_sums_do_not_lose_digits_over_long_rows():
    values = torch.full((1, 3, 100_000), 0.1)
    values[..., ::7] = 1e4
    near = F.avg_pool1d(values.double(), 3, 1)[0, :, :] * 3
    torch.testing.assert_close(box_sum(values, (0, 1))[0, :, 1:-1], near, atol=1e-7, rtol=0)


def test_what_is_not_valid_or_unknown_is_left_out_of_windows():
    scores = logits((6, 7), 3)
    valid = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    valid[:, :, :, 4:] = False
    cut = scores[..., :4]
    torch.testing.assert_close(region_score(scores, 1, valid=valid)[..., :4], region_score(cut, 1))
    label = torch.randint(0, 3, (1, 6, 7))
    label[..., 4:] = IGNORE
    torch.testing.assert_close(region_impurity(label, 1)[..., :4], region_impurity(label[..., :4], 1))


def test_nan_is_refused():
    scores = logits((4, 4), 3)
    scores[0, 1, 2, 2] = float("nan")
    for name in (region_impurity, region_uncertainty, region_score, pixel_score):
        with pytest.raises(ShapeError, match="NaN"):
            name(scores, 1)
    with pytest.raises(ShapeError, match="NaN"):
        select_regions(torch.tensor([[1.0, float("nan")]]), 1, 1)
    with pytest.raises(ShapeError, match="one for each of 2 axes"):
        region_score(logits((4, 4), 3), (1, 1, 1))


# -- selection ----------------------------------------------------------------------------------------------------------


def greedy(score, reach, count, blocked=None):
    """Return picks of the plain loop: the best voxel left, ties by the last index, then the one before."""
    score = score.clone()
    if blocked is not None:
        score[blocked] = -math.inf
    picks = []
    for _ in range(count):
        places = sorted(np.ndindex(tuple(score.shape)), key=lambda p: (-float(score[p]), *reversed(p)))
        best = places[0]
        if score[best] == -math.inf:
            break
        picks.append(best)
        score[tuple(slice(max(0, c - r), c + r + 1) for c, r in zip(best, reach, strict=True))] = -math.inf
    return picks


@pytest.mark.parametrize("seed", range(12))
def test_picks_are_those_of_the_plain_loop(seed):
    generator = np.random.default_rng(seed)
    d = int(generator.integers(1, 4))
    shape = tuple(generator.integers(2, 9, d).tolist())
    radius = tuple(generator.integers(0, 3, d).tolist())
    levels = int(generator.choice([2, 4, 1000]))  # few levels: many ties
    score = torch.from_numpy(generator.integers(0, levels, shape).astype(np.float32))
    score[torch.from_numpy(generator.random(shape) < 0.1)] = -math.inf
    blocked = torch.from_numpy(generator.random(shape) < 0.2)
    for count, suppress in itertools.product((0, 1, 3, 500), (None, 0, 1)):
        reach = tuple(2 * r for r in radius) if suppress is None else (suppress,) * d
        found = select_regions(score, radius, count, blocked=blocked, suppress=suppress)
        assert found.shape[1] == d
        assert found.dtype == torch.int64
        assert [tuple(p) for p in found.tolist()] == greedy(score, reach, count, blocked)


def test_boxes_do_not_overlap_and_exhaustion_stops():
    found = select_regions(torch.zeros(9, 9), 1, 100)
    assert found.tolist()[:4] == [[0, 0], [3, 0], [6, 0], [0, 3]]  # ties go down the first column
    assert len(found) == 9
    covered = torch.zeros(12, 12)
    for y, x in found.tolist():
        covered[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] += 1
    assert covered.max() == 1
    assert select_regions(torch.full((3, 3), -math.inf), 1, 5).shape == (0, 2)


# -- losses -------------------------------------------------------------------------------------------------------------


def consistency(scores, label, on):
    """Return local consistency voxel by voxel."""
    probs = torch.softmax(scores.double(), 1).numpy()
    shape, terms = label.shape[1:], []
    for b in range(len(label)):
        for place in np.ndindex(tuple(shape)):
            around = list(itertools.product(*[(p - 1, p, p + 1) for p in place]))
            value = int(label[b][place])
            if value == IGNORE:
                continue
            inside = [q for q in around if all(0 <= i < n for i, n in zip(q, shape, strict=True))]
            if on == "boundary" and sum(int(label[b][q]) for q in inside) == len(around) * value:
                continue
            near = [tuple(min(max(i, 0), n - 1) for i, n in zip(q, shape, strict=True)) for q in around]
            mean = sum(probs[(b, slice(None), *q)] for q in near) / len(near)
            terms.append(np.abs(probs[(b, slice(None), *place)] - mean).sum())
    return np.mean(terms)


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 3)])
@pytest.mark.parametrize("on", ["boundary", "all"])
def test_local_consistency_voxel_by_voxel(shape, on):
    scores = logits(shape, 3)
    label = torch.randint(0, 3, (2, *shape), generator=torch.Generator().manual_seed(1))
    label[0, :3] = 1
    label[1, 2:4] = IGNORE
    found = local_consistency(scores, label, on=on)
    assert float(found) == pytest.approx(consistency(scores, label, on), abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)])
def test_negative_learning_pair_by_pair(shape):
    scores = logits(shape, 4)
    valid = torch.ones(2, 1, *shape, dtype=torch.bool)
    valid[:, :, 0] = False
    probs = torch.softmax(scores.double(), 1).numpy()
    pairs = [p for p in probs[:, :, 1:].ravel() if p < 0.05]
    assert float(negative_learning(scores, valid=valid)) == pytest.approx(
        np.mean([-math.log(1 - p + 1e-6) for p in pairs]), abs=1e-7
    )


def test_empty_sets_are_zero_with_a_gradient():
    scores = torch.zeros(1, 2, 4, 4, requires_grad=True)
    for loss in (
        negative_learning(scores),
        local_consistency(scores, torch.full((1, 4, 4), IGNORE)),
        local_consistency(scores, torch.zeros(1, 4, 4, dtype=torch.int64)),
    ):
        assert float(loss.detach()) == 0
        loss.backward(retain_graph=True)
        assert torch.isfinite(scores.grad).all()


def test_the_gradient_of_negative_learning_lowers_what_is_improbable():
    scores = torch.tensor([0.0, 6.0]).view(1, 2, 1, 1).requires_grad_()
    negative_learning(scores).backward()
    p = float(torch.sigmoid(torch.tensor(-6.0)))
    # d/dz of -log(1 - p) is p (1 - p) / (1 - p) = p
    assert scores.grad[0, 0].item() == pytest.approx(p, rel=1e-3)


def test_gradient_of_local_consistency_by_differences():
    scores = logits((3, 4), 3, seed=5)[:1].double()
    label = torch.randint(0, 3, (1, 3, 4), generator=torch.Generator().manual_seed(3))
    scores = scores.float().requires_grad_()
    local_consistency(scores, label).backward()
    for index in [(0, 0, 1, 1), (0, 2, 2, 3), (0, 1, 0, 0)]:
        moved = [scores.detach().clone() for _ in range(2)]
        for sign, one in zip((1, -1), moved, strict=True):
            one[index] += sign * 1e-2
        change = float(local_consistency(moved[0], label) - local_consistency(moved[1], label)) / 2e-2
        assert float(scores.grad[index]) == pytest.approx(change, abs=2e-4)
