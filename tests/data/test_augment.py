"""Augmentation against independent oracles; exact flips, turns and intensities are in test_sampling."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from labeleff.batch import IGNORE, Batch
from labeleff.data import augment
from labeleff.data.augment import Augment
from labeleff.testing import toy_geometry

SHAPES = [(15, 22), (9, 11, 14)]
NEUTRAL = [1.0, 0.0, 1.0, 0.0, 0.0]


def batch_of(shape, affine, intensity=None, *, given=None):
    """Smooth images, so that interpolations can be compared, and labels of blocks."""
    count = len(affine)
    generator = np.random.default_rng(0)
    image = generator.normal(size=(count, 2, *shape))
    image = ndimage.gaussian_filter(image, (0, 0, *[1.0] * len(shape))).astype(np.float32)
    label = torch.from_numpy(generator.integers(0, 4, (count, *shape)))
    geometry = toy_geometry(count, shape)._replace(
        affine=torch.stack([torch.as_tensor(a, dtype=torch.float32) for a in affine]),
        intensity=torch.tensor(intensity or [NEUTRAL] * count),
    )
    valid = torch.ones(count, 1, *shape, dtype=torch.bool)
    return Batch(torch.from_numpy(image), label, label if given is None else given, valid, geometry, extras={})


def drawn(spec, shape, seed):
    return augment.draw(spec, np.random.default_rng(seed), shape)


def row(batch, index):
    """One sample of a batch as a batch of its own."""
    part = slice(index, index + 1)
    geometry = type(batch.geometry)(*(t[part] for t in batch.geometry))
    label = batch.label[part]
    given = label if batch.given is batch.label else batch.given[part]
    return batch._replace(image=batch.image[part], label=label, given=given, valid=batch.valid[part], geometry=geometry)


def in_voxels(affine, shape):
    """The same map from output to input in voxel indices and array order: matrix [d, d] and offset [d]."""
    half = np.asarray(shape) / 2
    matrix = np.asarray(affine, float)[::-1, :-1][:, ::-1]
    matrix = matrix * half[:, None] / half[None, :]
    move = np.asarray(affine, float)[::-1, -1] * half
    middle = half - 0.5
    return matrix, middle + move - matrix @ middle


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_plane", [True, False])
def test_warps_are_those_of_scipy(shape, in_plane):
    spec = Augment(rotate=40.0, scale=0.2, shift=0.15, flip=(0, 1), in_plane=in_plane)
    batch = batch_of(shape, [drawn(spec, shape, seed)[0] for seed in range(4)])
    result = augment.apply(batch)
    for index in range(4):
        matrix, offset = in_voxels(batch.geometry.affine[index].numpy(), shape)
        for channel in range(2):
            source = np.pad(batch.image[index, channel].double().numpy(), 1)  # zeros meet the border as in grid_sample
            expected = ndimage.affine_transform(source, matrix, offset + 1, output_shape=shape, order=1)
            assert np.allclose(result.image[index, channel], expected, atol=2e-4)
        where = np.stack(np.indices(shape)).reshape(len(shape), -1)
        where = (matrix @ where + offset[:, None]).reshape(len(shape), *shape)
        clear = (np.abs(where - np.floor(where) - 0.5) > 1e-3).all(0)  # no tie between two voxels
        nearest = np.rint(where).astype(int)
        inside = np.logical_and.reduce([(n >= 0) & (n < length) for n, length in zip(nearest, shape, strict=True)])
        clipped = tuple(np.clip(n, 0, length - 1) for n, length in zip(nearest, shape, strict=True))
        expected = np.where(inside, batch.label[index].numpy()[clipped], IGNORE)
        assert np.array_equal(result.label[index].numpy()[clear], expected[clear])
        assert np.array_equal(result.valid[index, 0].numpy()[clear], inside[clear])
        assert 0 < inside.sum() < inside.size
        assert clear.mean() > 0.95


def test_ignore_and_padding_travel_with_the_voxels():
    batch = batch_of((6, 6), [np.array([[1.0, 0, 1 / 3], [0, 1.0, 0]])])  # one voxel along x
    label, valid = batch.label.clone(), batch.valid.clone()
    label[0, 2, 3], valid[0, 0, 4, 5] = IGNORE, False
    result = augment.apply(batch._replace(label=label, given=label, valid=valid))
    assert result.label[0, 2, 2] == IGNORE
    assert torch.nonzero(~result.valid[0, 0, :, :5]).tolist() == [[4, 4]]
    assert set(result.label[0, :, 5].tolist()) == {IGNORE}


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_without_geometry_keep_every_bit(shape):
    spec = Augment(rotate=20.0)
    still = np.eye(len(shape), len(shape) + 1)
    batch = batch_of(shape, [still, drawn(spec, shape, 1)[0], still])
    result = augment.apply(batch)
    for index in (0, 2):
        assert torch.equal(result.image[index], batch.image[index])
        assert torch.equal(result.label[index], batch.label[index])
    assert not torch.allclose(result.image[1], batch.image[1], atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("place", "value"), [(0, 1.5), (1, 0.5), (3, 0.3), (4, 1.0)])
def test_samples_without_intensity_keep_every_bit(shape, place, value):
    changed = NEUTRAL.copy()
    changed[place] = value
    still = [np.eye(len(shape), len(shape) + 1)] * 2
    batch = batch_of(shape, still, [NEUTRAL, changed])
    result = augment.apply(batch)
    assert torch.equal(result.image[0], batch.image[0])
    assert not torch.allclose(result.image[1], batch.image[1], atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_does_not_depend_on_its_neighbours(shape):
    spec = Augment(rotate=20.0, shift=0.1, gain=0.2, offset=0.2, gamma=0.3, noise=0.2)
    draws = [drawn(spec, shape, seed) for seed in range(3)]
    batch = batch_of(shape, [d[0] for d in draws], [d[1].tolist() for d in draws])
    together = augment.apply(batch)
    for index in range(3):
        alone = augment.apply(row(batch, index))
        assert torch.allclose(together.image[index], alone.image[0], atol=1e-6)
        assert torch.equal(together.label[index], alone.label[0])


def test_the_input_is_left_as_it_is():
    shape = SHAPES[0]
    affine, intensity = drawn(Augment(rotate=20.0, gain=0.2, noise=0.2, blur=1.0, gamma=0.3), shape, 2)
    batch = batch_of(shape, [affine], [intensity.tolist()])
    before = [t.clone() for t in batch[:4]]
    augment.apply(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, batch[:4], strict=True))


def test_given_labels_move_as_labels_do():
    shape, affine = SHAPES[0], [drawn(Augment(rotate=20.0, shift=0.1), SHAPES[0], 1)[0]]
    unedited = augment.apply(batch_of(shape, affine))
    assert unedited.given is unedited.label
    other = (batch_of(shape, affine).label + 1) % 4
    edited = augment.apply(batch_of(shape, affine, given=other))
    known = edited.label != IGNORE
    assert torch.equal(edited.given[known], (edited.label[known] + 1) % 4)
    assert (edited.given[~known] == IGNORE).all()
    assert torch.equal(edited.label, unedited.label)


@pytest.mark.parametrize("shape", SHAPES)
def test_replay_carries_a_prediction_along(shape):
    affine = [drawn(Augment(rotate=30.0, shift=0.2), shape, seed)[0] for seed in range(2)]
    batch = batch_of(shape, affine)
    one_hot = torch.nn.functional.one_hot(batch.label, 4).movedim(-1, 1)
    moved = augment.replay(one_hot, batch.geometry, mode="nearest")
    result = augment.apply(batch)
    inside = result.valid[:, 0]
    assert moved.dtype == one_hot.dtype
    assert torch.equal(moved.argmax(1)[inside], result.label[inside])
    assert torch.equal(moved.sum(1).bool(), inside)  # nothing outside
    still = batch_of(shape, [np.eye(len(shape), len(shape) + 1)])
    assert augment.replay(still.image, still.geometry) is still.image


def test_gradients_go_through_a_replay():
    batch = batch_of((6, 6), [np.array([[1.0, 0, 1 / 3], [0, 1.0, 0]])])
    image = batch.image.clone().requires_grad_()
    augment.replay(image, batch.geometry).sum().backward()
    expected = torch.ones_like(image)
    expected[..., 0] = 0  # moved out of the patch
    assert torch.allclose(image.grad, expected, atol=1e-5)


def test_draws_are_within_their_ranges_and_reach_them():
    spec = Augment(
        probability=0.5, rotate=20.0, scale=0.1, shift=0.05, gain=0.3, offset=0.4, gamma=0.2, noise=0.5, blur=1.5
    )
    draws = [drawn(spec, (16, 16), seed) for seed in range(600)]
    affine = np.stack([a for a, _ in draws]).astype(float)
    intensity = np.stack([i for _, i in draws])
    moved = (affine != np.eye(2, 3)).any((1, 2))
    assert 0.43 < moved.mean() < 0.57
    angle = np.rad2deg(np.arctan2(affine[moved, 0, 1], affine[moved, 0, 0]))
    size = 1 / np.sqrt(np.linalg.det(affine[moved, :, :2]))
    for values, low, high in [
        (angle, -20, 20),
        (size, 0.9, 1.1),
        (affine[moved, :, 2] / 2, -0.05, 0.05),
        (intensity[:, 0], 0.7, 1.3),
        (intensity[:, 1], -0.4, 0.4),
        (intensity[:, 2], 0.8, 1.2),
        (intensity[:, 3], 0.0, 0.5),
        (intensity[:, 4], 0.0, 1.5),
    ]:
        margin = 0.05 * (high - low)
        assert low - 1e-5 <= values.min() < low + margin
        assert high - margin < values.max() <= high + 1e-5


def test_volumes_turn_about_the_last_axis_only_unless_told():
    flat = drawn(Augment(rotate=30.0), (8, 8, 8), 0)[0]  # rows and columns z, y, x: the last array axis comes first
    assert np.allclose(flat[0], [1, 0, 0, 0])
    assert np.allclose(flat[1:, 0], 0)
    free = drawn(Augment(rotate=30.0, in_plane=False), (8, 8, 8), 0)[0]
    assert abs(free[0, 0] - 1) > 1e-3
    assert np.allclose(free[:, :3] @ free[:, :3].T, np.eye(3), atol=1e-5)


def test_quarter_turns_of_volumes_are_exact():
    found = set()
    for seed in range(30):
        batch = batch_of((7, 7, 5), [drawn(Augment(rot90=True), (7, 7, 5), seed)[0]])
        result = augment.apply(batch)
        turns = [k for k in range(4) if torch.equal(result.label, batch.label.rot90(k, (1, 2)))]
        assert len(turns) == 1
        assert torch.allclose(result.image, batch.image.rot90(turns[0], (2, 3)), atol=1e-5)
        assert result.valid.all()
        found |= set(turns)
    assert found == {0, 1, 2, 3}


def test_blur_is_that_of_scipy():
    for shape in ((31, 33), (17, 19, 21)):
        batch = batch_of(shape, [np.eye(len(shape), len(shape) + 1)], [[1.0, 0.0, 1.0, 0.0, 1.2]])
        result = augment.apply(batch).image
        expected = ndimage.gaussian_filter(batch.image.double().numpy(), (0, 0, *[1.2] * len(shape)), truncate=3.4)
        inner = (..., *[slice(5, -5)] * len(shape))  # borders are a matter of taste
        assert np.allclose(result[inner], expected[inner], atol=1e-4)
