"""Confident learning against cleanlab, and by hand."""

import numpy as np
import pytest
import torch

from labeleff.batch import IGNORE
from labeleff.functional.confident import LabelIssues, label_quality


def cases(count=5, classes=3, shape=(14, 11), seed=0):
    """Return probabilities [N, K, *S] that mostly favour the truth, and labels [N, *S] that are partly wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (count, *shape))
    logits = rng.normal(0, 1, (count, classes, *shape)) + 2.0 * np.moveaxis(np.eye(classes)[truth], -1, 1)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.where(rng.random(truth.shape) < 0.15, rng.integers(0, classes, truth.shape), truth)
    return probs.astype(np.float32), labels.astype(np.uint8)


def flagged(probs, labels, **options):
    issues = LabelIssues(probs.shape[1])
    for p, y in zip(probs, labels, strict=True):
        issues.add(torch.from_numpy(p), y)
    found = np.zeros(labels.shape, bool)
    for mask, (place, guess, sure), p in zip(found, issues.find(**options), probs, strict=True):
        mask.flat[place] = True
        flat = p.reshape(len(p), -1)[:, place]
        np.testing.assert_array_equal(guess, flat.argmax(0))
        np.testing.assert_array_equal(sure, flat.max(0))
    return found


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_flags_are_those_of_cleanlab(classes, seed):
    cleanlab = pytest.importorskip("cleanlab.segmentation.filter", reason="cleanlab is not installed")
    probs, labels = cases(classes=classes, seed=seed)
    expected = cleanlab.find_label_issues(
        labels.astype(int), probs.astype(float), downsample=1, n_jobs=1, verbose=False
    )
    found = flagged(probs, labels)
    assert found.any()
    np.testing.assert_array_equal(found, expected)


def test_the_rule_by_a_loop_over_voxels():
    probs, labels = cases(count=3, shape=(6, 5))
    labels[0, :2] = IGNORE
    known = [(n, *at) for n in range(3) for at in np.ndindex(6, 5) if labels[(n, *at)] != IGNORE]
    own = {v: probs[(v[0], labels[v], *v[1:])] for v in known}
    limits = [np.mean([own[v] for v in known if labels[v] == k]) for k in range(3)]
    guess = {v: int(probs[(v[0], slice(None), *v[1:])].argmax()) for v in known}
    count = sum(guess[v] != labels[v] and probs[(v[0], guess[v], *v[1:])] >= limits[guess[v]] for v in known)
    lowest = sorted(known, key=lambda v: own[v])[:count]
    expected = {v for v in lowest if guess[v] != labels[v]}
    assert expected
    assert set(map(tuple, np.argwhere(flagged(probs, labels)))) == expected
    per_case = flagged(probs, labels, by_case=True)
    for n in range(3):
        mine = [v for v in known if v[0] == n]
        count = sum(guess[v] != labels[v] and probs[(n, guess[v], *v[1:])] >= limits[guess[v]] for v in mine)
        lowest = sorted(mine, key=lambda v: own[v])[:count]
        assert {v for v in lowest if guess[v] != labels[v]} == {(n, *v) for v in map(tuple, np.argwhere(per_case[n]))}


def test_nothing_is_flagged_where_nothing_is_said():
    issues = LabelIssues(2)
    assert issues.find() == []
    issues.add(torch.full((2, 4), 0.5), np.full(4, IGNORE, np.uint8))
    assert not len(issues.find()[0][0])
    assert np.isnan(issues.thresholds).all()


def test_label_quality_is_cleanlabs_softmin():
    rank = pytest.importorskip("cleanlab.segmentation.rank", reason="cleanlab is not installed")
    probs, labels = cases(count=4)
    expected = rank.get_label_quality_scores(labels.astype(int), probs.astype(float), method="softmin", verbose=False)[
        0
    ]
    own = np.take_along_axis(probs, labels[:, None].astype(int), 1).reshape(4, -1)
    assert [label_quality(torch.from_numpy(o)) for o in own] == pytest.approx(list(expected), rel=1e-5)
    assert label_quality(torch.zeros(0)) == 1.0
