"""RIPU against loops over windows in double precision, and against the authors' forms written from their description."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional import ripu
from labeleff.functional.ripu import (
    local_consistency,
    negative_learning,
    pixel_score,
    region_impurity,
    region_score,
    region_uncertainty,
    select_regions,
)

WINDOWS = [
    ((9,), 4, (2,)),
    ((8, 7), 5, (1, 1)),
    ((8, 7), 2, (2, 0)),
    ((4, 5), 3, (9, 9)),
    ((4, 6, 5), 3, (1, 1, 1)),
    ((3, 6, 5), 4, (0, 2, 1)),
    ((1, 6, 5), 2, (1, 2, 2)),
]


def naive_softmax(z):
    e = np.exp(z.astype(float) - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def window(at, widths, shape):
    return list(
        itertools.product(
            *(range(max(a - w, 0), min(a + w, n - 1) + 1) for a, w, n in zip(at, widths, shape, strict=True))
        )
    )


def naive_impurity(label, widths, known):
    """Return P of [B, *S], place by place."""
    found = np.zeros(label.shape)
    for b, at in itertools.product(range(len(label)), np.ndindex(*label.shape[1:])):
        seen = [label[(b, *v)] for v in window(at, widths, label.shape[1:]) if known[(b, *v)]]
        for c in set(seen):
            q = seen.count(c) / len(seen)
            found[(b, *at)] -= q * math.log(q + 1e-6)
    return found


def naive_entropy(probs):
    return -(probs * np.log(probs + 1e-6)).sum(1)


def naive_uncertainty(probs, widths, known):
    entropy = naive_entropy(probs)
    found = np.zeros(entropy.shape)
    for b, at in itertools.product(range(len(entropy)), np.ndindex(*entropy.shape[1:])):
        seen = [entropy[(b, *v)] for v in window(at, widths, entropy.shape[1:]) if known[(b, *v)]]
        found[(b, *at)] = np.mean(seen) if seen else 0
    return found


def example(shape, classes, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (2, classes, *shape)).astype(np.float32)


def close(found, expected, atol=1e-5):
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=atol)


# -- scores, by loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "classes", "widths"), WINDOWS)
def test_scores_are_those_of_a_loop(shape, classes, widths):
    z = example(shape, classes)
    probs, given, known = naive_softmax(z), torch.from_numpy(z), np.ones((2, *shape), bool)
    p, u = naive_impurity(z.argmax(1), widths, known), naive_uncertainty(probs, widths, known)
    close(region_impurity(given, widths), p)
    close(region_uncertainty(given, widths), u)
    close(region_score(given, widths), p * u / math.log(classes) ** 2)
    close(region_score(given, widths, normalise="log19"), p / math.log(19) * u / math.log(19))
    close(region_score(given, widths, normalise=None), p * u)
    close(pixel_score(given, widths), p * naive_entropy(probs))
    if len(set(widths)) == 1:
        assert torch.equal(region_score(given, widths[0]), region_score(given, widths))


@pytest.mark.parametrize(("shape", "classes", "widths"), WINDOWS)
def test_what_is_not_valid_counts_nowhere(shape, classes, widths):
    z = example(shape, classes)
    known = np.random.default_rng(1).random((2, *shape)) < 0.4
    given, valid = torch.from_numpy(z), torch.from_numpy(known[:, None])
    p, u = naive_impurity(z.argmax(1), widths, known), naive_uncertainty(naive_softmax(z), widths, known)
    close(region_impurity(given, widths, valid=valid), p)
    close(region_uncertainty(given, widths, valid=valid), u)
    close(region_score(given, widths, normalise=None, valid=valid), p * u)
    close(pixel_score(given, widths, valid=valid), p * naive_entropy(naive_softmax(z)))


@pytest.mark.parametrize(("shape", "classes", "widths"), WINDOWS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_the_impurity_of_labels_leaves_out_ignore(shape, classes, widths, dtype):
    rng = np.random.default_rng(2)
    label = rng.integers(0, classes, (2, *shape)).astype(dtype)
    label[rng.random(label.shape) < 0.3] = IGNORE
    known = label != IGNORE
    close(region_impurity(torch.from_numpy(label), widths), naive_impurity(label, widths, known))
    known &= rng.random(known.shape) < 0.5
    found = region_impurity(torch.from_numpy(label), widths, valid=torch.from_numpy(known[:, None]))
    close(found, naive_impurity(label, widths, known))


def test_impurity_by_hand():
    label = torch.tensor([[[0, 0, 1], [0, 0, 1], [0, 7, 1]]])
    centre = -(5 / 9 * math.log(5 / 9) + 3 / 9 * math.log(3 / 9) + 1 / 9 * math.log(1 / 9))
    found = region_impurity(label, 1)[0]
    assert found[1, 1].item() == pytest.approx(centre, abs=1e-5)  # 1e-6 inside each logarithm
    assert found[0, 2].item() == pytest.approx(math.log(2), abs=1e-5)
    assert found[0, 0].item() == pytest.approx(-1e-6, rel=0.1)  # pure: the authors' epsilon, in 32 bits
    assert torch.equal(region_impurity(label == 0, 1), region_impurity((label == 0).long(), 1))


def test_nothing_is_known():
    assert not region_impurity(torch.full((1, 4, 4), IGNORE), 1).any()
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert not region_score(torch.randn(1, 3, 4, 4), 1, valid=nothing).any()


def test_class_255_of_many_is_no_ignore():
    logits = torch.zeros(1, 300, 2)
    logits[0, 255, 0] = logits[0, 280, 1] = 1
    close(region_impurity(logits, 1), np.full((1, 2), math.log(2)))


def test_among_pure_windows_the_surest_comes_first():
    """The authors' epsilon makes impurity slightly negative there."""
    logits = torch.stack([torch.linspace(1, 5, 12), torch.zeros(12)])[None]
    score = region_score(logits, 1)[0]
    assert (score < 0).all()
    assert select_regions(score, 1, 1).tolist() == [[11]]
    assert torch.equal(score.argsort(), region_score(logits, 1, normalise="log19")[0].argsort())


