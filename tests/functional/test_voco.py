"""Contrast of volumes: boxes counted voxel by voxel, losses in loops of floats, and the values of states that say nothing."""

import itertools
import math

import numpy as np
import pytest
import torch

from labeleff.errors import ShapeError
from labeleff.functional.voco import (
    base_regularisation,
    cosines,
    draw_boxes,
    grid_boxes,
    inter_volume_loss,
    overlap_labels,
    position_loss,
)

FORMS = ["v0", "v1", "v2"]
EPS = 1e-6


def embeddings(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(crops=3, grid=(3, 3), shape=(24, 30), seed=0, **options):
    """Cosines of both signs and overlaps of crops drawn over a grid."""
    bases = grid_boxes(shape, grid)
    boxes = draw_boxes(bases, crops, generator=torch.Generator().manual_seed(seed), **options)
    overlap = overlap_labels(boxes, bases)
    return embeddings(*overlap.shape, seed=seed).tanh(), overlap


# -- geometry ---------------------------------------------------------------------------------------------------------------


def counted(crop, base, shape):
    """The share of a crop inside a base, by painting both and counting voxels."""
    masks = []
    for start, stop in (crop.tolist(), base.tolist()):
        mask = np.zeros(shape, bool)
        mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
        masks.append(mask)
    return (masks[0] & masks[1]).sum() / masks[0].sum()


CANVASES = [((24, 24), (4, 4)), ((23, 31), (3, 4)), ((17, 26, 9), (3, 4, 1)), ((12, 15, 10), (2, 3, 2))]


@pytest.mark.parametrize(("shape", "grid"), CANVASES)
@pytest.mark.parametrize("reach_edge", [True, False])
def test_overlap_by_counting_voxels(shape, grid, reach_edge):
    bases = grid_boxes(shape, grid)
    crops = draw_boxes(bases, 30, generator=torch.Generator().manual_seed(1), reach_edge=reach_edge)
    found = overlap_labels(crops, bases)
    assert found.dtype == torch.float32
    for (m, crop), (k, base) in itertools.product(enumerate(crops), enumerate(bases)):
        share = counted(crop, base, shape)
        assert float(found[m, k]) == pytest.approx(share, abs=1e-6)
        assert (found[m, k] == 0) == (share == 0)  # what is 0 is a negative
    torch.testing.assert_close(found.sum(1), torch.ones(30))
    gridded = sum(n > 1 for n in grid)
    assert int((found > 0).sum(1).max()) == 2**gridded


def test_overlap_of_crops_larger_than_cells_and_outside():
    crops = torch.tensor([[[0, 0], [4, 8]], [[-2, 0], [2, 4]], [[20, 20], [24, 24]]])
    bases = torch.tensor([[[0, 0], [4, 4]], [[0, 4], [4, 8]]])
    np.testing.assert_allclose(overlap_labels(crops, bases), [[0.5, 0.5], [0.5, 0], [0, 0]])
    both = overlap_labels(torch.stack([crops, crops.flip(0)]), bases)
    np.testing.assert_allclose(both[1], overlap_labels(crops, bases).flip(0))
    half = torch.tensor([[[0.5, 0.0], [4.5, 4.0]]])
    np.testing.assert_allclose(overlap_labels(half, bases.float()), [[3.5 / 4, 0]])


def test_cells_of_the_authors():
    bases = grid_boxes((384, 384, 96), (4, 4, 1))
    for i, j in itertools.product(range(4), range(4)):  # base i n + j: i along the first axis
        assert bases[i * 4 + j].tolist() == [[96 * i, 96 * j, 0], [96 * (i + 1), 96 * (j + 1), 96]]


def test_a_grid_that_does_not_divide_lies_in_the_middle():
    assert grid_boxes((11, 7), (3, 1)).tolist() == [[[1, 0], [4, 7]], [[4, 0], [7, 7]], [[7, 0], [10, 7]]]


@pytest.mark.parametrize("reach_edge", [True, False])
def test_crops_are_drawn_evenly_and_stay_inside(reach_edge):
    bases = grid_boxes((9, 13, 5), (2, 3, 1))  # cells of 4 x 4 x 5; the grid covers 8 and 12, from 0 on
    starts = draw_boxes(bases, 4000, generator=torch.Generator().manual_seed(0), reach_edge=reach_edge)[:, 0]
    for axis, places in enumerate((5, 9, 1)):
        usual = max(1, places - (not reach_edge))
        values, counts = starts[:, axis].unique(return_counts=True)
        assert values.tolist() == list(range(usual))
        assert (counts / 4000 - 1 / usual).abs().max() < 0.03


# -- the loss of positions --------------------------------------------------------------------------------------------------


def by_hand(cosine, overlap, form, told=None):
    """The table of the three generations, one entry at a time."""
    cosine, overlap = cosine.double().numpy(), overlap.double().numpy()
    tops, weights, costs, zeros = [], [], [], 0
    for m, k in np.ndindex(cosine.shape):
        s, y = max(0.0, cosine[m, k]), overlap[m, k]
        if y > 0:
            weight = 1.0 if form == "v0" else y
            tops.append(-weight * math.log(1 - abs(y - s) + EPS))
            weights.append(weight)
        elif told is None or told[k]:
            costs.append(-math.log(1 - s + EPS) if form == "v2" else s**2)
            zeros += 1
    return math.fsum(tops) / (math.fsum(weights) + EPS) + math.fsum(costs) / (zeros + EPS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "grid"), CANVASES)
