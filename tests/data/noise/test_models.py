"""Every model does what its definition says, hits its target, and is a pure function of seed and case."""

import numpy as np
import pytest
from scipy import ndimage

from labeleff import registry
from labeleff.batch import IGNORE
from labeleff.data.noise.base import dice
from labeleff.errors import RecipeError

NAMES = ("background", "one", "two", "three")
MODELS = registry.names("noise")


def ellipse(shape, radii, centre=None):
    centre = [n / 2 for n in shape] if centre is None else centre
    grid = np.indices(shape)
    return sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) < 1


def volume():
    """Three structures apart from one another; the second one is in four parts."""
    label = np.zeros((16, 72, 72), np.uint8)
    label[ellipse(label.shape, (6, 13, 15), (8, 20, 22))] = 1
    for y, x in ((14, 54), (28, 54), (14, 66), (28, 64)):
        label[ellipse(label.shape, (5, 4, 4), (8, y, x))] = 2
    label[ellipse(label.shape, (6, 10, 20), (8, 54, 36))] = 3
    return label


def corrupt(label, name, *, case="a", names=NAMES, spacing=None, slice_axis=0, **options):
    model = registry.build("noise", name, **options)
    return model.corrupt(label, case=case, names=names, spacing=spacing, slice_axis=slice_axis)


# -- definitions --------------------------------------------------------------------------------------------------------


def test_distance_is_measured_in_millimetres_on_anisotropic_voxels():
    label = np.zeros((9, 21, 21), np.uint8)
    label[3:6, 8:13, 8:13] = 1
    grown = corrupt(label, "distance", spacing=(2.0, 1.0, 1.0), over=1.0, level=(2.5, 2.5), roughness=0.0).label
    assert grown[2, 10, 10] == 1
    assert grown[1, 10, 10] == 0  # 4 mm away
    assert grown[4, 6, 10] == 1
    assert grown[4, 5, 10] == 0  # 3 mm away
    assert grown[2, 7, 10] == 1  # sqrt(4 + 1) < 2.5
    assert grown[2, 6, 10] == 0  # sqrt(4 + 4) > 2.5
    shrunk = corrupt(label, "distance", spacing=(2.0, 1.0, 1.0), over=0.0, level=(2.0, 2.0), roughness=0.0).label
    # kept: at least 2 mm from the outside: everything along z, one voxel off in the plane
    expected = np.zeros_like(label)
    expected[3:6, 9:12, 9:12] = 1
    np.testing.assert_array_equal(shrunk, expected)


def test_in_plane_errors_do_not_cross_slices():
    label = np.zeros((5, 21, 21), np.uint8)
    label[2, 8:13, 8:13] = 1
    grown = corrupt(label, "distance", over=1.0, level=(3.0, 3.0), in_plane=True).label
    assert not grown[[0, 1, 3, 4]].any()
    assert grown[2].sum() > label[2].sum()


def iou_of_area_normalised(radius, times, over):
    label = ellipse((160, 160), (radius, radius)).astype(np.uint8)
    found = corrupt(label, "area_normalised", names=NAMES[:2], over=over, times=(times,)).label
    return (found & label).sum() / (found | label).sum()


def test_area_normalised_damage_is_the_published_one():
    # foreground IoU by n = 1, 2, 3, 4, 6: figures measured on thorax-like shapes, their background taken out
    for over, published in ((0.0, (0.87, 0.72, 0.605, 0.49, 0.29)), (1.0, (0.88, 0.755, 0.69, 0.617, 0.50))):
        found = [iou_of_area_normalised(17.84, n, over) for n in (1, 2, 3, 4, 6)]
        np.testing.assert_allclose(found, published, atol=0.03)


def test_area_normalised_damage_does_not_grow_with_size():
    mixed = [np.mean([iou_of_area_normalised(r, n, o) for n in (2, 3, 4) for o in (0.0, 1.0)]) for r in (8, 18, 30, 45)]
    np.testing.assert_allclose(mixed, 0.66, atol=0.07)  # resizing (cubic, above 0) is what is left of a difference


def test_area_normalised_at_a_real_number_agrees_with_the_authors_at_whole_ones():
    label = ellipse((120, 120), (17.84, 17.84)).astype(np.uint8)  # area 1000: no resizing
    for times in (2, 3):
        authors = corrupt(label, "area_normalised", names=NAMES[:2], over=1.0, times=(times,)).label
        expected = ndimage.binary_dilation(label, np.ones((3, 3)), iterations=times)
        assert dice(authors == 1, expected) > 0.97
        aim = dice(expected, label == 1)
        real = corrupt(label, "area_normalised", names=NAMES[:2], over=1.0, target_dice=aim, roughness=0.0)
        assert dice(real.label == 1, expected) > 0.97
        assert real.strength[1] == pytest.approx(times, abs=1.05)  # whole layers: from n to n + 1 nothing changes