def test_sure_and_impossible_predictions_are_finite():
    logits = torch.tensor([[[80.0, 0.0, 1e4], [-torch.inf, 0.0, -1e4]]])
    close(region_uncertainty(logits, 0), [[-1e-6, -math.log(0.5 + 1e-6), -1e-6]], atol=2e-7)
    half = logits[..., :2].half()
    close(region_uncertainty(half, 0), [[-1e-6, -math.log(0.5 + 1e-6)]], atol=2e-7)


def test_scores_refuse_what_they_cannot_judge():
    for score in (region_impurity, region_uncertainty, region_score, pixel_score):
        for wrong in (torch.nan, torch.inf):
            with pytest.raises(ShapeError, match="NaN or infinity"):
                score(torch.tensor([[[0.0, wrong], [0.0, 0.0]]]), 1)
        with pytest.raises(ShapeError, match="K at least 2"):
            score(torch.zeros(1, 1, 4), 1)
        with pytest.raises(ShapeError, match="radius"):
            score(torch.zeros(1, 2, 4, 4), (1, 1, 1))
        with pytest.raises(ShapeError, match="valid"):
            score(torch.zeros(1, 2, 4), 1, valid=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="one to three"):
        region_impurity(torch.zeros(4, dtype=torch.int64), 1)


# -- scores, the authors' way: dense convolutions of one-hot maps --------------------------------------------------------


def dense(maps, k):
    """Return the sums over (2k + 1)² windows with zeros outside, one convolution per map."""
    count = maps.shape[1]
    return F.conv2d(maps, torch.ones(count, 1, 2 * k + 1, 2 * k + 1).to(maps), padding=k, groups=count)


@pytest.mark.parametrize("k", [1, 4])
def test_parity_with_the_dense_form(k):
    logits = F.interpolate(torch.randn(1, 19, 6, 8, generator=torch.Generator().manual_seed(0)) * 3, (40, 56))
    p = logits.double().softmax(1)
    entropy = -(p * (p + 1e-6).log()).sum(1, keepdim=True)
    inside = dense(torch.ones_like(entropy), k)
    uncertainty = dense(entropy, k) / inside / math.log(19)
    share = dense(F.one_hot(p.argmax(1), 19).movedim(-1, 1).double(), k) / inside
    impurity = -(share * (share + 1e-6).log()).sum(1, keepdim=True)
    region = (impurity / math.log(19) * uncertainty)[:, 0]
    close(region_score(logits, k, normalise="log19"), region)
    close(pixel_score(logits, k), (impurity * entropy)[:, 0])