def test_position_loss_in_loops(form, shape, grid):
    cosine, overlap = labelled(grid=grid, shape=shape)
    found = position_loss(cosine, overlap, form=form)
    assert found.ndim == 0
    assert float(found) == pytest.approx(by_hand(cosine, overlap, form), rel=1e-5)
    told = [k % 3 != 0 for k in range(overlap.shape[1])]
    masked = position_loss(cosine, overlap, form=form, counted=torch.tensor(told))
    assert float(masked) == pytest.approx(by_hand(cosine, overlap, form, told), rel=1e-5)


def test_position_loss_of_one_crop_by_hand():
    cosine, overlap = torch.tensor([[0.5, -0.3, 0.2]]), torch.tensor([[0.75, 0.25, 0.0]])
    near, far = -math.log(0.75), -math.log(0.75)  # |0.75 - 0.5| and |0.25 - 0|
    assert float(position_loss(cosine, overlap, form="v0")) == pytest.approx((near + far) / 2 + 0.04, abs=1e-5)
    assert float(position_loss(cosine, overlap, form="v1")) == pytest.approx(0.75 * near + 0.25 * far + 0.04, abs=1e-5)
    last = 0.75 * near + 0.25 * far - math.log(0.8)
    assert float(position_loss(cosine, overlap, form="v2")) == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_several_volumes_are_averaged(form):
    pairs = [labelled(seed=seed) for seed in range(3)]
    cosine, overlap = (torch.stack(part) for part in zip(*pairs, strict=True))
    told = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    expected = np.mean([by_hand(*pair, form, own) for pair, own in zip(pairs, told.tolist(), strict=True)])
    assert float(position_loss(cosine, overlap, form=form, counted=told)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("n", "cell", "flat"), [(4, 96, 0.715), (3, 64, 0.711)])
def test_value_where_nothing_is_told_apart(n, cell, flat):
    """The reference values, of crops as the authors draw them; 4 Σ 1 / (k (k + 2)²) = 0.710 where voxels are infinitely small."""
    _, overlap = labelled(20000, (n, n), (cell * n, cell * n), reach_edge=False)
    found = [float(position_loss(torch.zeros_like(overlap), overlap, form=form)) for form in FORMS]
    assert found[0] == pytest.approx(0.36, abs=0.01)
    assert found[1:] == pytest.approx([flat, flat], abs=0.01)
    fine = 4 * math.fsum(1 / (k * (k + 2) ** 2) for k in range(1, 100000))
    assert found[1] == pytest.approx(fine, abs=0.01)


