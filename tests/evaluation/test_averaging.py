"""Means over sizes and mirror images, against passes made by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from labeleff.batch import Task
from labeleff.evaluation.averaging import Averaged
from labeleff.evaluation.inference import predict_volume


class Ramp(nn.Module):
    """Two classes whose logits depend on the place, so that mirrors and sizes tell."""

    def forward(self, image):
        place = torch.linspace(-1, 1, image.shape[-1])
        return torch.cat([image * place, image.square() + place], 1)


def task(ndim=2, *, exclusive=True):
    return Task(ndim=ndim, channels=1, classes=("background", "a"), exclusive=exclusive)


def test_one_look_is_the_network():
    image = torch.randn(2, 1, 6, 8)
    assert torch.allclose(Averaged(Ramp(), task())(image).softmax(1), Ramp()(image).softmax(1), atol=1e-6)


@pytest.mark.parametrize("exclusive", [True, False])
def test_mean_of_probabilities_over_all_mirror_images(exclusive):
    image, network = torch.randn(1, 1, 6, 8), Ramp()
    turn = (lambda z: z.softmax(1)) if exclusive else torch.sigmoid
    by_hand = [turn(network(image.flip(axes)).flip(axes)) for axes in ([], [2], [3], [2, 3])]
    found = turn(Averaged(network, task(exclusive=exclusive), flips=(0, 1))(image))
    assert torch.allclose(found, torch.stack(by_hand).mean(0), atol=1e-6)


def test_mean_of_logits_over_sizes():
    image, network = torch.randn(1, 1, 8, 8), Ramp()
    by_hand = [network(image)]
    for size in ((6, 6), (12, 12)):
        small = F.interpolate(image, size, mode="bilinear", align_corners=True)
        by_hand.append(F.interpolate(network(small), (8, 8), mode="bilinear", align_corners=True))
    found = Averaged(network, task(), scales=(0.75, 1.0, 1.5), combine="logits")(image)
    assert torch.allclose(found, torch.stack(by_hand).mean(0), atol=1e-6)


def test_axes_that_are_kept_are_not_resized():
    seen = []

    class Spy(Ramp):
        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            return super().forward(image)

    Averaged(Spy(), task(3), scales=(0.5, 1.0), kept=(0,))(torch.randn(1, 1, 4, 8, 8))
    assert set(seen) == {(4, 4, 4), (4, 8, 8)}


def test_a_mirror_symmetric_answer_for_a_whole_case():
    """A case and its mirror image get mirrored answers from any network, where the windows lie alike in both."""
    image = torch.randn(1, 5, 24)
    kind = {"ndim": 2, "patch": (8, 8), "num_classes": 2}
    looking = Averaged(Ramp(), task(), flips=(1,))
    one = predict_volume(looking, image, **kind)
    other = predict_volume(looking, image.flip(2), **kind).flip(2)
    np.testing.assert_allclose(one.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert not np.allclose(one, predict_volume(Ramp(), image, **kind), atol=1e-2)