# -- selection ----------------------------------------------------------------------------------------------------------


def greedy(score, suppress, count, blocked=None):
    """Return the picks of a search through all voxels per pick, the smallest last index first, then the one before."""
    score = np.array(score, float)
    if blocked is not None:
        score[blocked] = -np.inf
    order, picks = sorted(np.ndindex(*score.shape), key=lambda v: v[::-1]), []
    while len(picks) < count:
        best = max(order, key=lambda v: score[v])  # the first of the largest
        if score[best] == -np.inf:
            break
        picks.append(list(best))
        for v in window(best, suppress, score.shape):
            score[v] = -np.inf
    return picks


def authors(score, k, count):
    """Return the picks of the authors' loop: the best row of every column, then the best column."""
    score, picks = score.clone(), []
    for _ in range(count):
        values, rows = score.max(0)
        column = int(values.max(0).indices)
        row = int(rows[column])
        picks.append([row, column])
        score[max(row - 2 * k, 0) : row + 2 * k + 1, max(column - 2 * k, 0) : column + 2 * k + 1] = -torch.inf
    return picks


SELECTIONS = [
    ((40,), (1,), 30),
    ((17, 23), (1, 1), 60),
    ((17, 23), (0, 2), 50),
    ((9, 8), (6, 6), 5),
    ((6, 9, 8), (1, 1, 1), 40),
    ((4, 9, 8), (0, 2, 1), 40),
]


@pytest.mark.parametrize("levels", [2, 5, 10_000])
@pytest.mark.parametrize(("shape", "widths", "count"), SELECTIONS)
def test_picks_are_those_of_an_argmax_each(shape, widths, count, levels, monkeypatch):
    """With few levels nearly all is a tie; the small passes end before the picks do."""
    rng = np.random.default_rng(3)
    score = rng.integers(0, levels, shape).astype(np.float32)
    score[rng.random(shape) < 0.1] = -np.inf
    blocked = rng.random(shape) < 0.2
    twice = tuple(2 * w for w in widths)
    for fewest, sampled in ((1 << 12, 1 << 14), (5, 7)):
        monkeypatch.setattr(ripu, "FEWEST_CANDIDATES", fewest)
        monkeypatch.setattr(ripu, "SAMPLED", sampled)
        given = torch.from_numpy(score)
        assert select_regions(given, widths, count).tolist() == greedy(score, twice, count)
        found = select_regions(given, widths, count, blocked=torch.from_numpy(blocked), suppress=widths)
        assert found.tolist() == greedy(score, widths, count, blocked)
    assert np.array_equal(given.numpy(), score)


def test_parity_with_the_authors_loop():
    logits = F.interpolate(torch.randn(1, 19, 8, 12, generator=torch.Generator().manual_seed(0)) * 3, (128, 192))
    for k, count in ((1, 100), (9, 12)):
        score = region_score(logits, k, normalise="log19")[0]
        assert select_regions(score, k, count).tolist() == authors(score, k, count)


def test_ties_by_hand():
    assert select_regions(torch.zeros(2, 3), 0, 6).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]]
    assert select_regions(torch.zeros(2, 2, 2), 0, 5).tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]
    assert select_regions(torch.tensor([[0.0, 5.0], [5.0, 0.0]]), 0, 2).tolist() == [[1, 0], [0, 1]]


def test_a_pick_blocks_twice_the_radius_by_default():
    score = torch.arange(9.0)
    assert select_regions(score, 1, 9).flatten().tolist() == [8, 5, 2]
    assert select_regions(score, 1, 9, suppress=0).flatten().tolist() == list(range(8, -1, -1))
    assert select_regions(score, 1, 9, suppress=(8,)).flatten().tolist() == [8]


