"""Feature taps on every registered backbone and on small networks that are awkward on purpose."""

import copy
import itertools
import pickle
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from labeleff import registry
from labeleff.backbones.taps import capture, encode, find_taps
from labeleff.batch import Task
from labeleff.errors import ShapeError
from labeleff.strategies.base import train_only
from tests.backbones.networks import EINOPS, SIDE, SMALL

CASES = {
    # name: options, strides of the encoder, strides of the decoder
    "unet": ({"channels": (4, 8, 16)}, [2, 4], [2]),
    "basic_unet": ({"features": (4, 4, 8, 8, 16, 4)}, [1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "vnet": ({}, [1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "segresnet": ({"filters": 8, "blocks_down": (1, 1, 1)}, [1, 2, 4], [2, 1]),
    "dynunet": ({"filters": (4, 8, 16)}, [1, 2, 4], [2, 1]),
    "residual_unet": (SMALL["residual_unet"], [1, 2, 4], [2, 1]),
    "dynunet deep": ({"filters": (4, 8, 8, 8), "deep_supervision": True}, [1, 2, 4, 8], [4, 2, 1]),
    "attention_unet": ({"channels": (4, 8, 16)}, [1, 2, 4], [2, 1]),
    "mednext": ({"filters": 4}, [1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "mednext deep": ({"filters": 4, "deep_supervision": True}, [1, 2, 4, 8, 16], [8, 4, 2, 1]),
    "flexible_unet": ({"encoder": "resnet10", "decoder": (16, 8, 8, 4, 4)}, [2, 4, 8, 16, 32], [16, 8, 4, 2, 1]),
    "unetr": (SMALL["unetr"], [16], [8, 4, 2, 1]),
    "swin_unetr": (SMALL["swin_unetr"], [2, 4, 8, 16, 32], [16, 8, 4, 2, 1]),
    "unet plain": ({"channels": (4, 8, 16), "res_units": 0, "dropout": 0.3, "norm": "batch"}, [2, 4], [2]),
}
TASK = {ndim: Task(("background", "one", "two"), ndim, channels=2) for ndim in (2, 3)}


def make(case, ndim):
    name = case.split()[0]
    if name in EINOPS and find_spec("einops") is None:
        pytest.skip("needs einops")
    torch.manual_seed(0)
    return registry.get("backbone", name)(TASK[ndim], **CASES[case][0])


def state(network):
    """Everything a dry run might have changed."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    modes = [m.training for m in network.modules()]
    asked = [p.requires_grad for p in network.parameters()]
    return hooks, modes, asked, [b.clone() for b in network.buffers()], torch.get_rng_state()


def same(before, after):
    tensors = zip([*before[3], before[4]], [*after[3], after[4]], strict=True)
    return before[:3] == after[:3] and all(torch.equal(a, b) for a, b in tensors)


def test_every_registered_backbone_is_here():
    assert {case.split()[0] for case in CASES} == set(registry.names("backbone"))


ONLY_2D = ("flexible_unet", "unetr", "swin_unetr")
"""Large in 3-D; their levels there are looked at in ``test_every_network``."""
EARLY = {"swin_unetr": ("encoder1.", "encoder2.", "encoder3.", "encoder4.")}
"""What a network computes for its skip connections before its bottleneck, so that a pass for the encoder cannot leave it out."""


@pytest.mark.parametrize(("case", "ndim"), [(c, n) for c in CASES for n in (2, 3) if n == 2 or c not in ONLY_2D])
def test_levels_parameters_and_an_encoder_that_stops(case, ndim):
    network, task = make(case, ndim), TASK[ndim]
    side = SIDE.get(case, 32)
    next(network.parameters()).requires_grad_(False)
    before = state(network)
    taps = find_taps(network, task, patch=(side,) * ndim)
    assert same(before, state(network))
    next(network.parameters()).requires_grad_(True)
    _, down, up = CASES[case]
    assert [tap.stride for tap in taps.encoder] == [(stride,) * ndim for stride in down]
    assert [tap.stride for tap in taps.decoder] == [(stride,) * ndim for stride in up]
    assert taps.bottleneck == taps.encoder[-1]

    image = torch.randn(2, 2, *[side] * ndim)
    network.eval()
    with capture(network, [*taps.encoder, *taps.decoder]) as found:
        network(image)
    for tap, feature in found.items():
        assert (feature.shape[1], *feature.shape[2:]) == (tap.channels, *tap.shape)
        network.zero_grad()
        feature.square().sum().backward(retain_graph=True)  # what a feature depends on gets a gradient
        assert {n for n, p in network.named_parameters() if p.grad is not None} == set(tap.parameters)
    network.zero_grad()

    names = [name for name, _ in network.named_parameters()]
    encoder = set(taps.encoder_parameters)
    levels = [set(taps.decoder_parameters(level)) for level in range(len(taps.decoder))]
    assert not encoder & set.union(*levels)
    assert all(low < high for low, high in itertools.pairwise(levels))
    rest = set(names) - encoder - levels[-1]
    assert rest  # the head
    assert list(taps.encoder_parameters) == [name for name in names if name in encoder]

    own = {name: {f"{name}.{p}" for p, _ in m.named_parameters(recurse=False)} for name, m in network.named_modules()}
    for mode in (False, True):
        network.train(mode)
        torch.manual_seed(1)
        with capture(network, taps.encoder) as whole:
            network(image)
        counts = dict.fromkeys(own, 0)

        def count(name, counts=counts):
            return lambda *_: counts.update({name: counts[name] + 1})

        hooks = [m.register_forward_pre_hook(count(name)) for name, m in network.named_modules()]
        torch.manual_seed(1)
        features = encode(network, image, taps.encoder)
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(f, whole[tap]) for f, tap in zip(features, taps.encoder, strict=True))
        beyond = [name for name, parameters in own.items() if parameters - encoder]
        assert not any(counts[name] for name in beyond if not name.startswith(EARLY.get(case, ("nothing",))))
        assert all(counts[name] for name, parameters in own.items() if parameters & encoder)
    assert state(network)[0] == before[0]
    assert pickle.loads(pickle.dumps(taps)) == taps


def checkpointed(network):
    """Let every block of a network compute what it had forgotten anew for its gradient, blocks within blocks too."""

    def kind_of(kind):
        def forward(self, *given, **named):
            return checkpoint(kind.forward, self, *given, use_reentrant=False, **named)

        return type(f"Checkpointed{kind.__name__}", (kind,), {"forward": forward})

    for name, module in network.named_modules():
        if name and type(module).forward is not nn.Module.forward and any(True for _ in module.children()):
            module.__class__ = kind_of(type(module))
    return network


@pytest.mark.parametrize("case", CASES)
def test_gradient_checkpointing_changes_neither_taps_nor_gradients(case):
    side, task = SIDE.get(case, 32), TASK[2]
    plain, saving = make(case, 2), checkpointed(make(case, 2))
    taps = find_taps(plain, task, patch=(side, side))
    assert find_taps(saving, task, patch=(side, side)) == taps
    calls = []
    for module in saving.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    image = torch.randn(2, 2, side, side)
    gradients = []
    for network in (plain, saving):
        network.eval()
        loss = sum(f.square().mean() for f in encode(network, image, taps.encoder))
        before = len(calls)
        loss.backward()
        assert (len(calls) > before) == (network is saving)  # blocks were computed anew
        gradients.append({n: p.grad for n, p in network.named_parameters()})
        network.zero_grad()
        with capture(network, taps.encoder[-1:]) as found:  # what is computed anew is not what was found
            network(image)
            deep = found[taps.bottleneck]
            deep.square().mean().backward()
            assert found[taps.bottleneck] is deep
        assert {n for n, p in network.named_parameters() if p.grad is not None} == set(taps.encoder_parameters)
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


class Alone(nn.Module):
    """A pass that ends at the encoder, as a strategy's step under data-parallel training."""

    def __init__(self, network, taps):
        super().__init__()
        self.network, self.taps = network, taps

    def forward(self, image):
        return sum(f.square().mean() for f in encode(self.network, image, self.taps))


@pytest.fixture(scope="module")
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_alone_under_data_parallel_training(case, one_process):
    """DDP waits for every parameter that asks for a gradient: those behind the taps are all that do, and all get theirs."""
    network, side = make(case, 2), SIDE.get(case, 32)
    taps = find_taps(network, TASK[2], patch=(side, side)).encoder
    train_only(network, {name for tap in taps for name in tap.parameters})
    parallel, image = DistributedDataParallel(Alone(network, taps)), torch.randn(2, 2, side, side)
    for _ in range(2):  # the second pass fails where the first one left a parameter waiting
        network.zero_grad()
        parallel(image).backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


class Net(nn.Module):
    """A small encoder and decoder with whatever is put between them."""

    def __init__(self, middle=None, width=6):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.shared = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.middle = middle or nn.Identity()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.aside = nn.Conv2d(width, width, 1)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        x = self.act(self.first(x))
        y = self.act(self.shared(self.down(x)))
        y = self.act(self.shared(self.middle(y)))
        self.aside(y)  # the output does not depend on it
        return self.head(self.up(y) + x)


TOY = Task(("a", "b", "c"), 2)


def test_a_module_called_twice_is_tapped_at_its_last_call():
    network = Net()
    taps = find_taps(network, TOY, patch=(16, 16))
    assert [(t.module, t.call) for t in taps.encoder] == [("act", 0), ("act", 2)]
    assert [(t.module, t.call) for t in taps.decoder] == [("up", 0)]
    x = torch.randn(2, 1, 16, 16)
    fine, deep = encode(network, x, taps.encoder)
    first = F.relu(network.first(x))
    once = F.relu(network.shared(network.down(first)))
    assert torch.equal(fine, first)
    assert torch.equal(deep, F.relu(network.shared(once)))
    # the same through the whole pass, in any order of taps, pass after pass
    with capture(network, taps.encoder[::-1]) as found:
        for scale in (1.0, 2.0):
            network(scale * x)
            assert torch.equal(found[taps.encoder[0]], F.relu(network.first(scale * x)))
    assert "aside.weight" not in {p for tap in (*taps.encoder, *taps.decoder) for p in tap.parameters}


class Gate(nn.Module):
    """Squeeze and excite: a branch of one voxel, wider than anything else."""

    def __init__(self, width=6):
        super().__init__()
        self.pool, self.wide, self.back = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 40, 1), nn.Conv2d(40, width, 1)

    def forward(self, x):
        return x * self.back(self.wide(self.pool(x))).sigmoid()


def test_gates_of_one_voxel_are_no_bottleneck():
    taps = find_taps(Net(Gate()), TOY, patch=(16, 16))
    assert taps.bottleneck.shape == (8, 8)
    assert "middle.wide.weight" in taps.encoder_parameters


class InPlace(nn.Module):
    """Adds to what a module has returned, in place: the module's output is no feature, the block's is."""

    def __init__(self, width=6):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return self.last(out)


def test_what_is_changed_afterwards_is_not_tapped():
    network = Net(InPlace())
    run = find_taps(network, TOY, patch=(16, 16), bottleneck="middle")
    assert run.bottleneck.module == "middle"
    network.middle.last = nn.Identity()
    assert find_taps(network, TOY, patch=(16, 16)).bottleneck.module == "act"


def test_modules_can_be_named():
    network = Net()
    network.alias = network.down
    taps = find_taps(network, TOY, patch=(16, 16), bottleneck="alias", encoder=["first"], decoder=["up", "head"])
    assert [tap.module for tap in (*taps.encoder, *taps.decoder)] == ["first", "down", "up", "head"]
    assert set(taps.encoder_parameters) == {"first.weight", "first.bias", "down.weight", "down.bias"}
    with pytest.raises(ShapeError, match=r"no module 'dwon'\. Did you mean 'down'\?"):
        find_taps(network, TOY, patch=(16, 16), bottleneck="dwon")
    network.tokens = nn.Identity()
    with pytest.raises(ShapeError, match="returns no feature map"):
        find_taps(network, TOY, patch=(16, 16), decoder=["tokens"])


class Inverted(nn.Module):
    """Widens inside, as MedNeXt and EfficientNet do: the block is the bottleneck, not its widest layer."""

    def __init__(self, width=6):
        super().__init__()
        self.wide, self.back = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x):
        return x + self.back(F.relu(self.wide(x)))


def test_a_block_that_widens_inside_is_taken_as_a_whole():
    network = Net(Inverted())
    network.act = nn.Identity()
    network.shared = nn.Identity()
    taps = find_taps(network, TOY, patch=(16, 16))
    assert (taps.bottleneck.module, taps.bottleneck.channels) == ("middle", 6)
    assert "middle.back.weight" in taps.encoder_parameters


class Padded(nn.Module):
    """Keeps its size by padding and cropping again: the padded map is no level."""

    def __init__(self, width=6):
        super().__init__()
        self.pad, self.conv = nn.ZeroPad2d(1), nn.Conv2d(width, width, 3)

    def forward(self, x):
        return self.conv(self.pad(x))


def test_padding_is_no_level():
    network = Net(Padded())
    taps = find_taps(network, TOY, patch=(16, 16))
    assert [tap.stride for tap in taps.encoder] == [(1, 1), (2, 2)]
    # where the sizes of the network itself do not divide the image's, nothing can be told apart, and nothing is left out
    odd = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Upsample((18, 18)), nn.Conv2d(6, 3, 1))
    assert [tap.shape for tap in find_taps(odd, TOY, patch=(18, 18)).encoder] == [(9, 9), (5, 5)]


class ChannelsLast(nn.Module):
    """Hands on its features with channels last, where a layer norm wants them."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return self.mlp(self.norm(x.movedim(1, -1))).movedim(-1, 1)


def test_channels_last_are_no_map():
    network = Net(ChannelsLast(), width=8)  # [1, 8, 8, 8]: by its shape alone it could be one of [B, C, *S]
    network.act = network.shared = nn.Identity()
    taps = find_taps(network, TOY, patch=(16, 16))
    assert taps.bottleneck.module == "middle"
    assert {"middle.mlp.weight", "middle.norm.weight"} < set(taps.encoder_parameters)


def test_without_downsampling_there_is_no_bottleneck():
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    before = state(network)
    with pytest.raises(ShapeError, match=r"no bottleneck.*\[16, 16\].*name the module"):
        find_taps(network, TOY, patch=(16, 16))
    assert same(before, state(network))


class Transformer(nn.Module):
    """Patches become tokens; what is a map again comes last."""

    def __init__(self, convolution):
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4) if convolution else nn.Linear(16, 8)
        self.block = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x):
        side = x.shape[-1] // 4
        if isinstance(self.embed, nn.Conv2d):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
        else:
            tokens = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        y = self.block(tokens).transpose(1, 2).unflatten(2, (side, side))
        return self.head(self.up(y))


@pytest.mark.parametrize("convolution", [True, False])
def test_tokens_are_refused_by_name(convolution):
    network = Transformer(convolution)
    with pytest.raises(ShapeError, match=r"works on tokens \(module '(block|embed)' returns \[1, 16, 8\]\)") as error:
        find_taps(network, TOY, patch=(16, 16))
    assert "\n" not in str(error.value)
    assert find_taps(network, TOY, patch=(16, 16), bottleneck="up").bottleneck.stride == (2, 2)


def test_tensors_that_a_network_keeps_do_not_stay_in_it():
    network = make("dynunet deep", 2)
    image = torch.randn(2, 2, 32, 32)
    network(image).sum().backward()  # a network that trains holds on to its heads
    taps = find_taps(network, TASK[2], patch=(32, 32))
    fresh = make("dynunet deep", 2)
    assert find_taps(fresh, TASK[2], patch=(32, 32)) == taps
    copy.deepcopy(fresh)  # which fails for one that holds tensors of a pass with gradients


def test_a_patch_that_does_not_fit_is_refused():
    network = registry.get("backbone", "dynunet")(TOY, filters=(4, 4, 4))
    with pytest.raises(ShapeError, match="multiples of"):
        find_taps(network, TOY, patch=(15, 15))
    assert not any(m._forward_hooks for m in network.modules())


def test_the_usual_patch_is_one_that_fits():
    assert find_taps(Net(), TOY).encoder[0].shape == (32, 32)
    assert find_taps(Net(Gate()), TOY).encoder[0].shape == (64, 64)  # maps of one voxel: gates, or a deeper network


def test_a_network_too_deep_for_the_small_image_is_shown_a_larger_one():
    network = registry.get("backbone", "dynunet")(TOY, filters=(4,) * 6, norm="batch")
    assert find_taps(network, TOY).bottleneck.stride == (32, 32)


def test_hooks_go_when_something_fails():
    network = Net()
    taps = find_taps(network, TOY, patch=(16, 16))
    before = state(network)
    with pytest.raises(RuntimeError), capture(network, taps.encoder):
        network(torch.zeros(1, 9, 16, 16))
    with pytest.raises(RuntimeError):
        encode(network, torch.zeros(1, 9, 16, 16), taps.encoder)
    assert same(before, state(network))
    with pytest.raises(ShapeError, match="belong to another network"), capture(nn.Conv2d(1, 1, 1), taps.encoder):
        pass
    shorter = copy.deepcopy(network)
    shorter.forward = lambda x: shorter.head(shorter.first(x))
    with pytest.raises(ShapeError, match="'act' was not called"):
        encode(shorter, torch.zeros(1, 1, 16, 16), taps.encoder)