@pytest.mark.parametrize(
    ("steps", "theta1", "ellipse_dice", "bar_dice"),
    # Dice of Markov noise on an ellipse of semi-axes 30 x 22 and a bar of 12 x 40 pixels, means of 20 seeds
    [(200, 0.8, 0.63, 0.36), (200, 0.2, 0.39, 0.00), (80, 0.7, 0.90, 0.77), (80, 0.3, 0.88, 0.60)],
)
def test_markov_noise_is_as_severe_as_the_authors(steps, theta1, ellipse_dice, bar_dice):
    shapes = np.zeros((2, 160, 160), np.uint8)
    shapes[0] = ellipse((160, 160), (30, 22))
    shapes[1, 74:86, 60:100] = 1
    for label, expected in zip(shapes, (ellipse_dice, bar_dice), strict=True):
        found = [
            corrupt(label, "markov", names=NAMES[:2], over=1.0, steps=steps, theta1=theta1, case=str(n)).dice[1]
            for n in range(14)
        ]
        assert np.mean(found) == pytest.approx(expected, abs=0.06)


def test_markov_steps_flip_boundary_voxels_only():
    label = np.zeros((40, 40), np.uint8)
    label[15:25, 15:25] = 1
    grown = corrupt(label, "markov", names=NAMES[:2], over=1.0, theta1=1.0, theta2=1.0, steps=1, smooth=0.01).label
    np.testing.assert_array_equal(grown, ndimage.binary_dilation(label).astype(np.uint8))
    shrunk = corrupt(label, "markov", names=NAMES[:2], over=0.0, theta1=1.0, theta2=1.0, steps=1, smooth=0.01).label
    np.testing.assert_array_equal(shrunk, ndimage.binary_erosion(label).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "options"), [("elastic", {"amplitude": 4.0}), ("affine", {"rotate": 0.0, "shift": 4.0})]
)
def test_displacements_stay_within_their_millimetres(name, options):
    label, spacing = (volume() > 0).astype(np.uint8), (3.0, 1.0, 0.5)
    noisy = corrupt(label, name, names=NAMES[:2], spacing=spacing, **options).label
    assert (noisy != label).any()
    edge = np.minimum(*(ndimage.distance_transform_edt(m, sampling=spacing) for m in (label == 0, label == 1)))
    edge = np.maximum(*(ndimage.distance_transform_edt(m, sampling=spacing) for m in (label == 0, label == 1))) + edge
    assert edge[noisy != label].max() <= 4.0 + np.linalg.norm(spacing) / 2


def test_an_affine_shift_moves_the_centre():
    label = ellipse((60, 60), (12, 9)).astype(np.uint8)
    noisy = corrupt(label, "affine", names=NAMES[:2], rotate=0.0, shift=5.0, spacing=(1.0, 1.0)).label
    moved = np.subtract(ndimage.center_of_mass(noisy), ndimage.center_of_mass(label))
    assert 2.4 <= np.linalg.norm(moved) <= 5.1
    assert noisy.sum() == pytest.approx(label.sum(), rel=0.03)


def test_contours_jitter_about_where_they_were_and_slices_are_alike():
    label = np.repeat(ellipse((1, 80, 80), (1, 25, 25), (0, 40, 40)), 12, axis=0).astype(np.uint8)
    noisy = corrupt(label, "contour", names=NAMES[:2], sigma=3.0, correlation=0.95).label
    apart = corrupt(label, "contour", names=NAMES[:2], sigma=3.0, correlation=0.0).label
    assert int(noisy.sum()) == pytest.approx(int(label.sum()), rel=0.1)
    assert (noisy[1:] != noisy[:-1]).sum() < 0.6 * (apart[1:] != apart[:-1]).sum()


def test_contours_without_room_to_grow_are_drawn_inside():
    label = np.full((6, 60, 60), 2, np.uint8)
    label[:, ellipse((60, 60), (15, 15))] = 1
    found = [corrupt(label, "contour", names=NAMES[:3], case=str(n), target_dice=0.7, order=(1,)) for n in range(8)]
    assert all(noisy.dice[1] == pytest.approx(0.7, abs=0.02) for noisy in found)