def test_it_stops_when_nothing_is_left():
    score = torch.full((4, 4), -torch.inf)
    assert select_regions(score, 1, 3).shape == (0, 2)
    score[1, 2] = -7
    assert select_regions(score, 1, 3).tolist() == [[1, 2]]
    every = torch.ones(4, 4, dtype=torch.bool)
    assert select_regions(torch.zeros(4, 4), 1, 3, blocked=every).shape == (0, 2)
    assert select_regions(torch.zeros(0, 4), 1, 3).shape == (0, 2)
    assert select_regions(torch.zeros(4, 4, 4), 1, 0).shape == (0, 3)
    assert select_regions(torch.zeros(4, 4), 1, 0).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_infinity_and_other_types(dtype):
    score = torch.tensor([[0.0, 1.0, torch.inf], [torch.inf, 3.0, 2.0]], dtype=dtype)
    assert select_regions(score.t().contiguous().t(), 0, 4).tolist() == [[1, 0], [0, 2], [1, 1], [1, 2]]


def test_selection_refuses_what_has_no_order():
    with pytest.raises(ShapeError, match="NaN"):
        select_regions(torch.tensor([0.0, torch.nan]), 1, 1)
    with pytest.raises(ShapeError, match="count is -1"):
        select_regions(torch.zeros(3), 1, -1)
    with pytest.raises(ShapeError, match="floating"):
        select_regions(torch.zeros(3, dtype=torch.int64), 1, 1)
    with pytest.raises(ShapeError, match="one to three"):
        select_regions(torch.zeros(1, 1, 3, 3), 1, 1)
    with pytest.raises(ShapeError, match="blocked"):
        select_regions(torch.zeros(3), 1, 1, blocked=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ShapeError, match="radius"):
        select_regions(torch.zeros(3, 3), 1, 1, suppress=(1, 1, 1))


# -- losses -------------------------------------------------------------------------------------------------------------


def naive_consistency(z, label, where, valid):
    probs, total, count, shape = naive_softmax(z), 0.0, 0, label.shape[1:]
    one = (1,) * len(shape)
    for b, at in itertools.product(range(len(label)), np.ndindex(*shape)):
        offsets = list(itertools.product((-1, 0, 1), repeat=len(shape)))
        around = [tuple(a + o for a, o in zip(at, offset, strict=True)) for offset in offsets]
        repeated = [tuple(min(max(a, 0), n - 1) for a, n in zip(v, shape, strict=True)) for v in around]
        inside = [int(label[(b, *v)]) for v in window(at, one, shape)]
        outside = len(offsets) - len(inside)
        own = int(label[(b, *at)])
        boundary = sum(own - other for other in inside) + outside * own != 0
        if own == IGNORE or not valid[(b, *at)] or (where == "boundary" and not boundary):
            continue
        count += 1
        for c in range(probs.shape[1]):
            total += abs(probs[(b, c, *at)] - np.mean([probs[(b, c, *v)] for v in repeated]))
    return total / max(count, 1)


def naive_negative(z, threshold, valid):
    values = [
        -math.log(1 - p + 1e-6)
        for p, counts in zip(naive_softmax(z).ravel(), np.broadcast_to(valid[:, None], z.shape).ravel(), strict=True)
        if counts and p < threshold
    ]
    return float(np.mean(values)) if values else 0.0


def check_gradient(loss, naive, z, *, rtol=0.0):
    """Compare the value, and the gradient at some places with central differences in double precision."""
    given = torch.from_numpy(z).requires_grad_()
    value = loss(given)
    value.backward()
    assert value.item() == pytest.approx(naive(z), rel=1e-5, abs=1e-6)
    z, step = z.astype(float), 1e-5
    for place in np.random.default_rng(6).choice(z.size, 12, replace=False):
        at = np.unravel_index(place, z.shape)
        around = []
        for moved in (z[at] + step, z[at] - step):
            near = z.copy()
            near[at] = moved
            around.append(naive(near))
        assert given.grad[at].item() == pytest.approx((around[0] - around[1]) / (2 * step), abs=1e-5, rel=rtol)


