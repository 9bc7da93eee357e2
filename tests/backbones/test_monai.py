"""Networks and what they hand back."""

import pytest
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from labeleff import registry
from labeleff.backbones.mc_dropout import dropouts
from labeleff.backbones.outputs import Unwrapped, check_patch, logits_of
from labeleff.batch import Task
from labeleff.errors import ShapeError
from labeleff.strategies.base import fresh_copy
from tests.backbones.networks import make


def test_patches_that_do_not_fit_are_refused_with_a_size_that_works():
    task = Task(("background", "one"), 2)
    network = registry.get("backbone", "segresnet")(task, filters=8, blocks_down=(1, 1, 1, 1))
    with pytest.raises(ShapeError, match=r"data\.patch is \[36, 36\].*multiples of 8 work, such as \[\d+, \d+\]"):
        check_patch(network, task, (36, 36))
    modes = [m.training for m in network.modules()]
    check_patch(network, task, (32, 32))
    assert [m.training for m in network.modules()] == modes
    with pytest.raises(ShapeError, match="must map"):
        check_patch(nn.Conv2d(1, 5, 1), task, (32, 32))


def test_outputs_are_unwrapped():
    tensor, other = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)
    for output in (tensor, (tensor, other), [tensor], {"out": tensor, "aux": other}, {"logits": (tensor,)}):
        assert logits_of(output) is tensor
    with pytest.raises(ShapeError, match="returned str"):
        logits_of("text")


def test_deep_supervision_gives_the_full_resolution_head():
    task = Task(("background", "one"), 2)
    network = registry.get("backbone", "dynunet")(task, filters=(4, 8, 8, 8), deep_supervision=True)
    assert isinstance(network, Unwrapped)
    for mode in (True, False):
        assert network.train(mode)(torch.randn(2, 1, 32, 32)).shape == (2, 2, 32, 32)


@pytest.mark.parametrize(
    ("name", "options"), [("unet", {"channels": (4,)}), ("segresnet", {"filters": 5}), ("dynunet", {"filters": (4, 8)})]
)
def test_options_out_of_range(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        registry.get("backbone", name)(Task(("a", "b"), 2), **options)


@pytest.mark.parametrize(
    "name",
    [name for name in registry.names("backbone") if "dropout" in registry.options(registry.get("backbone", name))],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_is_as_asked_for_everywhere(name, p):
    network = make(name, 2, dropout=p)
    found = {module.p for module in network.modules() if isinstance(module, _DropoutNd)}
    assert found <= {p}
    assert (len(dropouts(network)) > 0) == (p > 0)


def test_a_network_that_keeps_its_heads_can_be_copied():
    network = make("dynunet", 2, deep_supervision=True)
    image = torch.randn(2, 2, 32, 32)
    network(image).sum().backward()
    twin = fresh_copy(network)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in network.parameters()}
    assert torch.equal(twin.eval()(image), network.eval()(image))
