"""Pseudo-labels, by hand."""

import numpy as np
import pytest
import torch

from labeleff.annotators.pseudo_labels import PseudoLabels
from labeleff.batch import IGNORE, Progress
from labeleff.data.annotations import AnnotationStore
from labeleff.edits import Reviewed
from labeleff.errors import RecipeError
from labeleff.registry import build


def reviewed(probs, given=None, case="a"):
    """A case of [T, K, *S] probabilities of which nobody has said anything, unless given."""
    probs = torch.as_tensor(probs, dtype=torch.float32)
    unknown = np.full(tuple(probs.shape[2:]), IGNORE, np.uint8)
    given = unknown if given is None else np.asarray(given, np.uint8)
    return Reviewed(case, probs, given.copy(), given, (1.0,) * unknown.ndim)


def certain(label, classes, sure=0.9):
    """[1, K, *S]: the class of the label with probability ``sure``, the rest shared by the others."""
    label = torch.as_tensor(label)
    one = torch.nn.functional.one_hot(label, classes).movedim(-1, 0).float()
    return (one * (sure - (1 - sure) / (classes - 1)) + (1 - sure) / (classes - 1))[None]


def revise(annotator, *cases):
    return list(annotator.revise(cases, Progress(1, 2)))


ROW = [[[[0.5, 0.2, 0.05, 0.34]], [[0.3, 0.2, 0.9, 0.33]], [[0.2, 0.6, 0.05, 0.33]]]]  # [T=1, K=3, 1, 4]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, [0, 2, 1, 0]), (0.55, [IGNORE, 2, 1, IGNORE]), (0.95, [IGNORE] * 4)],
)
def test_the_most_probable_class_where_it_is_probable_enough(threshold, expected):
    (edit,) = revise(PseudoLabels(threshold=threshold), reviewed(ROW))
    assert edit.label.tolist() == [expected]
    assert edit.label.dtype == np.uint8
    assert (edit.case, edit.author, edit.origin) == ("a", "pseudo", None)
    assert edit.confidence == pytest.approx((0.5 + 0.6 + 0.9 + 0.34) / 4)


def test_the_threshold_is_reached_by_what_equals_it():
    (edit,) = revise(PseudoLabels(threshold=0.5), reviewed([[[[0.5]], [[0.25]], [[0.25]]]]))
    assert edit.label.tolist() == [[0]]


def test_several_samples_are_averaged():
    samples = [[[[0.9]], [[0.1]]], [[[0.2]], [[0.8]]], [[[0.2]], [[0.8]]]]  # means: 1.3 / 3 and 1.7 / 3
    (edit,) = revise(PseudoLabels(threshold=0.56), reviewed(samples))
    assert edit.label.tolist() == [[1]]
    (edit,) = revise(PseudoLabels(threshold=0.57), reviewed(samples))
    assert edit.label.tolist() == [[IGNORE]]


@pytest.mark.parametrize("axes", [2, 3])
def test_only_the_largest_component_of_each_class_over_the_whole_case(axes):
    label = np.zeros((8,) * axes, np.int64)
    label[:3], label[4, 0], label[7, 7], label[7, 0] = 1, 2, 1, 2
    expected = label.copy()
    expected[7, 7] = 0  # in 3-D a rod, smaller than the slab
    expected[7, 0] = 0  # as large as the other of its class: the first in raster order stays
    (edit,) = revise(PseudoLabels(largest_component=True), reviewed(certain(label, 3)))
    assert np.array_equal(edit.label, expected)
    (edit,) = revise(PseudoLabels(), reviewed(certain(label, 3)))
    assert np.array_equal(edit.label, label)


def test_what_was_given_is_left_alone_and_every_round_starts_anew(tmp_path):
    given = np.full((2, 3), IGNORE, np.uint8)
    given[0, 0] = 1
    store = AnnotationStore.create(tmp_path, {"a": (2, 3), "b": (2, 3)}, [("a", given)])
    annotator = PseudoLabels(threshold=0.7)
    first, second = np.full((2, 3), 2), np.zeros((2, 3), np.int64)
    for label, sure in ((first, 0.9), (second, 0.6)):
        probs = certain(label, 3, sure)
        case = Reviewed("a", probs, store.read("a", revision=store.revision), store.read_given("a"), (1.0, 1.0))
        store.apply(revise(annotator, case), step=1, stage=0, author="pseudo_labels")
    assert store.read("a", revision=1).tolist() == [[1, 2, 2], [2, 2, 2]]
    assert np.array_equal(store.read("a", revision=2), given)  # no longer sure: nobody has said
    assert [change["voxels"] for change in store.history()] == [{"255->2": 5}, {"2->255": 5}]


def test_cases_are_taken_one_at_a_time():
    seen = []

    def cases():
        for name in "abc":
            seen.append(name)
            yield reviewed(ROW, case=name)

    edits = PseudoLabels().revise(cases(), Progress(1, 2))
    assert next(edits).case == "a"
    assert seen == ["a"]
    assert [edit.case for edit in edits] == ["b", "c"]


def test_it_reviews_the_unlabelled_and_refuses_what_is_no_probability():
    assert PseudoLabels.role == "unlabelled"
    with pytest.raises(RecipeError, match=r"annotator 'pseudo_labels': threshold is 1\.2; .* in \[0, 1\]"):
        build("annotator", "pseudo_labels", threshold=1.2)
    assert isinstance(build("annotator", "pseudo_labels", threshold=0.5, largest_component=True), PseudoLabels)
