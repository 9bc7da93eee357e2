"""How far predictions contradict labels, by hand."""

import math

import numpy as np
import pytest
import torch

from labeleff.annotators.label_quality import LabelQuality
from labeleff.batch import IGNORE, Progress
from labeleff.edits import Reviewed


def test_measures_by_hand():
    """Class 1: two of three predicted voxels are labelled 1; 2: only predicted; 3: in neither; one voxel is unknown."""
    label = np.array([[1, 1, 1], [0, 0, IGNORE]], np.uint8)
    said = torch.tensor([[1, 1, 0], [1, 2, 3]])
    probs = torch.where(torch.arange(4).view(4, 1, 1) == said, 0.7, 0.1)
    empty = np.full((2, 3), IGNORE, np.uint8)
    annotator = LabelQuality()
    cases = [Reviewed(n, probs[None], y, y, (1.0, 1.0)) for n, y in (("b", empty), ("a", label))]
    assert list(annotator.revise(iter(cases), Progress(0, 1))) == []
    found = annotator.describe(Progress(0, 1))
    assert found["dice_1"] == [pytest.approx(2 * 2 / (3 + 3)), None]  # in the order of names, not of reading
    assert found["dice_2"] == [0.0, None]
    assert found["dice_3"] == [None, None]
    assert found["dice"] == [pytest.approx(2 / 3), None]  # only of the class that the label has
    # three of five known voxels contradict the label, with probability 0.1 for it instead of 0.7
    assert found["loss"] == [pytest.approx(-(2 * math.log(0.7) + 3 * math.log(0.1)) / 5), None]
