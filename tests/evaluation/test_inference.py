"""Whole cases from patches."""

import numpy as np
import pytest
import torch
from torch import nn

from labeleff.evaluation.inference import evaluating, predict_volume, segment


class Threshold(nn.Module):
    """Looks at one voxel at a time, so that windows cannot matter; remembers the sizes it saw."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, image):
        self.shapes.append(tuple(image.shape))
        return torch.cat([-image, image], 1)


def expected(image):
    return torch.stack([-image[0], image[0]]).softmax(0)


@pytest.mark.parametrize(
    ("shape", "patch", "slice_axis"),
    [
        ((20, 30), (16, 16), None),
        ((9, 30), (16, 16), None),
        ((16, 16), (16, 16), None),
        ((12, 9, 20), (8, 8, 8), None),
        ((5, 9, 7), (8, 8, 8), None),
        ((6, 20, 18), (16, 16), 0),
        ((20, 6, 18), (16, 16), 1),
        ((14, 13, 6), (16, 16), 2),
    ],
)
def test_a_pointwise_network_is_applied_pointwise(shape, patch, slice_axis):
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    network = Threshold()
    probs = predict_volume(
        network, image, ndim=len(patch), patch=patch, slice_axis=slice_axis, num_classes=2, window_batch=3
    )
    assert probs.shape == (2, *shape)
    assert torch.allclose(probs, expected(image), atol=1e-5)
    assert all(s[0] <= 3 and s[2:] == patch for s in network.shapes)


def test_probabilities_are_averaged_and_stay_probabilities():
    class Window(nn.Module):
        """Says something else in every window."""

        def forward(self, image):
            mean = image.mean(dim=(2, 3), keepdim=True).expand(-1, 1, *image.shape[2:])
            return torch.cat([mean, -mean], 1) * 5

    image = torch.randn(1, 24, 24)
    probs = predict_volume(Window(), image, ndim=2, patch=(16, 16), num_classes=2)
    assert torch.allclose(probs.sum(0), torch.ones(24, 24), atol=1e-5)


def test_regions_are_sigmoids():
    image = torch.randn(1, 8, 8)
    probs = predict_volume(Threshold(), image, ndim=2, patch=(8, 8), num_classes=2, exclusive=False)
    assert torch.allclose(probs, torch.stack([-image[0], image[0]]).sigmoid(), atol=1e-6)


def test_modes_are_restored():
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1), Threshold())
    network[0].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        assert torch.is_inference_mode_enabled()
    assert [m.training for m in network] == [False, True, True]


def test_segment():
    probs = torch.tensor([[0.5, 0.2, 0.2, 0.9, 0.2], [0.5, 0.8, 0.8, 0.1, 0.8]])
    assert segment(probs).tolist() == [0, 1, 1, 0, 1]
    assert segment(probs, largest_component=True).tolist() == [0, 1, 1, 0, 0]
    assert segment(probs).dtype == np.uint8


def test_a_slice_axis_is_needed():
    with pytest.raises(ValueError, match="slice_axis"):
        predict_volume(Threshold(), torch.zeros(1, 4, 4, 4), ndim=2, patch=(4, 4), num_classes=2)