def test_values_where_everything_is_one():
    _, overlap = labelled(20000, (3, 3), (192, 192))
    same = torch.ones_like(overlap)
    positive = float(position_loss(same, overlap, form="v1", counted=torch.zeros(9, dtype=torch.bool)))
    assert positive == pytest.approx(1.0, abs=0.02)
    assert float(position_loss(same, overlap, form="v1")) - positive == pytest.approx(1.0, abs=1e-3)
    assert float(position_loss(same, overlap, form="v2")) - positive == pytest.approx(13.8, abs=0.02)
    assert float(base_regularisation(torch.ones(9, 5))) == pytest.approx(1.0)


@pytest.mark.parametrize("form", FORMS)
def test_the_right_answer_costs_nothing(form):
    _, overlap = labelled()
    assert float(position_loss(overlap.clone(), overlap, form=form)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_all_or_no_overlap_leaves_one_part(form):
    cosine = torch.full((2, 3), 0.5)
    none = position_loss(cosine, torch.zeros(2, 3), form=form)
    assert float(none) == pytest.approx(-math.log(0.5) if form == "v2" else 0.25, abs=1e-5)
    everywhere = position_loss(cosine, torch.full((2, 3), 1 / 3), form=form)
    assert float(everywhere) == pytest.approx(-math.log(1 - 1 / 6), abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1.002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_the_extremes(form, value, dtype):
    _, overlap = labelled()
    cosine = torch.full(overlap.shape, value, dtype=dtype, requires_grad=True)
    found = position_loss(cosine, overlap, form=form)
    found.backward()
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found))
    assert bool(torch.isfinite(cosine.grad).all())


def test_negative_cosines_have_no_gradient_and_overlap_none():
    cosine, overlap = labelled()
    cosine, overlap = cosine.requires_grad_(), overlap.requires_grad_()
    position_loss(cosine, overlap).backward()
    assert bool((cosine.grad[cosine < 0] == 0).all())
    assert bool((cosine.grad[cosine > 0] != 0).all())
    assert overlap.grad is None


# -- cosines, bases and other volumes ---------------------------------------------------------------------------------------


def cosine_by_hand(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a * a) * sum(b * b))


def test_cosines_do_not_feel_a_scale():
    one, other = embeddings(3, 7), embeddings(4, 7, seed=1)
    found = cosines(one, other)
    for i, j in np.ndindex(3, 4):
        assert float(found[i, j]) == pytest.approx(cosine_by_hand(one[i], other[j]), abs=1e-6)
    torch.testing.assert_close(cosines(1e-3 * one, 1e3 * other), found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cosines(one, other), found)


def test_embeddings_of_zeros_are_orthogonal_to_all():
    one = torch.zeros(2, 5, requires_grad=True)
    found = cosines(one, embeddings(3, 5))
    assert bool((found == 0).all())
    (position_loss(found, torch.full((2, 3), 0.2)) + base_regularisation(one)).backward()
    assert bool(torch.isfinite(one.grad).all())


def regularisation_by_hand(z, told=None):
    pairs = [(i, j) for i, j in itertools.combinations(range(len(z)), 2) if told is None or (told[i] and told[j])]
    return math.fsum(max(0.0, cosine_by_hand(z[i], z[j])) ** 2 for i, j in pairs) / max(1, len(pairs))


@pytest.mark.parametrize("detach", [False, True])
def test_regularisation_in_loops(detach):
    z = embeddings(3, 6, 4)
    told = torch.tensor([[True] * 6, [True, False] * 3, [False] * 5 + [True]])
    found = base_regularisation(z, detach_second=detach)
    assert float(found) == pytest.approx(np.mean([regularisation_by_hand(own) for own in z]), rel=1e-5)
    masked = np.mean([regularisation_by_hand(own, some.tolist()) for own, some in zip(z, told, strict=True)])
    assert float(base_regularisation(z, detach_second=detach, counted=told)) == pytest.approx(masked, rel=1e-5)


