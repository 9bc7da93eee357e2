"""Predictions with dropout on are those of plain passes, to the bit, for fewer convolutions."""

import copy
import io

import pytest
import torch
from torch import nn

from labeleff import registry
from labeleff.backbones.mc_dropout import (
    has_dropout,
    predict_and_sample,
    prediction_modes,
    sample,
    with_dropout,
)
from labeleff.backbones.views import View, ViewNetwork
from labeleff.batch import Task
from labeleff.errors import ShapeError
from labeleff.evaluation.inference import evaluating

TASK = {ndim: Task(("a", "b", "c"), ndim, channels=1) for ndim in (2, 3)}
BACKBONES = {
    "unet": {"channels": (4, 8, 8), "norm": "batch"},
    "basic_unet": {"features": (4, 4, 8, 8, 8, 8), "norm": "batch"},
    "vnet": {"dropout": 0.3},
    "segresnet": {"filters": 8, "blocks_down": (1, 1, 1)},
    "dynunet": {"filters": (4, 8, 8, 8), "norm": "batch", "deep_supervision": True},
}


def make(name, ndim, **options):
    torch.manual_seed(0)
    network = registry.get("backbone", name)(TASK[ndim], **{**BACKBONES[name], **options})
    for module in network.modules():
        if options.get("dropout") == 0 and isinstance(module, nn.Dropout3d):
            module.p = 0.0  # MONAI's VNet has some of its own in the finest skip connections
        # running statistics that are not those of a fresh network
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return network


def by_hand(network, image, samples, *, exclusive=True):
    """Plain passes with nothing but dropout in train mode."""
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if type(module).__name__.startswith("Dropout"):
            module.training = True
    with torch.no_grad():
        scores = [network(image) for _ in range(samples)]
    return torch.stack([s.softmax(1) if exclusive else s.sigmoid() for s in scores])


def predict(network, image):
    with torch.no_grad():
        return copy.deepcopy(network).eval()(image)