LOSSES = [((6,), 3), ((5, 4), 4), ((3, 3, 4), 2), ((1, 5, 1), 3)]


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("where", ["boundary", "labelled"])
@pytest.mark.parametrize(("shape", "classes"), LOSSES)
def test_local_consistency_is_that_of_a_loop(shape, classes, where, everywhere):
    z, rng = example(shape, classes), np.random.default_rng(4)
    label = rng.integers(0, classes, (2, *shape))
    label[rng.random(label.shape) < 0.15] = IGNORE
    known = np.ones(label.shape, bool) if everywhere else rng.random(label.shape) < 0.7
    check_gradient(
        lambda g: local_consistency(g, torch.from_numpy(label), where=where, valid=torch.from_numpy(known[:, None])),
        lambda x: naive_consistency(x, label, where, known),
        z,
    )


def test_the_authors_boundary_and_its_quirks():
    def counted(label):
        """Return where the loss looks, by the voxels whose own class alone gives it a value."""
        mask = np.zeros(label.shape, bool)
        for at in np.ndindex(*label.shape):
            z = torch.zeros(1, 2, *label.shape)
            valid = torch.zeros(1, 1, *label.shape, dtype=torch.bool)
            z[(0, 0, *at)] = 9
            valid[(0, 0, *at)] = True
            mask[at] = local_consistency(z, torch.from_numpy(label)[None], valid=valid).item() > 0
        return mask

    flat = np.zeros((6, 6), int)
    assert not counted(flat).any()
    frame = counted(flat + 1)
    assert frame[0].all()
    assert frame[:, -1].all()
    assert not frame[1:-1, 1:-1].any()  # zeros outside the image
    step = flat.copy()
    step[:, 3:] = 2
    assert counted(step)[1:-1].tolist() == [[False, False, True, True, False, True]] * 4
    ramp = np.tile(np.arange(6), (6, 1))
    assert not counted(ramp)[1:-1, 1:-1].any()  # differences cancel
    hole = flat.copy()
    hole[2, 2] = IGNORE
    assert counted(hole).sum() == 8  # its neighbours, not itself


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("threshold", [0.05, 0.4, 1.0])
@pytest.mark.parametrize(("shape", "classes"), LOSSES)
def test_negative_learning_is_that_of_a_loop(shape, classes, threshold, everywhere):
    z = example(shape, classes)
    known = np.ones((2, *shape), bool) if everywhere else np.random.default_rng(5).random((2, *shape)) < 0.6
    check_gradient(
        lambda g: negative_learning(g, threshold, valid=torch.from_numpy(known[:, None])),
        lambda x: naive_negative(x, threshold, known),
        z,
        rtol=1e-3,
    )


def test_negative_learning_by_hand():
    p = torch.tensor([0.9, 0.06, 0.04]).log().view(1, 3, 1)
    assert negative_learning(p).item() == pytest.approx(-math.log(0.96), rel=1e-4)
    both = -(math.log(0.96) + math.log(0.94)) / 2
    assert negative_learning(p, 0.07).item() == pytest.approx(both, rel=1e-4)


def test_an_empty_set_costs_nothing_and_has_a_gradient():
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    label = torch.full((1, 4, 4), IGNORE)
    for loss in (
        negative_learning(logits),
        local_consistency(logits, label),
        local_consistency(logits, label, where="labelled"),
        local_consistency(logits, torch.zeros_like(label)),
    ):
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert not grad.any()


def test_sure_predictions_have_finite_gradients():
    logits = torch.tensor([[[200.0, -200.0], [-200.0, 200.0]]], requires_grad=True)
    (negative_learning(logits) + local_consistency(logits, torch.tensor([[0, 1]]))).backward()
    assert torch.isfinite(logits.grad).all()


def test_losses_refuse_what_does_not_fit():
    logits = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ShapeError, match="do not belong"):
        local_consistency(logits, torch.zeros(1, 4, 5, dtype=torch.int64))
    with pytest.raises(ShapeError, match="do not belong"):
        local_consistency(logits, torch.zeros(1, 4, 4))
    with pytest.raises(ShapeError, match="valid"):
        negative_learning(logits, valid=torch.ones(1, 4, 4, dtype=torch.bool))
    for wrong in (0.0, 1.1, math.nan):
        with pytest.raises(ShapeError, match="threshold"):
            negative_learning(logits, wrong)