def test_missing_objects_are_whole_and_mostly_small():
    label = np.zeros((60, 120), np.uint8)
    for n in range(6):
        label[5:10, 5 + 18 * n : 10 + 18 * n] = 1
        label[25:55, 2 + 19 * n : 17 + 19 * n] = 1
    small = large = 0
    for case in range(20):
        noisy = corrupt(label, "missing", names=NAMES[:2], case=str(case), probability=0.4, halfway=50.0).label
        parts, count = ndimage.label(label)
        for part in range(1, count + 1):
            left = noisy[parts == part]
            assert left.all() or not left.any()
            gone = not left.any()
            small, large = small + (gone and left.size == 25), large + (gone and left.size > 25)
    assert small > 2 * large


def test_swapped_objects_get_the_name_they_are_said_to():
    label = volume()
    noisy = corrupt(label, "swap", to={"two": "three", "one": "background"}, probability=0.5, unit="component").label
    changed = noisy != label
    assert set(np.unique(noisy[changed & (label == 2)])) <= {3}
    assert set(np.unique(noisy[changed & (label == 1)])) <= {0}
    assert not (changed & (label == 0)).any()


def test_spurious_objects_keep_their_distance():
    label, spacing = volume(), (2.0, 1.0, 1.0)
    noisy = corrupt(label, "spurious", spacing=spacing, target_dice=0.8, gap=3.0).label
    away = ndimage.distance_transform_edt(label == 0, sampling=spacing)
    assert away[noisy != label].min() > 3.0
    np.testing.assert_array_equal(noisy[label > 0], label[label > 0])


def test_annotators_err_each_in_their_own_way():
    label = volume()
    people = ("over", "under", "blank", "good")
    model = registry.build("noise", "personas", people=people, level=(1.5, 3.0))
    seen = {}
    for n in range(24):
        noisy = model.corrupt(label, case=str(n), names=NAMES).label
        seen.setdefault(people[model.annotator(str(n))], []).append((noisy == 1).sum() / (label == 1).sum())
    assert set(seen) == set(people)
    assert min(seen["over"]) > 1.05
    assert max(seen["under"]) < 0.95
    assert max(seen["blank"]) == 0
    assert all(abs(v - 1) < 0.1 for v in seen["good"])
    assert np.ptp(seen["over"]) < 0.1  # systematic within an annotator


def test_cases_that_no_annotator_touches_are_those_that_may_be_kept():
    people = ("over", "wrong", "unsteady", "blank")
    model = registry.build("noise", "personas", people=people, share=0.5, level=(3.0, 4.0))
    label, touched = volume(), {n: model.touches(str(n)) for n in range(24)}
    assert 4 < sum(touched.values()) < 20
    for n, expected in touched.items():
        assert (model.corrupt(label, case=str(n), names=NAMES).label != label).any() == expected
    with pytest.raises(RecipeError, match="over: annotators err"):
        registry.build("noise", "personas", over=1.0)


def test_spurious_objects_are_of_absent_classes_too():
    label = np.zeros((40, 60), np.uint8)
    label[5:10, 5:10] = 1
    for clean in (label, np.zeros_like(label)):
        found = [corrupt(clean, "spurious", names=NAMES[:3], case=str(n), rate=2.0) for n in range(12)]
        assert np.mean([(noisy.label == 2).any() for noisy in found]) == pytest.approx(1 - np.exp(-2), abs=0.15)
        assert all(noisy.dice[2] == float(not (noisy.label == 2).any()) for noisy in found)
    assert not (corrupt(label, "spurious", names=NAMES[:3], target_dice=0.8).label == 2).any()
    assert not corrupt(label, "spurious", names=NAMES[:3], rate=0.0).label[20:].any()


# -- what all models promise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spacing", [None, (3.0, 1.0, 1.0)])
def test_the_target_is_met_by_every_class(name, spacing):
    found = []
    for case in range(4 if name == "swap" else 8):  # the slowest search by far
        noisy = corrupt(volume(), name, case=str(case), spacing=spacing, target_dice=0.8)
        for c, value in noisy.dice.items():
            assert value == pytest.approx(dice(noisy.label == c, volume() == c))
        found.append([noisy.dice[c] for c in (1, 2, 3)])
    whole_objects = name in ("missing", "swap", "personas")
    np.testing.assert_allclose(np.mean(found, axis=0), 0.8, atol=0.06 if whole_objects else 0.01)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"target_dice": 0.75}])
def test_noise_is_a_pure_function_of_seed_and_case(name, options):
    label = volume()
    one = corrupt(label, name, **options).label
    np.testing.assert_array_equal(one, corrupt(label, name, **options).label)
    cases, seeds = ("b", (1,)) if name == "swap" else ("bcd", (1, 2))
    differs = [(corrupt(label, name, case=c, **options).label != one).any() for c in cases]
    differs += [(corrupt(label, name, seed=s, **options).label != one).any() for s in seeds]
    assert sum(differs) >= len(differs) - 2
    assert any(differs)
    np.testing.assert_array_equal(label, volume())  # the map that came in is left alone


