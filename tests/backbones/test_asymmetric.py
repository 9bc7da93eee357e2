"""Networks that are blind along an axis, and 2-D weights in 3-D networks."""

import copy
import itertools

import pytest
import torch
from torch import nn

from labeleff import registry
from labeleff.backbones.asymmetric import flatten_kernel, inflate_2d, keeps_sizes, make_asymmetric
from labeleff.backbones.taps import encode, find_taps
from labeleff.batch import Task
from labeleff.errors import ShapeError

TASK = Task(("a", "b", "c"), 3, channels=2)
SMALL = {
    "unet": {"channels": (4, 8, 16), "norm": "batch"},
    "basic_unet": {"features": (4, 4, 8, 8, 16, 4), "norm": "batch"},
    "vnet": {},
    "segresnet": {"filters": 8, "blocks_down": (1, 1, 1)},
    "dynunet": {"filters": (4, 8, 16), "norm": "batch"},
}


def make(name, task=TASK, **options):
    torch.manual_seed(0)
    return registry.get("backbone", name)(task, **{**SMALL[name], **options})


OPTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 5, "padding": 2, "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (3, 5, 7), "padding": (1, 2, 3), "groups": 2},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": (1, 2, 1)},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_flattened_convolution_is_the_old_one_on_what_is_constant_along_the_axis(options, axis):
    torch.manual_seed(0)
    old = nn.Conv3d(4, 6, **options)
    new = copy.deepcopy(old)
    assert keeps_sizes(old, axis)
    flatten_kernel(new, axis)
    assert new.weight.shape[axis + 2] == 1 == new.kernel_size[axis]
    assert new.weight.requires_grad
    size = [16, 16, 16]
    image = torch.randn(2, 4, *[1 if i == axis else n for i, n in enumerate(size)]).expand(2, 4, *size)
    expected, found = old(image), new(image)
    assert found.shape == expected.shape
    margin = 0 if options.get("padding_mode") or not options.get("padding") else 4
    length = expected.shape[axis + 2]
    inner = slice(margin // old.stride[axis], length - margin // old.stride[axis])
    index = [slice(None)] * 5
    index[axis + 2] = inner
    torch.testing.assert_close(found[tuple(index)], expected[tuple(index)], atol=1e-5, rtol=1e-5)
    assert found[tuple(index)].numel()
    # and it is blind: one slice in, one slice out
    moved = torch.randn(2, 4, *size)
    other = moved.clone()
    other.select(axis + 2, 4 * old.stride[axis]).add_(1)
    changed = (new(moved) - new(other)).abs().amax([i for i in range(5) if i != axis + 2])
    assert changed.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("options", OPTIONS)
def test_sizes_stay(options):
    for axis, length in itertools.product(range(3), range(8, 19)):
        old = nn.Conv3d(2, 2, **{**options, "groups": 1})
        new = copy.deepcopy(old)
        flatten_kernel(new, axis)
        size = [length if i == axis else 8 for i in range(3)]
        wanted, found = (c(torch.zeros(1, 2, *size)).shape[axis + 2] for c in (old, new))
        if length % old.stride[axis] == 0:
            assert found == wanted
        padding = old.padding if isinstance(old.padding, str) else old.padding[axis]
        if padding == "same" or 2 * padding == old.dilation[axis] * (old.kernel_size[axis] - 1):
            assert found == wanted  # odd ones too


def test_convolutions_that_would_change_sizes():
    for options in (
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 5, "stride": 2, "padding": 1},
    ):
        convolution = nn.Conv3d(1, 1, **options)
        assert not keeps_sizes(convolution, 2)
    assert not keeps_sizes(nn.Conv3d(1, 1, 3, padding="valid"), 0)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", SMALL)
def test_every_backbone_can_be_made_asymmetric(name, axis):
    network = make(name)
    patch = (16, 32, 16) if axis == -1 else (32, 16, 16)
    taps = find_taps(network, TASK, patch=(32, 32, 32))
    before = {n: (m.kernel_size, m.stride) for n, m in network.named_modules() if hasattr(m, "padding")}
    keys = list(network.state_dict())
    report = make_asymmetric(network, TASK, axis=axis, patch=(32, 32, 32))
    assert report.axis == axis % 3
    assert report.changed
    kept = dict(report.kept)
    for n, module in network.named_modules():
        if n not in before:
            continue
        kernel, stride = before[n]
        assert module.stride == stride
        if not isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            assert module.kernel_size == kernel  # pooling
            continue
        encoder = f"{n}.weight" in taps.encoder_parameters
        flat = encoder and isinstance(module, nn.Conv3d) and kernel[axis] > 1 and stride[axis] == 1
        assert (n in report.changed) == flat == (n not in kept)
        expected = tuple(1 if flat and i == axis % 3 else k for i, k in enumerate(kernel))
        assert module.kernel_size == expected == tuple(module.weight.shape[2:])
    assert list(network.state_dict()) == keys
    assert network.eval()(torch.randn(1, 2, *patch)).shape == (1, 3, *patch)
    network.train()(torch.randn(2, 2, 32, 32, 32)).sum().backward()
    assert f"{len(report.changed)} of {len(report.changed) + len(kept)}" in report.summary
    assert "not in the encoder" in report.summary
    assert "\n" not in report.summary


