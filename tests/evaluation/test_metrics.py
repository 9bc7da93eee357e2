"""Metrics against shapes with known distances, loops, and SimpleITK."""

import math

import numpy as np
import pytest
import SimpleITK as sitk

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.evaluation.metrics import calibration, measure

CLASSES = ("background", "organ")


def one(prediction, reference, spacing=None, **more):
    lengths = spacing or (float("nan"),) * reference.ndim
    return measure(prediction, reference, classes=CLASSES, spacing=lengths, **more)[0]


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
    every = np.concatenate([forth, back])
    return max(np.percentile(forth, 95), np.percentile(back, 95)), every.mean(), (every <= 1).mean()


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
    shares = []
    for _ in range(3):
        masks = []
        for _ in range(2):
            grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
            centre = np.array(shape) / 2 + generator.normal(0, 1.5, len(shape))
            masks.append(((((grid - centre) / (np.array(shape) / 4)) ** 2).sum(-1) < 1).astype(np.uint8))
        row = one(*masks, tuple(spacing), tolerance=1.0)
        hd95, assd, nsd = by_hand(*masks, spacing)
        assert row["nsd"] == pytest.approx(nsd)
        shares.append(nsd)
        assert row["hd95"] == pytest.approx(hd95, rel=1e-5)
        assert row["assd"] == pytest.approx(assd, rel=1e-5)
    assert any(0 < share < 1 for share in shares)


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
    hd95, assd, _ = by_hand(a, b, np.ones(2))
    assert one(a, b)["hd95"] == pytest.approx(hd95)
    assert one(a, b)["assd"] == pytest.approx(assd)


def test_identical_is_perfect():
    label = cube((12, 12, 12), (3, 3, 3), 4)
    row = one(label, label, (1.0, 1.0, 1.0))
    assert (row["dice"], row["iou"], row["hd95"], row["assd"], row["nsd"], row["volume_error"]) == (1, 1, 0, 0, 1, 0)


def test_the_rule_for_what_is_missed_spurious_or_absent():
    label, empty = cube((30, 40), (3, 3), 4), np.zeros((30, 40), np.uint8)
    missed, spurious, absent = (
        one(empty, label, (1.0, 1.0)),
        one(label, empty, (1.0, 1.0)),
        one(empty, empty, (1.0, 1.0)),
    )
    for row in (missed, spurious):
        assert (row["dice"], row["iou"], row["hd95"], row["assd"]) == (0, 0, 50, 50)  # 30, 40 and the diagonal 50
        assert row["nsd"] == 0
    assert missed["volume_error"] == -1
    assert math.isnan(spurious["volume_error"])
    assert (missed["missed"], missed["spurious"], missed["absent"]) == (True, False, False)
    assert (spurious["missed"], spurious["spurious"], spurious["absent"]) == (False, True, False)
    assert absent["absent"]
    assert all(math.isnan(absent[name]) for name in ("dice", "iou", "hd95", "assd", "nsd", "volume_error"))