def test_regularisation_of_orthogonal_and_of_equal_bases():
    assert float(base_regularisation(torch.eye(4))) == 0
    assert float(base_regularisation(embeddings(1, 5).expand(4, 5))) == pytest.approx(1)
    assert float(base_regularisation(torch.tensor([[1.0, 0], [1, 1], [-1, 0]]))) == pytest.approx(0.5 / 3)  # one at 45°


def test_of_two_bases_only_the_first_is_moved_where_the_second_is_detached():
    gradients = []
    for detach in (False, True):
        z = embeddings(4, 5).requires_grad_()
        base_regularisation(z, detach_second=detach).backward()
        gradients.append(z.grad)
    both, first = gradients
    assert bool((both.abs().sum(1) > 0).all())
    assert bool((first[-1] == 0).all())
    torch.testing.assert_close(first[0], both[0])  # the first base is never the second of a pair
    assert bool((first[1] != both[1]).any())


def test_no_pair_of_bases_counts():
    z = embeddings(3, 5).requires_grad_()
    found = base_regularisation(z, counted=torch.tensor([True, False, False]))
    found.backward()
    assert float(found.detach()) == 0
    assert bool((z.grad == 0).all())


def test_between_volumes_in_loops():
    parts = [embeddings(*shape, seed=seed) for seed, shape in enumerate([(2, 3), (4, 3), (2, 3), (4, 3)])]
    x_student, q_student, x_teacher, q_teacher = (part.requires_grad_() for part in parts)
    found = inter_volume_loss(x_student, q_student, x_teacher, q_teacher)
    found.backward()
    plain = [part.detach() for part in parts]
    cosine = torch.tensor([[cosine_by_hand(x, q) for q in plain[1]] for x in plain[0]])
    target = torch.tensor([[max(0.0, cosine_by_hand(x, q)) for q in plain[3]] for x in plain[2]])
    assert bool((target == 0).any())
    assert bool((target > 0).any())
    assert float(found.detach()) == pytest.approx(by_hand(cosine, target, "v2"), rel=1e-4)
    assert x_teacher.grad is None
    assert q_teacher.grad is None
    assert bool((x_student.grad != 0).any())
    assert bool((q_student.grad != 0).any())


def test_between_equal_students_and_teachers_only_the_logarithm_is_left():
    x, q = embeddings(2, 3), embeddings(4, 3, seed=1)
    assert float(inter_volume_loss(x, q, x, q)) == pytest.approx(0, abs=1e-5)


# -- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlap_labels(torch.zeros(2, 2), torch.zeros(1, 2, 2)), "boxes"),
        (lambda: overlap_labels(torch.zeros(2, 2, 3), torch.zeros(1, 2, 2)), "boxes"),
        (lambda: overlap_labels(torch.zeros(2, 2, 2), torch.ones(1, 2, 2)), "empty"),
        (lambda: grid_boxes((8, 8), (9, 1)), "does not fit"),
        (lambda: grid_boxes((8, 8), (2,)), "does not fit"),
        (lambda: grid_boxes((8, 8), (0, 2)), "does not fit"),
        (lambda: position_loss(torch.zeros(2, 3), torch.zeros(3, 2)), "both must be"),
        (lambda: position_loss(torch.zeros(2, 3), torch.zeros(2, 3), form="v3"), "v0, v1 or v2"),
        (lambda: base_regularisation(torch.zeros(1, 4)), "finer grid"),
        (lambda: cosines(torch.zeros(2, 3), torch.zeros(2, 4)), "are needed"),
        (lambda: inter_volume_loss(*[torch.zeros(2, n) for n in (3, 3, 3, 4)]), "are needed"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ShapeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