def footprint(network):
    """Everything a call must leave as it was."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    forwards = ["forward" in vars(m) for m in network.modules()]
    return hooks, forwards, [m.training for m in network.modules()], [b.clone() for b in network.buffers()]


def same(before, after):
    return before[:3] == after[:3] and all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))


@pytest.fixture
def convolutions(monkeypatch):
    """Count convolutions, transposed ones left out."""
    calls = []
    for kind in (nn.Conv2d, nn.Conv3d):
        original = kind._conv_forward

        def counted(self, *given, original=original):
            calls.append(self)
            return original(self, *given)

        monkeypatch.setattr(kind, "_conv_forward", counted)
    return calls


def insert(network, place, ndim):
    """Put dropout somewhere; returns whether anything comes before it."""
    task = TASK[ndim]
    kinds = {"convolution": nn.Conv2d if ndim == 2 else nn.Conv3d}
    names = [name for name, module in network.named_modules() if isinstance(module, kinds["convolution"])]
    if place == "head":
        with_dropout(network, task, p=0.4)
    elif place == "decoder":
        with_dropout(network, task, p=0.4, head=names[len(names) * 2 // 3])
    elif place == "everywhere":
        for name in names:
            with_dropout(network, task, p=0.2, head=name, kind="voxel")
    return network


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("place", ["head", "decoder", "everywhere"])
@pytest.mark.parametrize("name", BACKBONES)
def test_samples_are_plain_passes_to_the_bit(name, place, ndim, convolutions):
    network = insert(make(name, ndim, **({"dropout": 0.0} if name == "vnet" else {})), place, ndim)
    network.train()
    image = torch.randn(2, 1, *[16] * ndim, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    expected = by_hand(network, image, 4)
    after = torch.rand(1)
    plain = len(convolutions)
    convolutions.clear()
    before = footprint(network)
    torch.manual_seed(7)
    found = sample(network, image, 4)
    assert torch.equal(torch.rand(1), after)  # as many draws
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])
    assert found.shape == (4, 2, 3, *[16] * ndim)
    assert same(before, footprint(network))
    shared = len(convolutions)
    one = plain // 4
    if place == "head":
        assert shared <= one + 3 * 2  # the head, and in UNet the unit that reworks logits
    elif place == "decoder":
        assert one < shared < plain
    else:
        assert shared == plain


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [("vnet", {}), ("unet", {"dropout": 0.2}), ("segresnet", {"dropout": 0.2}), ("basic_unet", {"dropout": 0.1})],
)
def test_dropout_that_a_backbone_has_of_its_own(name, options, ndim, convolutions):
    network = make(name, ndim, **options)
    image = torch.randn(1, 1, *[16] * ndim, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    expected = by_hand(network, image, 3)
    plain = len(convolutions)
    torch.manual_seed(3)
    assert torch.equal(sample(network, image, 3), expected)
    assert len(convolutions) - plain < plain
    torch.manual_seed(3)
    assert torch.equal(sample(network, image, 3, share=False), expected)
    assert len(convolutions) - plain > plain


def test_one_more_pass_gives_the_prediction_without_dropout(convolutions):
    network = insert(make("unet", 2), "decoder", 2).train()
    image = torch.randn(2, 1, 16, 16)
    expected = copy.deepcopy(network).eval()(image).softmax(1)
    torch.manual_seed(3)
    samples = by_hand(network, image, 3)
    before = footprint(network)
    for share in (True, False):
        torch.manual_seed(3)
        plain, found = predict_and_sample(network, image, 3, share=share)
        assert torch.equal(plain, expected)
        assert torch.equal(found, samples)
        assert same(before, footprint(network))
    assert not plain.requires_grad


def test_regions_views_and_inference_mode():
    network = with_dropout(make("unet", 3), TASK[3], p=0.3)
    view = ViewNetwork(network, View((2, 0, 1)))
    image = torch.randn(1, 1, 8, 12, 16)
    torch.manual_seed(5)
    expected = by_hand(view, image, 2, exclusive=False)
    torch.manual_seed(5)
    with torch.inference_mode():
        found = sample(view, image.clone(), 2, exclusive=False)
    assert torch.equal(found, expected)
    weight = torch.ones(1, requires_grad=True)
    (weight * found).sum().backward()  # may be part of a loss


class Awkward(nn.Module):
    """In-place glue, a shared module, a list that is changed by who gets it, and dropout in the middle."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))  # changes what it is given
        self.act = nn.ReLU(inplace=True)
        self.both = Both()
        self.dropout, self.none = nn.Dropout(0.5), nn.Dropout(0.0)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.first(x)
        y += self.second(y)  # what first returned is no more
        z = y * 2
        self.act(z)  # in place, and what it returns is not used
        parts = self.both(self.none(z))
        y = self.shared(parts.pop()) + self.shared(parts.pop()) + z
        y = self.block(y) + y
        y = self.dropout(y)
        return self.head(self.shared(y).add_(y))


class Both(nn.Module):
    def forward(self, x):
        return [x + 1, x.sin()]