def ball(radius, spacing, size=24):
    axes = [(np.arange(size) - size // 2) * s for s in spacing]
    return (sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) <= radius**2).astype(np.uint8)


def test_balls_in_anisotropic_voxels_are_as_far_apart_as_in_space_and_in_simpleitk():
    spacing = (1.0, 0.8, 1.5)
    small, large = ball(6, spacing), ball(9, spacing)
    row = one(small, large, spacing)
    assert row["volume_error"] == pytest.approx((6 / 9) ** 3 - 1, abs=0.03)
    assert row["assd"] == pytest.approx(3, abs=0.4)
    near, far = (one(small, large, spacing, tolerance=t)["nsd"] for t in (1.2, 5.0))
    assert (near, far) == (0, 1)  # no point of one sphere is nearer than 3 mm to the other, less a voxel on each side
    images = [sitk.GetImageFromArray(mask.transpose(2, 1, 0)) for mask in (small, large)]
    for image in images:
        image.SetSpacing(spacing)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    # SimpleITK's similarity is 2 (V1 - V2) / (V1 + V2)
    similarity = 2 * row["volume_error"] / (2 + row["volume_error"])
    assert overlap.GetVolumeSimilarity() == pytest.approx(similarity)
    # distances of SimpleITK from its own surface voxels, by its own distance map
    contours = [sitk.BinaryContour(image, fullyConnected=False) for image in images]
    every = []
    for one_side, other in (contours, contours[::-1]):
        distance = sitk.GetArrayFromImage(
            sitk.SignedMaurerDistanceMap(other, squaredDistance=False, useImageSpacing=True)
        )
        every.append(np.abs(distance[sitk.GetArrayFromImage(one_side) > 0]))
    every = np.concatenate(every)
    for tolerance in (2.0, 2.7, 3.1, 3.5):
        found = one(small, large, spacing, tolerance=tolerance)["nsd"]
        assert found == pytest.approx((every <= tolerance + 1e-6).mean(), abs=1e-3)
    assert row["assd"] == pytest.approx(every.mean(), rel=1e-3)


def calibration_by_loops(probs, reference, bins):
    voxels = [(probs[(slice(None), *at)], reference[tuple(at)]) for at in np.argwhere(reference != IGNORE)]
    ece = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [(p.max(), p.argmax() == y) for p, y in voxels if low < p.max() <= high]
        if inside:
            gap = np.mean([c for c, _ in inside]) - np.mean([r for _, r in inside])
            ece += len(inside) / len(voxels) * abs(gap)
    brier = np.mean([sum((p[k] - (k == y)) ** 2 for k in range(len(p))) for p, y in voxels])
    return ece, brier


def test_calibration_equals_the_loops():
    generator = np.random.default_rng(0)
    probs = generator.dirichlet((1, 1, 1), (6, 7)).transpose(2, 0, 1)
    reference = generator.integers(0, 3, (6, 7)).astype(np.uint8)
    reference[0] = IGNORE
    found = calibration(probs, reference, bins=8)
    ece, brier = calibration_by_loops(probs, reference, 8)
    assert found["ece"] == pytest.approx(ece)
    assert found["brier"] == pytest.approx(brier)


def test_calibration_of_what_is_known():
    sure = np.stack([np.ones((4, 5)), np.zeros((4, 5))])
    right, wrong = np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint8)
    assert calibration(sure, right) == {"ece": 0, "overconfidence": 0, "brier": 0}
    assert calibration(sure, wrong) == {"ece": 1, "overconfidence": 1, "brier": 2}
    # four of five are right where 0.8 is said: calibrated; where 0.6 is said it is too modest by 0.2
    mixed = np.zeros((4, 5), np.uint8)
    mixed[:, 0] = 1
    for said, off in ((0.8, 0.0), (0.6, -0.2)):
        found = calibration(np.stack([np.full((4, 5), said), np.full((4, 5), 1 - said)]), mixed)
        assert found["ece"] == pytest.approx(abs(off))
        assert found["overconfidence"] == pytest.approx(off)
    assert math.isnan(calibration(sure, np.full((4, 5), IGNORE, np.uint8))["ece"])
    with pytest.raises(ShapeError, match="need a reference of the shape"):
        calibration(sure, right[0])


def test_unknown_voxels_of_the_reference_do_not_count():
    reference = cube((10, 10), (2, 2), 4)
    prediction = reference.copy()
    prediction[8:] = 1
    reference[8:] = IGNORE
    assert one(prediction, reference)["dice"] == 1


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match="must have one shape"):
        one(np.zeros((3, 3), np.uint8), np.zeros((3, 4), np.uint8))


def test_without_distances_the_rest_is_the_same():
    generator = np.random.default_rng(0)
    one, two = generator.integers(0, 4, (2, 6, 7, 8))
    two[0, 0] = IGNORE
    one[one == 3], two[two == 3] = 0, 0  # absent
    rows = [
        measure(one, two, classes=("b", "x", "y", "z"), spacing=(1.0, 1.0, 1.0), distances=d) for d in (True, False)
    ]
    assert [row["dice"] for row in rows[0][:2]] == [row["dice"] for row in rows[1][:2]]
    assert all(np.isfinite(row["hd95"]) and np.isfinite(row["assd"]) for row in rows[0][:2])
    assert all(np.isnan(row["hd95"]) and np.isnan(row["assd"]) for row in rows[1])
    assert [row["absent"] for row in rows[1]] == [False, False, True]
