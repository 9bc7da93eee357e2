"""Confidence, the autoencoder's loss and spoilt label maps, against loops of Python floats and scipy's morphology."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.morphology import disk

from labeleff.functional.anatomical import (
    OPERATIONS,
    _reshaped,
    corrupt_labels,
    denoising_loss,
    reconstruction_confidence,
)

SHAPES = [(6, 5), (3, 2, 4)]
SCIPY = {
    "erode": lambda mask, where: ndimage.binary_erosion(mask, where, border_value=1),
    "dilate": ndimage.binary_dilation,
    "open": lambda mask, where: ndimage.binary_dilation(ndimage.binary_erosion(mask, where, border_value=1), where),
    "close": lambda mask, where: ndimage.binary_erosion(ndimage.binary_dilation(mask, where), where, border_value=1),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2)


def blobs(*shape, classes=4, seed=0):
    """A smooth map of classes."""
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    edges = np.quantile(values, np.linspace(0, 1, classes + 1)[1:-1])
    return torch.from_numpy(np.digitize(values, edges))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_confidence(shape, gamma):
    r, q = randn(2, 3, *shape).sigmoid(), randn(2, 3, *shape, seed=1).softmax(1)
    found = reconstruction_confidence(r, q, gamma=gamma)
    for place in np.ndindex(2, 3, *shape):
        assert float(found[place]) == pytest.approx(math.exp(-gamma * (float(r[place]) - float(q[place])) ** 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_loss(shape):
    logits = randn(2, 3, *shape)
    label = torch.randint(3, (2, *shape), generator=generator())
    label[0, 1] = 255
    s = 1 / (1 + np.exp(-logits.double().numpy()))
    error, count, overlap, sizes = 0.0, 0, [0.0] * 3, [0.0] * 3
    for b, *voxel in np.ndindex(2, *shape):
        true = int(label[(b, *voxel)])
        if true == 255:
            continue
        for k in range(3):
            y, value = float(k == true), s[(b, k, *voxel)]
            error, count = error + (value - y) ** 2, count + 1
            overlap[k] += 2 * value * y
            sizes[k] += value**2 + y**2
    dice = 1 - sum((overlap[k] + 1e-5) / (sizes[k] + 1e-5) for k in (1, 2)) / 2
    assert float(denoising_loss(logits, label)) == pytest.approx((error / count + dice) / 2, rel=1e-5)


def test_denoising_loss_where_nothing_is_known():
    logits = randn(2, 3, 4, 4).requires_grad_()
    loss = denoising_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("radius", [1, 2, 4])
def test_outline_of_one_class(operation, radius):
    label = blobs(3, 32, 40)
    classes = torch.tensor([1, 2, 3])
    found = _reshaped(label, classes, operation, radius).numpy()
    for number, k in enumerate((1, 2, 3)):
        old = label[number].numpy()
        made = SCIPY[operation](old == k, disk(radius))
        wanted = np.where((old == k) & ~made, 0, old)
        assert np.array_equal(found[number], np.where(made, k, wanted))
    assert not np.array_equal(found, label.numpy())


def test_swapped_voxels_come_from_where_they_may():
    label = blobs(40, 48, classes=3)[None]
    old, new = label[0].numpy(), corrupt_labels(label, 3, swap=1, morph=0, generator=generator())[0].numpy()
    cross = ndimage.generate_binary_structure(2, 1)
    edge = ndimage.grey_dilation(old, footprint=cross) != ndimage.grey_erosion(old, footprint=cross)
    lines = np.zeros((17, 17), bool)
    for step in (*range(-8, -2), *range(3, 9)):
        lines[8 + step, 8] = lines[8, 8 + step] = True
    near_edge = ndimage.binary_dilation(edge, lines)
    changed = old != new
    assert changed.sum() >= 5
    assert not (changed & ~edge & ~near_edge).any()
    for row, column in np.argwhere(changed):
        reach = np.pad(old, 8, constant_values=-1)[row : row + 17, column : column + 17]
        assert new[row, column] in reach[lines]
    assert changed.sum() <= 0.4 * edge.sum()  # a tenth of the boundary, two voxels each


@pytest.mark.parametrize("shape", [(6, 24, 32), (2, 24, 32, 9)])
def test_shares_of_slices(shape):
    label = blobs(*shape)
    assert torch.equal(corrupt_labels(label, 4, swap=0, morph=0, generator=generator()), label)
    slices = [label[b] for b in range(6)] if len(shape) == 3 else [label[b, ..., z] for b in range(2) for z in range(9)]
    touched = 0
    for seed in range(20):
        spoilt = corrupt_labels(label, 4, swap=0.2, morph=0, generator=generator(seed))
        made = (
            [spoilt[b] for b in range(6)]
            if len(shape) == 3
            else [spoilt[b, ..., z] for b in range(2) for z in range(9)]
        )
        touched += sum(not torch.equal(a, b) for a, b in zip(slices, made, strict=True))
    drawn = 20 * len(slices)
    assert abs(touched / drawn - 0.2) < 4 * math.sqrt(0.16 / drawn)


def test_unknown_voxels_stay_where_they_are():
    label = blobs(8, 24, 32)
    label[:, 5:9, 8:20] = 255
    spoilt = corrupt_labels(label, 4, swap=1, morph=1, generator=generator())
    assert torch.equal(spoilt == 255, label == 255)
    assert not torch.equal(spoilt, label)
    again = corrupt_labels(label, 4, swap=1, morph=1, generator=generator())
    assert torch.equal(spoilt, again)