def test_networks_that_change_tensors_in_place(convolutions):
    torch.manual_seed(0)
    network, image = Awkward(), torch.randn(2, 1, 8, 8)
    torch.manual_seed(1)
    expected = by_hand(network, image, 5)
    assert len(convolutions) == 5 * 7
    convolutions.clear()
    torch.manual_seed(1)
    assert torch.equal(sample(network, image, 5), expected)
    # 7, then 4 times: first, whose output is changed; block's, whose input is not its own to keep; and after dropout two
    counts = {name: convolutions.count(m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert counts == {"first": 5, "second": 1, "shared": 2 + 5, "block.1": 1, "head": 5}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dropout, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.head(self.dropout(self.conv(x + torch.randn_like(x))))


def test_noise_before_the_first_dropout_is_not_shared(convolutions):
    network, image = Noisy(), torch.randn(1, 1, 8, 8)
    torch.manual_seed(2)
    expected = by_hand(network, image, 3)
    convolutions.clear()
    torch.manual_seed(2)
    assert torch.equal(sample(network, image, 3), expected)
    assert len(convolutions) == 6


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
        self.dropout, self.passes = nn.Dropout(0.5), 0

    def forward(self, x):
        self.passes += 1
        return self.dropout(self.one(x) if self.passes % 2 else self.two(x))


def test_a_network_that_takes_another_way_is_refused():
    network = Fickle()
    before = footprint(network)
    with pytest.raises(ShapeError, match="share=False"):
        sample(network, torch.randn(1, 1, 4, 4), 2)
    assert same(before, footprint(network))
    assert sample(network, torch.randn(1, 1, 4, 4), 2, share=False).shape == (2, 1, 3, 4, 4)


class Never(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(1, 3, 1), nn.Dropout(0.5)

    def forward(self, x):
        return self.conv(x)


def test_without_dropout_there_is_nothing_to_sample():
    with pytest.raises(ShapeError, match=r"has no dropout.*with_dropout"):
        sample(make("unet", 2), torch.randn(1, 1, 16, 16), 2)
    with pytest.raises(ShapeError, match="has no dropout"):
        sample(make("unet", 2, dropout=0.0), torch.randn(1, 1, 16, 16), 2)
    for share in (True, False):
        with pytest.raises(ShapeError, match=r"no image passes the dropout.*with_dropout"):
            sample(Never(), torch.randn(1, 1, 8, 8), 2, share=share)
    with pytest.raises(ShapeError, match="at least 1"):
        sample(Noisy(), torch.randn(1, 1, 8, 8), 0)


def test_everything_is_put_back_when_something_fails():
    network = insert(make("unet", 2), "decoder", 2).train()
    network.model[0].forward = original = network.model[0].forward  # an override that was there before
    before = footprint(network)

    class Failure(Exception):
        pass

    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Failure

    head = next(m for m in network.modules() if hasattr(m, "dropout_before"))
    handle = head.register_forward_hook(fail)
    with pytest.raises(Failure):
        sample(network, torch.randn(1, 1, 16, 16), 5)
    handle.remove()
    assert same(before, footprint(network))
    assert vars(network.model[0])["forward"] is original
    with pytest.raises(RuntimeError):
        sample(network, torch.randn(1, 7, 16, 16), 5)
    assert same(before, footprint(network))


def test_only_dropout_is_on():
    network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), nn.Dropout2d(0.1), nn.Conv2d(1, 1, 1))
    network[0].eval()
    with prediction_modes(network, dropout=True):
        assert [m.training for m in network] == [True, False, True, False]
        assert torch.is_grad_enabled()
    assert [m.training for m in network] == [False, True, True, True]

    def fail():
        with prediction_modes(network):
            assert not any(m.training for m in network.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in network] == [False, True, True, True]
    with evaluating(network, dropout=True):
        assert [m.training for m in network] == [True, False, True, False]
    assert has_dropout(network)
    assert not has_dropout(nn.Sequential(nn.Dropout(0.0), nn.Conv2d(1, 1, 1)))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_inserted_dropout_leaves_weights_and_predictions_alone(name, ndim):
    network = make(name, ndim, **({"dropout": 0.0} if name == "vnet" else {}))
    image = torch.randn(2, 1, *[16] * ndim)
    keys, expected = list(network.state_dict()), predict(network, image)
    assert not has_dropout(network)
    torch.manual_seed(0)
    assert with_dropout(network, TASK[ndim], p=0.5) is network
    assert has_dropout(network)
    assert list(network.state_dict()) == keys
    assert torch.equal(predict(network, image), expected)
    twin = copy.deepcopy(network)
    holder = next(m for m in twin.modules() if hasattr(m, "dropout_before"))
    assert holder.out_channels == 3
    assert holder.in_channels > 3
    assert all(holder is not m for m in network.modules())
    network.load_state_dict(twin.state_dict())
    for other in (twin, network):  # a copy drops out by itself
        other.train()
        assert not torch.equal(other(image), other(image))
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    torch.manual_seed(1)
    first = sample(twin, image, 2)
    torch.manual_seed(1)
    assert torch.equal(sample(loaded, image, 2), first)


def test_inserted_dropout_by_name_kind_and_again():
    network = Never()
    with_dropout(network, TASK[2], p=0.5, head="conv", kind="voxel")
    with_dropout(network, TASK[2], p=0.9, head="conv")
    assert isinstance(network.conv.dropout_before, nn.Dropout2d)
    assert network.conv.dropout_before.p == 0.9
    assert len(network.conv._forward_pre_hooks) == 1
    seen = []
    network.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network.train()(torch.ones(64, 1, 4, 4))
    whole = seen[0].flatten(1)
    assert len(set(whole.flatten().tolist())) == 2  # nothing, or ten times as much
    assert bool((whole == whole[:, :1]).all())  # a whole channel at a time
    for call, said in [
        (lambda: with_dropout(network, TASK[2], p=0.0), "p is 0"),
        (lambda: with_dropout(network, TASK[2], head="cnov"), "Did you mean 'conv'"),
        (lambda: with_dropout(nn.Conv2d(1, 3, 1), Task(("a", "b"), 2)), "must map|takes neither"),
    ]:
        with pytest.raises(ShapeError, match=said):
            call()