@pytest.mark.parametrize("name", MODELS)
def test_unknown_voxels_stay_unknown(name):
    label = volume()
    label[:, 30:34] = IGNORE
    noisy = corrupt(label, name, target_dice=0.7).label
    np.testing.assert_array_equal(noisy == IGNORE, label == IGNORE)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("missing", "swap", "personas")])
def test_nothing_vanishes(name):
    label = np.zeros((40, 40), np.uint8)
    label[19:22, 19:22] = 1
    options = {"markov": {"steps": 400}, "distance": {"level": (30.0, 30.0)}, "affine": {"shift": 90.0}}
    noisy = corrupt(label, name, names=NAMES[:2], over=0.0, **options.get(name, {})).label
    assert (noisy == 1).any()


@pytest.mark.parametrize("name", ["distance", "area_normalised", "markov"])
def test_bias_is_a_direction_that_all_classes_share(name):
    label = volume()
    ratios = {}
    for over in (0.0, 0.5, 1.0):
        for case in range(8):
            noisy = corrupt(label, name, case=str(case), over=over, target_dice=0.8).label
            ratios.setdefault(over, []).append([(noisy == c).sum() / (label == c).sum() for c in (1, 2, 3)])
    assert np.min(ratios[1.0]) > 1
    assert np.max(ratios[0.0]) < 1
    signs = np.sign(np.array(ratios[0.5]) - 1)
    assert set(signs.ravel()) == {-1.0, 1.0}
    assert (signs == signs[:, :1]).all()


def test_growth_is_into_background_and_takes_the_other_direction_where_there_is_none():
    label = np.zeros((50, 50), np.uint8)
    label[ellipse((50, 50), (16, 16))] = 2
    label[ellipse((50, 50), (10, 10))] = 1  # enclosed, as a ventricle by its wall
    noisy = corrupt(label, "distance", over=1.0, target_dice=0.8)
    assert noisy.dice[1] == pytest.approx(0.8, abs=0.02)
    assert noisy.dice[2] == pytest.approx(0.8, abs=0.02)
    assert (noisy.label == 1).sum() < (label == 1).sum()
    leap = corrupt(label, "distance", over=1.0, level=(20.0, 20.0)).label
    np.testing.assert_array_equal(leap == 1, label == 1)  # nothing beyond the wall
    free = corrupt(label, "distance", over=1.0, level=(2.0, 2.0), protect=False, order=(2, 1)).label
    assert (free == 1).sum() > (label == 1).sum()


def test_a_share_of_the_cases_is_touched():
    model = registry.build("noise", "distance", share=0.3)
    touched = [model.touches(str(n)) for n in range(400)]
    assert np.mean(touched) == pytest.approx(0.3, abs=0.06)
    for n in range(6):
        noisy = model.corrupt(volume(), case=str(n), names=NAMES).label
        assert (noisy != volume()).any() == touched[n]


def test_classes_may_differ_and_cases_too():
    options = {"target_dice": 0.9, "per_class": {"three": {"target_dice": 0.7, "over": 0.0}}}
    noisy = corrupt(volume(), "distance", over=1.0, **options)
    assert noisy.dice[1] == pytest.approx(0.9, abs=0.01)
    assert noisy.dice[3] == pytest.approx(0.7, abs=0.01)
    assert (noisy.label == 1).sum() > (volume() == 1).sum()
    assert (noisy.label == 3).sum() < (volume() == 3).sum()
    spread = [corrupt(volume(), "distance", case=str(n), target_dice=0.8, spread=0.1).dice[1] for n in range(12)]
    assert np.ptp(spread) > 0.08
    assert 0.69 < min(spread) <= max(spread) < 0.91


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_dice": 0.0}, "target_dice"),
        ({"over": 1.5}, "over"),
        ({"per_class": {"one": {"levle": 3}}}, "levle"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(RecipeError, match=said):
        registry.build("noise", "distance", **options)


def test_names_that_are_no_classes_are_refused():
    for name, options, said in (
        ("distance", {"per_class": {"liver": {}}}, "liver"),
        ("distance", {"order": (9,)}, "order"),
        ("swap", {"to": {"two": "liver"}, "probability": 1.0}, "liver"),
    ):
        with pytest.raises(RecipeError, match=said):
            corrupt(volume(), name, **options)
