"""Crops and intensity views, read back from images whose values say where they come from."""

import numpy as np
import pytest
import torch

from labeleff.errors import ShapeError
from labeleff.functional.image_views import random_crop, random_intensity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(count):
    return [generator(seed) for seed in range(count)]


def places(shape, count):
    """Return images whose channels are the coordinates of a voxel's middle, as shares of the axes."""
    axes = [(torch.arange(n) + 0.5) / n for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(count, -1, *[-1] * len(shape))


@pytest.mark.parametrize("shape", [(40, 24), (16, 20, 24)])
def test_a_crop_is_a_window_enlarged(shape):
    share, count = 0.4, 200 if len(shape) == 2 else 40
    view = random_crop(places(shape, count), share, generators=generators(count))
    assert view.shape == (count, len(shape), *shape)
    corners = []
    for axis, n in enumerate(shape):
        line = view[:, axis].movedim(axis + 1, 1).flatten(2)
        assert (line - line[:, :, :1]).abs().max() < 1e-5  # it changes along its own axis alone
        line = line[:, :, 0]
        steps = line.diff(dim=1)[:, 2:-2]
        np.testing.assert_allclose(steps, share / n, atol=1e-5)  # resized linearly
        middle = line[:, n // 2 - 1 : n // 2 + 1].mean(1)
        corners.append(middle - share / 2)
    corners = torch.stack(corners, 1)
    assert corners.min() > -1e-4
    assert corners.max() < 1 - share + 1e-4
    for own in corners.t():
        assert own.min() < 0.1 * (1 - share)
        assert own.max() > 0.9 * (1 - share)
    assert abs(np.corrcoef(corners[:, 0], corners[:, 1])[0, 1]) < 0.35  # every axis, and every image, by itself
    assert len(corners.unique(dim=0)) == count
    again = random_crop(
        places(shape, 2), share, generators=generators(3)[1:]
    )  # by its own generator, whoever is beside it
    torch.testing.assert_close(again, view[1:3])


def test_the_whole_image_is_the_image():
    image = torch.randn(3, 2, 9, 8, generator=generator(1))
    torch.testing.assert_close(random_crop(image, 1.0, generators=generators(3)), image)
    with pytest.raises(ShapeError, match=r"share is 0; .* \(0, 1\]"):
        random_crop(image, 0, generators=generators(3))


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 6)])
def test_intensity_is_shifted_then_stretched_about_the_mean(shape):
    image = torch.randn(400, 2, *shape, generator=generator(1)) + 3
    view = random_intensity(image, 0.3, 0.2, generators=generators(400))
    old, new = image.flatten(2).double(), view.flatten(2).double()
    shift = new.mean(2) - old.mean(2)
    factor = new.std(2) / old.std(2)
    np.testing.assert_allclose(shift[:, 0], shift[:, 1], atol=1e-5)  # channels of an image alike
    np.testing.assert_allclose(factor[:, 0], factor[:, 1], atol=1e-5)
    expected = old.mean(2, keepdim=True) + shift[..., None] + factor[..., None] * (old - old.mean(2, keepdim=True))
    np.testing.assert_allclose(new, expected, atol=1e-5)
    for draws, low, high in ((shift[:, 0], -0.3, 0.3), (factor[:, 0], 0.8, 1.2)):
        assert low - 1e-5 <= draws.min() < low + 0.05 * (high - low)
        assert high + 1e-5 >= draws.max() > high - 0.05 * (high - low)
        assert len(draws.unique()) == 400
    assert abs(np.corrcoef(shift[:, 0], factor[:, 0])[0, 1]) < 0.2
    clipped = random_intensity(image, 0.3, 0.2, clip=(2.5, 4.0), generators=generators(400))
    torch.testing.assert_close(clipped, view.clamp(2.5, 4.0))
    torch.testing.assert_close(random_intensity(image, 0.0, 0.0, generators=generators(400)), image)
