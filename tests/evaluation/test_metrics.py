"""Metrics against shapes with known distances, loops, and SimpleITK."""

import math

import numpy as np
import pytest
import SimpleITK as sitk

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.evaluation.metrics import measure

CLASSES = ("background", "organ")


def one(prediction, reference, spacing=None):
    return measure(prediction, reference, classes=CLASSES, spacing=spacing or (float("nan"),) * reference.ndim)[0]


def cube(shape, start, size):
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(s, s + size) for s in start)] = 1
    return label


def surface(mask):
    """Voxels with a face neighbour outside the mask, by loops."""
    found = []
    for voxel in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                other = voxel.copy()
                other[axis] += step
                outside = other[axis] < 0 or other[axis] >= mask.shape[axis]
                if outside or not mask[tuple(other)]:
                    found.append(voxel)
                    break
            else:
                continue
            break
    return np.array(found)


def by_hand(prediction, reference, spacing):
    a, b = surface(prediction > 0) * spacing, surface(reference > 0) * spacing
    there = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    forth, back = there.min(1), there.min(0)
    return max(np.percentile(forth, 95), np.percentile(back, 95)), np.concatenate([forth, back]).mean()


def test_a_shifted_cube_in_millimetres():
    a, b = cube((20, 20, 20), (5, 5, 5), 8), cube((20, 20, 20), (5, 5, 8), 8)
    row = one(a, b, (1.0, 1.0, 2.5))
    assert row["dice"] == pytest.approx(5 / 8)
    assert row["iou"] == pytest.approx(5 / 11)
    assert row["hd95"] == pytest.approx(7.5)
    assert row["unit"] == "mm"
    assert one(a, b)["unit"] == "voxel"
    assert one(a, b)["hd95"] == pytest.approx(3)


@pytest.mark.parametrize("shape", [(24, 24), (12, 14, 13)])
def test_distances_equal_the_loops(shape):
    generator = np.random.default_rng(len(shape))
    spacing = np.array([1.0, 2.0, 0.7][: len(shape)])
    for _ in range(3):
        masks = []
        for _ in range(2):
            grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
            centre = np.array(shape) / 2 + generator.normal(0, 1.5, len(shape))
            masks.append(((((grid - centre) / (np.array(shape) / 4)) ** 2).sum(-1) < 1).astype(np.uint8))
        row = one(*masks, tuple(spacing))
        hd95, assd = by_hand(*masks, spacing)
        assert row["hd95"] == pytest.approx(hd95, rel=1e-5)
        assert row["assd"] == pytest.approx(assd, rel=1e-5)


def test_overlap_equals_simpleitk():
    generator = np.random.default_rng(0)
    a, b = (generator.random((9, 10, 11)) > 0.6 for _ in range(2))
    reference = sitk.LabelOverlapMeasuresImageFilter()
    reference.Execute(sitk.GetImageFromArray(a.astype(np.uint8)), sitk.GetImageFromArray(b.astype(np.uint8)))
    row = one(a.astype(np.uint8), b.astype(np.uint8))
    assert row["dice"] == pytest.approx(reference.GetDiceCoefficient())
    assert row["iou"] == pytest.approx(reference.GetJaccardCoefficient())


def test_structures_at_the_edge_of_the_image():
    a, b = cube((10, 10), (0, 0), 5), cube((10, 10), (0, 2), 5)
    hd95, assd = by_hand(a, b, np.ones(2))
    assert one(a, b)["hd95"] == pytest.approx(hd95)
    assert one(a, b)["assd"] == pytest.approx(assd)


def test_identical_is_perfect():
    label = cube((12, 12, 12), (3, 3, 3), 4)
    row = one(label, label, (1.0, 1.0, 1.0))
    assert (row["dice"], row["iou"], row["hd95"], row["assd"]) == (1, 1, 0, 0)


def test_the_rule_for_what_is_missed_spurious_or_absent():
    label, empty = cube((30, 40), (3, 3), 4), np.zeros((30, 40), np.uint8)
    missed, spurious, absent = (
        one(empty, label, (1.0, 1.0)),
        one(label, empty, (1.0, 1.0)),
        one(empty, empty, (1.0, 1.0)),
    )
    for row in (missed, spurious):
        assert (row["dice"], row["iou"], row["hd95"], row["assd"]) == (0, 0, 50, 50)  # 30, 40 and the diagonal 50
    assert (missed["missed"], missed["spurious"], missed["absent"]) == (True, False, False)
    assert (spurious["missed"], spurious["spurious"], spurious["absent"]) == (False, True, False)
    assert absent["absent"]
    assert all(math.isnan(absent[name]) for name in ("dice", "iou", "hd95", "assd"))


def test_unknown_voxels_of_the_reference_do_not_count():
    reference = cube((10, 10), (2, 2), 4)
    prediction = reference.copy()
    prediction[8:] = 1
    reference[8:] = IGNORE
    assert one(prediction, reference)["dice"] == 1


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match="must have one shape"):
        one(np.zeros((3, 3), np.uint8), np.zeros((3, 4), np.uint8))
