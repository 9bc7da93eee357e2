"""Several raters against hand-counted votes, and STAPLE against an EM of this file's own."""

import importlib.util
import math

import numpy as np
import pytest

from labeleff.batch import IGNORE
from labeleff.errors import DataError, ShapeError
from labeleff.functional.raters import agreement, disagreement, majority, soft_labels, staple

X = IGNORE
VOTES = np.array(
    # agreed, two to one, three ways, a tie of two, one speaks, nobody speaks
    [
        [2, 1, 0, 1, X, X],
        [2, 1, 1, 2, 1, X],
        [2, 0, 2, X, X, X],
    ],
    np.uint8,
)


def test_majority_by_hand():
    assert majority(VOTES).tolist() == [2, 1, X, X, 1, X]
    assert majority(VOTES, undecided="smallest").tolist() == [2, 1, 0, 1, 1, X]


def test_a_tie_is_forgotten_when_a_later_class_has_more_votes():
    assert majority(np.array([[0], [1], [2], [2]])).tolist() == [2]
    assert majority(np.array([[0], [0], [1], [1], [2]])).tolist() == [X]


def test_shares_by_hand():
    assert (
        pytest.approx(
            np.array([[0, 0, 1], [1 / 3, 2 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 2, 1 / 2], [0, 1, 0], [0, 0, 0]])
        )
        == soft_labels(VOTES, 3).T
    )


def test_disagreement_by_hand():
    two_to_one = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    expected = [0, two_to_one, 1, math.log(2) / math.log(3), 0, 0]
    found = disagreement(VOTES, 3)
    assert found == pytest.approx(np.array(expected))
    assert not np.signbit(found).any()


def test_agreement_by_hand():
    votes = np.array([[0, 1, 1, 1, 2, 0], [0, 1, 1, 0, X, 0], [0, 0, 0, 0, 0, 0]], np.uint8)
    found = agreement(votes, 4)
    assert found.shape == (3, 3, 4)
    # class 1: 3 and 2 voxels, 2 in common; class 0: 2 and 3 voxels, 2 in common; class 2: rater 2 abstains where 1 has it
    assert found[0, 1].tolist() == pytest.approx([4 / 5, 4 / 5, math.nan, math.nan], nan_ok=True)
    assert found[0, 2].tolist() == pytest.approx([4 / 8, 0, 0, math.nan], nan_ok=True)
    assert found[2, 2].tolist() == pytest.approx([1, math.nan, math.nan, math.nan], nan_ok=True)
    assert np.array_equal(found, found.swapaxes(0, 1), equal_nan=True)


def expectation_maximisation(votes, classes, rounds=500):
    """Return the most probable class [n], and its lead, of votes [R, n]: Warfield's EM with confusion matrices."""
    shares = np.bincount(votes.ravel(), minlength=classes) / votes.size
    hard = majority(votes, undecided="smallest")
    weight = np.eye(classes)[hard].T  # [true, n]
    for _ in range(rounds):
        confusion = np.zeros((len(votes), classes, classes))  # rater, said, true
        for rater, own in enumerate(votes):
            for said in range(classes):
                confusion[rater, said] = weight[:, own == said].sum(1)
        confusion /= np.maximum(confusion.sum(1, keepdims=True), 1e-300)
        weight = shares[:, None] * np.prod([confusion[r, own].T for r, own in enumerate(votes)], axis=0)
        weight /= weight.sum(0)
    ranked = np.sort(weight, 0)
    return weight.argmax(0), ranked[-1] - ranked[-2]


@pytest.mark.parametrize("classes", [2, 3])
def test_staple_equals_the_em_of_its_paper(classes):
    rng = np.random.default_rng(classes)
    truth = rng.integers(0, classes, 3000)
    votes = np.stack(
        [np.where(rng.random(truth.size) < wrong, rng.integers(0, classes, truth.size), truth) for wrong in
         (0.05, 0.1, 0.75, 0.75, 0.75)]
    ).astype(np.uint8)  # fmt: skip
    expected, lead = expectation_maximisation(votes, classes)
    found = staple(votes.reshape(5, 30, 10, 10)).ravel()
    clear = lead > 0.01
    assert clear.mean() > 0.95
    assert np.array_equal(found[clear], expected[clear])
    # what it is for: two careful raters outweigh three careless ones
    assert (found == truth).mean() > (majority(votes, undecided="smallest") == truth).mean() + 0.03


def test_staple_leaves_abstentions_to_the_majority():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 500).astype(np.uint8)
    votes = np.stack([truth, truth, 1 - truth])
    whole = staple(votes)
    votes[2, :100] = X
    votes[:, 100:110] = X
    found = staple(votes)
    assert np.array_equal(found[:100], truth[:100])
    assert (found[100:110] == X).all()
    assert np.array_equal(found[110:], whole[110:])


def test_one_rater_and_one_class_are_taken_as_they_are():
    one = np.array([[0, 1, X]], np.uint8)
    assert staple(one).tolist() == [0, 1, X]
    assert staple(np.zeros((3, 4), np.uint8)).tolist() == [0, 0, 0, 0]


def test_staple_without_its_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'labeleff\[staple\]'"):
        staple(VOTES)


@pytest.mark.parametrize("votes", [np.zeros(3, np.uint8), np.zeros((0, 3), np.uint8), np.zeros((2, 3))])
def test_what_is_no_vote(votes):
    with pytest.raises(ShapeError, match=r"\[R, \*S\]"):
        majority(votes)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_vote_for_no_class(wrong):
    with pytest.raises(ShapeError, match=f"a vote for {wrong}: classes are 0 … 2"):
        soft_labels(np.array([[0, wrong]]), 3)