def test_the_encoder_is_blind_between_its_poolings():
    network = make("basic_unet").eval()
    taps = find_taps(network, TASK, patch=(32, 32, 32))
    image = torch.randn(1, 2, 16, 16, 32)
    other = image.clone()
    other[..., 13] += 1

    def slices_that_change():
        pairs = zip(encode(network, image, taps.encoder), encode(network, other, taps.encoder), strict=True)
        return [(a - b).abs().amax((0, 1, 2, 3)).nonzero().flatten().tolist() for a, b in pairs]

    assert slices_that_change()[0] == [11, 12, 13, 14, 15]  # two convolutions of three
    make_asymmetric(network, TASK, patch=(32, 32, 32))
    for level, changed in enumerate(slices_that_change()):
        assert changed == [13 // 2**level]


def test_strided_convolutions_by_option():
    network = make("dynunet")
    strides = {n: m.stride for n, m in network.named_modules() if isinstance(m, nn.Conv3d)}
    report = make_asymmetric(network, TASK, strided="flat", patch=(16, 16, 16))
    assert any(max(strides[name]) == 2 for name in report.changed)
    assert {n: m.stride for n, m in network.named_modules() if isinstance(m, nn.Conv3d)} == strides
    assert network.eval()(torch.randn(1, 2, 16, 16, 20)).shape == (1, 3, 16, 16, 20)

    whole = make("dynunet")
    state = copy.deepcopy(whole.state_dict())
    with pytest.raises(ShapeError, match="no longer fits together"):
        make_asymmetric(whole, TASK, strided="plane", patch=(16, 16, 16))
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())

    plane = Planar()
    report = make_asymmetric(plane, TASK, strided="plane", patch=(16, 16, 16))
    assert report.changed == ("first", "down")
    assert plane.down.stride == (2, 2, 1)
    assert plane(torch.randn(1, 2, 8, 8, 5)).shape == (1, 3, 8, 8, 5)


class Planar(nn.Module):
    """Enlarges to whatever the image was."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 4, 3, padding=1, stride=2)
        self.head = nn.Conv3d(4, 3, 3, padding=1)

    def forward(self, x):
        y = self.down(self.first(x))
        return self.head(nn.functional.interpolate(y, size=x.shape[2:]) + self.first(x))


def test_all_of_a_network_and_what_cannot_be_changed():
    network = make("basic_unet")
    report = make_asymmetric(network, TASK, part="all", patch=(16, 16, 16))
    assert {reason for _, reason in report.kept} == {"transposed", "one voxel wide already"}
    again = make_asymmetric(network, TASK, part="all", patch=(16, 16, 16))
    assert again.changed == ()
    odd = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 3, padding=1), nn.Conv3d(4, 3, 3, padding=2))
    odd.insert(2, nn.Conv3d(4, 4, 3, padding=1))
    odd[2].weight = odd[1].weight
    nn.utils.parametrizations.weight_norm(odd[3])
    report = make_asymmetric(odd, TASK, part="all", patch=(8, 8, 8))
    assert dict(report.kept) == {
        "0": "padding that changes sizes",
        "1": "weight computed or shared",
        "2": "weight computed or shared",
        "3": "weight computed or shared",
    }
    for task, axis in ((Task(("a", "b"), 2), -1), (TASK, 3)):
        with pytest.raises(ShapeError, match="only 3-D networks"):
            make_asymmetric(network, task, axis=axis)


def randomise(network):
    """Norm statistics and affine parameters that are not those of a fresh network."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-1, 1)
    return network.eval()


