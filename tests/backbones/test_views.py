"""Views against numpy's own transposes, turns and flips."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from labeleff import registry
from labeleff.backbones.outputs import nearest_size
from labeleff.backbones.views import (
    Ensemble,
    View,
    ViewNetwork,
    check_views,
    flip,
    identity,
    rotation,
    standard_views,
    transposition,
)
from labeleff.batch import Task
from labeleff.errors import ShapeError

SIZES = {2: (3, 5), 3: (3, 4, 6)}


def every_view(ndim):
    signs = [f for n in range(ndim + 1) for f in itertools.combinations(range(ndim), n)]
    return [View(axes, flipped) for axes in itertools.permutations(range(ndim)) for flipped in signs]


def image(ndim):
    return torch.randn(2, 2, *SIZES[ndim], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("ndim", [2, 3])
def test_inverse_undoes_every_view_to_the_bit(ndim):
    x = image(ndim)
    assert len({view.name for view in every_view(ndim)}) == {2: 8, 3: 48}[ndim]
    for view in every_view(ndim):
        seen = view.apply(x)
        assert tuple(seen.shape[2:]) == view.shape(x.shape[2:])
        assert torch.equal(view.invert(seen), x)
        assert torch.equal(view.apply(view.invert(seen)), seen)
        assert view.then(view.inverse()) == identity(ndim)


@pytest.mark.parametrize("ndim", [2, 3])
def test_each_view_is_that_of_numpy(ndim):
    x = image(ndim)
    for view in every_view(ndim):
        expected = np.transpose(x.numpy(), (0, 1, *(a + 2 for a in view.axes)))
        for axis in view.flipped:
            expected = np.flip(expected, axis + 2)
        np.testing.assert_array_equal(view.apply(x), expected)
    for turns, plane in itertools.product(range(-3, 6), itertools.permutations(range(ndim), 2)):
        expected = np.rot90(x.numpy(), turns, [a + 2 for a in plane])
        np.testing.assert_array_equal(rotation(ndim, turns, plane).apply(x), expected)
    np.testing.assert_array_equal(transposition(ndim, 0, 1).apply(x), np.swapaxes(x.numpy(), 2, 3))
    np.testing.assert_array_equal(flip(ndim, -1).apply(x), x.numpy()[..., ::-1])


@pytest.mark.parametrize("ndim", [2, 3])
def test_one_view_after_another(ndim):
    x = image(ndim)
    for first, second in itertools.product(every_view(ndim)[::3], every_view(ndim)[::5]):
        assert torch.equal(first.then(second).apply(x), second.apply(first.apply(x)))


def test_size_and_spacing_go_along():
    view = View((2, 0, 1), (1,))
    assert view.shape((10, 20, 30)) == (30, 10, 20)
    assert view.spacing((0.5, 0.6, 5.0)) == (5.0, 0.5, 0.6)  # mirrored axes keep their spacing
    assert view.name == "axes 2,-0,1"
    assert hash(view) == hash(View((2, 0, 1), (1,)))


def test_standard_views_in_3d():
    three = standard_views(3, 3)
    assert three[0] == identity(3)
    assert sorted(view.axes[-1] for view in three) == [0, 1, 2]  # each axis once last
    assert {view.axes for view in standard_views(3, 6)} == set(itertools.permutations(range(3)))
    assert standard_views(3, 6)[:3] == three
    two = standard_views(3, 2)
    assert two == three[:2]
    assert two[0].axes[-1] != two[1].axes[-1]
    assert not any(view.flipped for view in standard_views(3, 6))


def test_standard_views_in_2d():
    x = image(2)
    for turns, view in enumerate(standard_views(2, 4)):
        np.testing.assert_array_equal(view.apply(x), np.rot90(x.numpy(), turns, (2, 3)))
    assert set(standard_views(2, 8)) == set(every_view(2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: standard_views(3, 1), "nobody to learn from"),
        (lambda: standard_views(3, 7), r"2 … 6"),
        (lambda: standard_views(1, 2), "2 and 3 axes"),
        (lambda: View((0, 0)), "each of 0"),
        (lambda: View((0, 1), (2,)), "flipped is"),
        (lambda: identity(3).apply(torch.zeros(1, 1, 4, 4)), "3 axes cannot be taken"),
        (lambda: identity(3).spacing((1.0, 1.0)), "needs 3 numbers"),
        (lambda: identity(3).then(identity(2)), "cannot follow"),
        (lambda: Ensemble([]), "at least one"),
    ],
)
def test_what_is_no_view_is_refused(call, said):
    with pytest.raises(ShapeError, match=said):
        call()


class Depth(nn.Module):
    """Logits that tell how far along the last axis a voxel is: what a network sees depends on the view."""

    def forward(self, x):
        assert x.is_contiguous()
        ramp = torch.arange(x.shape[-1]).expand(len(x), 1, *x.shape[2:])
        return {"logits": torch.cat([x[:, :1], ramp * x[:, :1]], 1)}


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_network_sees_the_view_and_answers_in_the_frame_of_the_image(ndim):
    x = image(ndim)
    for axis in range(ndim):
        order = [*[a for a in range(ndim) if a != axis], axis]
        logits = ViewNetwork(Depth(), View(tuple(order)))(x)
        assert logits.shape == (2, 2, *SIZES[ndim])
        assert logits.is_contiguous()
        places = np.indices(SIZES[ndim])[axis]
        np.testing.assert_allclose(logits[:, 1], x.numpy()[:, 0] * places, rtol=1e-6)
        backwards = ViewNetwork(Depth(), View(tuple(order), (ndim - 1,)))(x)
        np.testing.assert_allclose(backwards[:, 1], x.numpy()[:, 0] * (SIZES[ndim][axis] - 1 - places), rtol=1e-6)


def test_weights_keep_their_names():
    network = registry.get("backbone", "unet")(Task(("a", "b"), 3), channels=(4, 8))
    wrapped = ViewNetwork(network, View((1, 2, 0)))
    assert list(wrapped.state_dict()) == [f"network.{key}" for key in network.state_dict()]
    twin = copy.deepcopy(wrapped)
    assert twin.view == wrapped.view
    twin.load_state_dict(wrapped.state_dict())
    x = torch.randn(1, 1, 4, 6, 8)
    assert torch.equal(twin.eval()(x), wrapped.eval()(x))


class Fixed(nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, x):
        return (self.scores, x)  # deep supervision


def test_ensemble_is_the_mean_probability():
    shares = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]
    members = [Fixed(torch.tensor(p).log().add(7 * n).view(1, 3, 1, 1)) for n, p in enumerate(shares)]
    found = Ensemble(members)(torch.zeros(1, 1, 1, 1))
    expected = [math.log(0.3), math.log(0.525), math.log(0.175)]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert found.softmax(1).flatten().tolist() == pytest.approx([0.3, 0.525, 0.175], rel=1e-5)
    found.sum().backward()
    assert all(bool(member.scores.grad.isfinite().all()) for member in members)
    alone = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(Ensemble([Fixed(alone)])(alone), alone.log_softmax(1))


def test_ensemble_of_regions_is_the_mean_sigmoid():
    shares = [[0.2, 0.9], [0.6, 0.3]]
    members = [Fixed(torch.tensor(p).logit().view(1, 2, 1, 1)) for p in shares]
    found = Ensemble(members, regions=True)(torch.zeros(1, 1, 1, 1))
    assert found.sigmoid().flatten().tolist() == pytest.approx([0.4, 0.6], rel=1e-5)
    # so sure that the probability is 1 in float32: the log odds are still those of the mean, log(2 e^90 / 2)
    sure = Ensemble([Fixed(torch.full((1, 1, 1, 1), 90.0))] * 2, regions=True)(torch.zeros(1, 1, 1, 1))
    assert float(sure.detach()) == pytest.approx(90, rel=1e-6)


def test_patches_that_a_view_cannot_take_are_refused_with_one_that_all_can():
    task = Task(("a", "b"), 3)
    torch.manual_seed(0)

    class Pooled(nn.Module):
        """Halves the last axis only: views ask different things of a patch."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, (1, 1, 4), stride=(1, 1, 4))
            self.up = nn.Upsample(scale_factor=(1, 1, 4))

        def forward(self, x):
            return self.up(self.conv(x))

    networks = [ViewNetwork(Pooled(), view) for view in standard_views(3, 3)]
    check_views(networks, task, (4, 8, 12))
    check_views(networks[:1], task, (5, 6, 8))
    with pytest.raises(
        ShapeError, match=r"view 1 \(axes 0,2,1\) sees \[5, 8, 6\].*multiples of 4 work.*\[4, 8, 8\]"
    ) as error:
        check_views(networks, task, (5, 6, 8))
    assert "\n" not in str(error.value)
    assert nearest_size(Ensemble(networks), task, (5, 6, 8)) == (4, 8, 8)
    with pytest.raises(ShapeError, match="nor do all views"):
        check_views([ViewNetwork(nn.Conv3d(1, 5, 1), identity(3))], task, (4, 4, 4))


def test_a_network_takes_patches_that_are_no_cubes():
    task = Task(("a", "b"), 3)
    network = registry.get("backbone", "unet")(task, channels=(4, 8, 8))
    check_views([ViewNetwork(network, view) for view in standard_views(3, 3)], task, (8, 12, 16))
