"""Largest components against scikit-image, and hard labels against argmax."""

import numpy as np
import pytest
import torch
from skimage.measure import label as components_of

from labeleff.batch import IGNORE
from labeleff.errors import ShapeError
from labeleff.functional.regions import _largest_by_propagation, hard_labels, largest_components


def by_skimage(maps, classes, connectivity):
    result = maps.copy()
    for index, sample in enumerate(maps):
        for k in range(1, classes):
            parts = components_of(sample == k, connectivity=connectivity)
            if parts.max() == 0:
                continue
            sizes = np.bincount(parts.ravel())[1:]
            result[index][(sample == k) & (parts != 1 + sizes.argmax())] = 0
    return result


@pytest.mark.parametrize("shape", [(40,), (20, 24), (10, 12, 11)])
@pytest.mark.parametrize("classes", [2, 4])
def test_equal_to_skimage(shape, classes):
    generator = np.random.default_rng(len(shape))
    maps = generator.integers(0, classes, (3, *shape))
    maps[generator.random(maps.shape) < 0.1] = IGNORE
    for connectivity in range(1, len(shape) + 1):
        found = largest_components(torch.from_numpy(maps), classes, connectivity=connectivity).numpy()
        assert np.array_equal(found, by_skimage(maps, classes, connectivity))
    full = largest_components(torch.from_numpy(maps), classes).numpy()
    assert np.array_equal(full, by_skimage(maps, classes, len(shape)))


@pytest.mark.parametrize("density", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("shape", [(300,), (40, 50), (16, 15, 14)])
def test_what_runs_on_a_gpu_is_what_runs_on_a_cpu(shape, density):
    generator = np.random.default_rng(int(100 * density))
    maps = generator.integers(1, 5, (3, *shape)) * (generator.random((3, *shape)) < density)
    maps[generator.random(maps.shape) < 0.05] = IGNORE
    label = torch.from_numpy(maps)
    for reach in range(1, len(shape) + 1):
        for classes in (None, [1, 3]):
            # the fifth class is left alone
            expected = largest_components(label, 4, connectivity=reach, classes=classes)
            assert torch.equal(_largest_by_propagation(label, 4, reach, classes), expected)
    snake = torch.zeros(1, 65, 65, dtype=torch.uint8)  # one long line, told from end to end
    snake[0, ::2], snake[0, 1::4, -1], snake[0, 3::4, 0] = 1, 1, 1
    snake[0, 40, 30] = 0
    assert torch.equal(_largest_by_propagation(snake, 2, 1, None), largest_components(snake, 2, connectivity=1))


def test_ties_go_to_the_first_in_raster_order_and_unknown_stays():
    row = torch.tensor([[[1, 0, 1, 0, IGNORE, 1, 0]]])
    assert largest_components(row, 2).tolist() == [[[1, 0, 0, 0, IGNORE, 0, 0]]]


def test_corners_join_only_when_asked():
    square = torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 0]]])
    assert int(largest_components(square, 2).sum()) == 2
    assert largest_components(square, 2, connectivity=1).tolist() == [[[1, 0, 0], [0, 0, 0], [0, 0, 0]]]


def test_chosen_classes_only_and_the_input_is_left_alone():
    label = torch.tensor([[[1, 0, 1, 1, 2, 0, 2]]])
    kept = label.clone()
    assert largest_components(label, 3, classes=[1]).tolist() == [[[0, 0, 1, 1, 2, 0, 2]]]
    assert torch.equal(label, kept)
    assert largest_components(label.to(torch.uint8), 3).dtype == torch.uint8


@pytest.mark.parametrize(
    ("label", "connectivity"),
    [(torch.zeros(3), 1), (torch.zeros(1, 3, 3), 1), (torch.zeros(1, 3).long(), 2), (torch.zeros(1, 3, 3).long(), 3)],
)
def test_wrong_use_is_refused(label, connectivity):
    with pytest.raises(ShapeError):
        largest_components(label, 2, connectivity=connectivity)


def test_hard_labels_are_argmax_with_the_lowest_of_equals():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, 7)
    assert torch.equal(hard_labels(logits), logits.argmax(1))
    assert hard_labels(torch.ones(1, 3, 4)).tolist() == [[0, 0, 0, 0]]
    assert hard_labels(torch.tensor([[[0.0], [2.0], [2.0]]])).tolist() == [[1]]