def planar_dynunet(ndim, axis=2):
    from monai.networks.nets import DynUNet

    def sizes(value):
        return [1 if i == axis else value for i in range(3)] if ndim == 3 else [value] * 2

    torch.manual_seed(ndim)
    return DynUNet(
        spatial_dims=ndim,
        in_channels=2,
        out_channels=3,
        kernel_size=[sizes(3)] * 3,
        strides=[sizes(1), sizes(2), sizes(2)],
        upsample_kernel_size=[sizes(2)] * 2,
        filters=(4, 8, 8),
        norm_name="batch",
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_inflated_network_is_the_2d_one_slice_by_slice(axis):
    flat, deep = randomise(planar_dynunet(2)), randomise(planar_dynunet(3, axis))
    report = inflate_2d(flat.state_dict(), deep, axis=axis)
    assert set(report.matched) == set(deep.state_dict())
    assert (report.adapted, report.left, report.unused, report.share) == ((), (), (), 1)
    volume = torch.randn(2, 2, *[5 if i == axis else 16 for i in range(3)])
    with torch.no_grad():
        found = deep(volume)
        for z in range(5):
            expected = flat(volume.select(axis + 2, z))
            torch.testing.assert_close(found.select(axis + 2, z), expected, atol=1e-5, rtol=1e-5)


def test_an_inflated_unet_is_the_2d_one_on_what_is_constant_along_the_axis():
    flat = randomise(make("basic_unet", Task(TASK.classes, 2, channels=2)))
    deep = make("basic_unet").eval()
    blind = make_asymmetric(deep, TASK, part="all", patch=(16, 16, 16))
    report = inflate_2d(flat.state_dict(), deep)
    assert set(report.adapted) == {
        (name + ".weight", "repeated 2 times") for name, why in blind.kept if why == "transposed"
    }
    image = torch.randn(1, 2, 32, 16)
    with torch.no_grad():
        found, expected = deep(image.unsqueeze(-1).repeat(1, 1, 1, 1, 16)), flat(image)
    torch.testing.assert_close(found, expected.unsqueeze(-1).expand_as(found), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_each_kind_of_layer(width):
    torch.manual_seed(0)
    flat = nn.Sequential(
        nn.Conv2d(3, 4, 7, padding=3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 5, 1)
    )
    flat.extra = nn.Linear(4, 2)
    deep = nn.Sequential(
        nn.Conv3d(1, 4, (7, 7, width)), nn.BatchNorm3d(4), nn.Conv3d(4, 4, (3, 3, 1), groups=2), nn.Conv3d(4, 6, 1)
    )
    flat[1].running_mean.fill_(3.0)
    head = deep[3].weight.detach().clone()
    report = inflate_2d(flat.state_dict(), deep)
    assert "1.running_mean" in report.matched
    assert float(deep[1].running_mean[0]) == 3
    for z in range(width):  # one grey channel given to a network of three colours
        torch.testing.assert_close(deep[0].weight[:, 0, :, :, z], flat[0].weight.sum(1) / width)
    assert torch.equal(deep[2].weight[..., 0], flat[2].weight)
    how = "3 input channels averaged to 1" + ("; repeated 3 times, divided by 3" if width == 3 else "")
    assert report.adapted == (("0.weight", how),)
    assert report.left == (
        ("3.weight", "[5, 4, 1, 1] does not fit [6, 4, 1, 1, 1]"),
        ("3.bias", "[5] does not fit [6]"),
    )
    assert torch.equal(deep[3].weight, head)
    assert report.unused == ("3.weight", "3.bias", "extra.weight", "extra.bias")
    numbers = {name: tensor.numel() for name, tensor in flat.state_dict().items()}
    assert report.share == pytest.approx(1 - sum(numbers[name] for name in report.unused) / sum(numbers.values()))
    assert "2 ([5, 4" not in report.summary
    assert "4 unused" in report.summary


def test_more_input_channels_than_the_2d_network_has():
    torch.manual_seed(0)
    flat, deep = nn.Sequential(nn.Conv2d(1, 4, 3)), nn.Sequential(nn.Conv3d(2, 4, (3, 3, 1)))
    inflate_2d(flat.state_dict(), deep)
    image = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(deep(image.unsqueeze(-1).expand(1, 2, 8, 8, 1))[..., 0], flat(image))


def test_weights_of_another_network_are_refused_and_nothing_is_written():
    flat = make("basic_unet", Task(TASK.classes, 2, channels=2))
    deep = make("unet")
    before = copy.deepcopy(deep.state_dict())
    with pytest.raises(ShapeError, match=r"only 0% of the 2-D weights.*at least 50%.*'conv_0") as error:
        inflate_2d(flat.state_dict(), deep)
    assert "\n" not in str(error.value)
    other = nn.ModuleDict({"encoder": make("basic_unet")})
    with pytest.raises(ShapeError, match="prefix"):
        inflate_2d(flat.state_dict(), other)
    assert inflate_2d(flat.state_dict(), other, prefix="encoder.").unused == ()
    wide = make("basic_unet", features=(8, 8, 8, 8, 8, 8))
    with pytest.raises(ShapeError, match="same widths"):
        inflate_2d(flat.state_dict(), wide)
    assert all(torch.equal(tensor, before[name]) for name, tensor in deep.state_dict().items())
